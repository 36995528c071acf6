"""CoDiEmb in JAX: fine-tunes one text encoder for retrieval and semantic similarity at once."""

__version__ = "0.1.0"
