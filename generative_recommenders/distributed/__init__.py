"""Ranks, devices and collectives."""
