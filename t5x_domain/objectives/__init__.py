"""What a model is asked to learn: a numpy half for the host, a loss for the device."""
