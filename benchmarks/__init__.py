"""Benchmarks: speech, error rates, the export gate, and measurements on devices."""
