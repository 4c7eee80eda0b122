"""Where and how often gin files are run: a file for each kind of place, headed by its commands."""
