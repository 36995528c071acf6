"""CoDiEmb in JAX: fine-tunes one text-embedding model for both retrieval and semantic similarity."""

import os
from typing import TYPE_CHECKING, Any

from codiemb_jax.errors import UserError
from codiemb_jax.version import __version__

if TYPE_CHECKING:
    from codiemb_jax.config_file import load_settings
    from codiemb_jax.embedder import Embedder

# Otherwise transformers prints that PyTorch is missing, which is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = ["Embedder", "UserError", "__version__", "load_settings"]


def __getattr__(name: str) -> Any:
    # Imported lazily, so that `--help` and an early Ctrl-C do not wait for JAX.
    if name == "Embedder":
        from codiemb_jax.embedder import Embedder

        return Embedder
    if name == "load_settings":
        from codiemb_jax.config_file import load_settings

        return load_settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
