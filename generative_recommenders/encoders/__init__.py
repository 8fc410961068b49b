"""Sequence encoders: jagged item embeddings in, jagged states out."""
