"""Model folders in and out: Hugging Face folders and Orbax checkpoints."""
