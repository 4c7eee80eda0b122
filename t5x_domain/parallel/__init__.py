"""Meshes, logical axes and the rules that map one to the other."""
