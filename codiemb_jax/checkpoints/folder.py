"""The interface of model folders."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from codiemb_jax.checkpoints.families import Family, get_family
from codiemb_jax.checkpoints.safetensors import LazyArray
from codiemb_jax.config import PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import Params
from codiemb_jax.remote import Location
from codiemb_jax.text.sentence import SentencePrompts


class ModelFolder(ABC):
    """A model on disk. Everything but the weights is read when it is opened."""

    path: Location
    config: dict[str, Any]
    """The original config.json."""
    family: Family
    model_config: Any
    """The model config that the family reads from config.json."""
    prefix: str
    dtypes: dict[str, str]
    files: dict[str, str]
    code: dict[str, str]
    """`prefix`, `dtypes`, `files` and `code` are those of `Blueprint`."""
    stored_settings: Mapping[str, Any]
    """The fields in `ENCODING` that the folder specifies."""
    text: PromptSettings | SentencePrompts | None
    """How to tokenize texts, if the folder specifies it."""
    max_tokens: int
    """Maximum number of tokens per text."""

    def _read_config(self) -> None:
        with prefix_errors(self.path):
            self.family = get_family(self.config)
            self.model_config = self.family.read_config(self.config)

    @abstractmethod
    def check(self, abstract: Params) -> None:
        """Compares the names and shapes of the stored weights with those of the model, without reading them.

        Raises:
          UserError: If they differ.
        """

    @abstractmethod
    def load(self, abstract: Params) -> Params:
        """Loads the parameters in the shapes, dtypes and shardings of `abstract`; each device reads its own shards."""

    @abstractmethod
    def stream(self, abstract: Params) -> Params:
        """Returns the parameters as `LazyArray`s, in their stored dtypes."""

    @abstractmethod
    def stream_passthrough(self) -> dict[str, LazyArray]:
        """Returns the weights that the model does not use, by their full names."""


@contextmanager
def prefix_errors(path: Location) -> Iterator[None]:
    """Prefixes the message of a `UserError` with a path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
