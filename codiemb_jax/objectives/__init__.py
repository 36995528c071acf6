"""Training objectives, which map embeddings and labels to a scalar loss."""
