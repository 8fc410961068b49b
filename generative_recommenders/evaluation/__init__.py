"""Metrics and the evaluators that compute them."""
