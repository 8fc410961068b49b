"""Training objectives over next-item predictions and their negative samplers."""
