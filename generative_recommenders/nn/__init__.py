"""Layers shared by the encoders."""
