"""This machine: description and state, CPU cores and frequency, helper processes."""
