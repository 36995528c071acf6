"""Training: the run folder, the training step and the loop."""
