"""Reading and writing models: Hugging Face folders and Orbax checkpoints."""
