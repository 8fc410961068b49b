"""Semantic IDs: quantizers of item embeddings, the codes they give, and the tables made of them."""
