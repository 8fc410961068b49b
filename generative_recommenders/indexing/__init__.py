"""Top-k retrieval over the catalogue."""
