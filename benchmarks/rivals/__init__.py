"""Rivals: the same clips by other programs, behind the runner's protocol."""
