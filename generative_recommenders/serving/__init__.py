"""Using a trained model: recommendations from raw histories."""
