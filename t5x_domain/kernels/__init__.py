"""Pure functions on arrays: attention, relative bias, cross-entropy."""
