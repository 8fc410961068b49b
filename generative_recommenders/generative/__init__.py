"""Generative recommenders: models that write the semantic ID of the next item, and the search that reads it."""
