"""Tests on OpenAI's weights; see `make test-real`."""
