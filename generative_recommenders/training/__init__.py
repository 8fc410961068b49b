"""The train loop and what it leaves on disk."""
