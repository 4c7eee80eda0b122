"""Optimizer, schedule, state, step, checkpoint, loop."""
