"""Programs that convert between Hugging Face folders and Orbax checkpoints."""
