"""Devices: how to reach a machine, and what runs there. Knows nothing of models."""
