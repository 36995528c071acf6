"""What the kinds of model folder have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codiemb_jax.checkpoints.families import Family, family_of
from codiemb_jax.checkpoints.safetensors import LazyArray
from codiemb_jax.config import PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import Params
from codiemb_jax.text.sentence import SentencePrompts


class ModelFolder(ABC):
    """A model as it lies on disk: read, but for its weights."""

    path: Path
    config: dict[str, Any]
    """config.json as it came."""
    family: Family
    model_config: Any
    """config.json as the family reads it."""
    prefix: str
    dtypes: dict[str, str]
    files: dict[str, str]
    code: dict[str, str]
    """These four as in `Blueprint`."""
    stored: Mapping[str, Any]
    """How the folder says that it encodes (the fields that `ENCODING` names), as far as it does."""
    text: PromptSettings | SentencePrompts | None
    """How the folder says that texts become tokens, if it does."""
    max_tokens: int
    """Longest text in tokens."""

    def _read_config(self) -> None:
        with naming(self.path):
            self.family = family_of(self.config)
            self.model_config = self.family.read_config(self.config)

    @abstractmethod
    def check(self, abstract: Params) -> None:
        """Compares the weights in the folder with what the model needs; no weight is read.

        Raises:
          UserError: they differ.
        """

    @abstractmethod
    def load(self, abstract: Params) -> Params:
        """The parameters in the shapes, dtypes and shardings of `abstract`, each device reading its own part."""

    @abstractmethod
    def stream(self, abstract: Params) -> Params:
        """The parameters as `LazyArray`s, in the dtypes in which they are stored."""

    @abstractmethod
    def stream_passthrough(self) -> dict[str, LazyArray]:
        """Weights of the folder that an encoder does not use, by their full names."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts a path before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
