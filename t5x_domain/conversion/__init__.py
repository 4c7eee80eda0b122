"""Checkpoints of other programs to ours and back: Hugging Face both ways, legacy T5X in."""
