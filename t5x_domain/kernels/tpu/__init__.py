"""Attention for TPUs, written in Pallas."""
