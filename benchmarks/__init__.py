"""Bench: an artifact, a device and speech in, results out."""
