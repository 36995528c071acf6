"""A prepared data set: tokens in ArrayRecord, and the index of what can be planned without reading them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from codiemb_jax.batch import Task
from codiemb_jax.errors import UserError, shorten
from codiemb_jax.text.prompts import Tokens

INDEX = "index.npz"
"""Written last: a folder that holds it is complete."""


@dataclass(frozen=True)
class Index:
    """What can be planned without reading a text, in file order."""

    position: np.ndarray
    """int64 [examples]: row of the ArrayRecord data set, because TensorFlow Datasets reorders by key hash"""
    score: np.ndarray
    """float64 [examples]: of an STS pair; 0 for IR"""
    query_tokens: np.ndarray
    """int32 [examples]"""
    positives: np.ndarray
    """int32 [examples]: how many the example has; 1 for STS"""
    negatives: np.ndarray
    """int32 [examples]: likewise; 0 for STS"""
    passage_offsets: np.ndarray
    """int64 [examples + 1]: an example's passages are passage_offsets[i] … passage_offsets[i + 1] - 1"""
    passage_tokens: np.ndarray
    """int32 [passages]: tokens of each; an example's positives, then its negatives"""

    def save(self, path: Path) -> None:
        """Writes the arrays, completely or not at all."""
        unfinished = path.with_name(path.name + ".tmp")
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **asdict(self))
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Index":
        with _reading(path.parent), np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


class PreparedDataSet:
    """A tokenized file.  Pickles as its paths; what it reads from is opened on first use."""

    def __init__(self, path: Path, task: Task, folder: Path):
        """`path` is the file it was made of, `folder` the complete folder in the cache."""
        self.path = path
        self.task = task
        self.folder = folder
        self.index = Index.load(folder / INDEX)

    def __reduce__(self) -> tuple[type["PreparedDataSet"], tuple[Path, Task, Path]]:
        return PreparedDataSet, (self.path, self.task, self.folder)

    def __len__(self) -> int:
        return self.index.position.size

    @cached_property
    def _rows(self) -> Any:
        return open_parts(self.folder)

    def read(self, examples: np.ndarray) -> list[list[Tokens]]:
        """The texts of each of `examples` (indices in file order): query, positives, negatives."""
        with _reading(self.folder):
            rows = self._rows.__getitems__(self.index.position[examples].tolist())
        return [
            [
                Tokens(ids, int(content))
                for ids, content in zip(
                    np.split(row["tokens"], np.cumsum(row["lengths"])[:-1]), row["content"], strict=True
                )
            ]
            for row in rows
        ]

    def scores(self, examples: np.ndarray) -> np.ndarray:
        """Scores of `examples` (indices in file order), float32 [examples]; NaN for IR."""
        if self.task == "ir":
            return np.full(len(examples), np.nan, np.float32)
        return self.index.score[examples].astype(np.float32)


BUILDER, BUILDER_VERSION = "tokenized_texts", "1.0.0"
"""Of the TensorFlow Datasets builder that `prepare` writes with: the folders of each part."""


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """UserError if a prepared data set cannot be read."""
    try:
        yield
    except Exception as error:  # the libraries that read have errors of many kinds
        reason = shorten(" ".join(str(error).split()), 200)
        raise UserError(f"{folder}: the prepared data set is damaged ({reason}); delete the folder") from error


def cache_folder() -> Path:
    """Where prepared data sets are kept: $CODIEMB_JAX_CACHE, or ~/.cache/codiemb_jax."""
    return Path(os.environ.get("CODIEMB_JAX_CACHE") or Path.home() / ".cache" / "codiemb_jax")


def open_parts(folder: Path) -> Any:
    """All parts of a prepared data set as one sequence of examples, for random access."""
    import tensorflow_datasets as tfds  # seconds to load, and planning does without it

    parts = sorted(folder.glob(f"*/{BUILDER}/{BUILDER_VERSION}"))
    return tfds.builder_from_directories(parts).as_data_source(split="train")
