"""Clips: manifests, data sets of the hub, audiofolders, and the sound files they name."""
