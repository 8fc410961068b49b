"""Scores of query states against item embeddings."""
