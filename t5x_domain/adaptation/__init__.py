"""What a domain project does around a run."""
