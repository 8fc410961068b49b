"""Raw files to prepared data, and prepared data to batches."""
