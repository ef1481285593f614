"""Latency, memory, profiles and telemetry of an artifact on this machine."""
