"""One training step, and what surrounds it."""
