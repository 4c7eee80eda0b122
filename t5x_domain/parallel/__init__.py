"""Meshes, the rules that map named axes to them, attention and cross-entropy over them, and the processes of a run."""
