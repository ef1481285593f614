"""Rivals: other speech recognition engines, measured on the same clips by the same protocol."""
