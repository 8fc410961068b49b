"""Next-item retrieval: configuration, model and assembly."""
