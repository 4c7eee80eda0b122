"""A finished model in use: decoding, scoring, embedding."""
