"""Perplexity by corpus and the report a person reads."""
