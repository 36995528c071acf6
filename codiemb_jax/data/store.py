"""Prepared datasets: tokens in ArrayRecord files, and an index for planning without reading them."""

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
from codiemb_jax.files import local_path
from codiemb_jax.text.prompts import Tokens

INDEX = "index.npz"
"""File name of the index. It is written last, so a folder that contains it is complete."""


@dataclass(frozen=True)
class Index:
    """Lengths, counts and scores of all examples, in file order."""

    position: np.ndarray
    """int64 [examples]: row in the ArrayRecord files, because TensorFlow Datasets reorders examples by key hash"""
    score: np.ndarray
    """float64 [examples]: score of the STS pair; 0 for IR"""
    query_tokens: np.ndarray
    """int32 [examples]: number of tokens of the query"""
    positives: np.ndarray
    """int32 [examples]: number of positives; 1 for STS"""
    negatives: np.ndarray
    """int32 [examples]: number of negatives; 0 for STS"""
    passage_offsets: np.ndarray
    """int64 [examples + 1]: example i has passages passage_offsets[i] … passage_offsets[i + 1] - 1"""
    passage_tokens: np.ndarray
    """int32 [passages]: number of tokens; the positives of an example come before its negatives"""
    passage_hashes: np.ndarray
    """uint64 [passages]: `Triple.hash` of each passage, in the same order"""

    def __len__(self) -> int:
        return self.query_tokens.size

    def save(self, path: Path) -> None:
        """Writes the arrays atomically."""
        unfinished = path.with_name(path.name + ".tmp")
        with unfinished.open("wb") as file:
            np.savez(file, allow_pickle=False, **asdict(self))
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Index":
        with _read_errors(path.parent), np.load(path, allow_pickle=False) as arrays:
            return cls(**{field.name: arrays[field.name] for field in fields(cls)})


class PreparedDataset:
    """A tokenized data file. Pickles as its paths and opens its files on first use."""

    def __init__(self, path: Path, task: Task, folder: Path):
        """Loads the index.

        Args:
          path: The original data file.
          task: The task of the data.
          folder: The complete folder in the cache.

        Raises:
          UserError: If the index is damaged.
        """
        self.path = path
        self.task = task
        self.folder = folder
        self.index = Index.load(folder / INDEX)

    def __reduce__(self) -> tuple[type["PreparedDataset"], tuple[Path, Task, Path]]:
        return PreparedDataset, (self.path, self.task, self.folder)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def _rows(self) -> Any:
        return open_parts(self.folder)

    def read(self, examples: np.ndarray) -> list[list[Tokens]]:
        """Reads the texts (query, positives, negatives) of each of `examples`, given as indices in file order."""
        with _read_errors(self.folder):
            rows = self._rows.__getitems__(self.index.position[examples].tolist())
        return [
            [
                Tokens(ids, int(content_start))
                for ids, content_start in zip(
                    np.split(row["tokens"], np.cumsum(row["lengths"])[:-1]), row["content"], strict=True
                )
            ]
            for row in rows
        ]

    def scores(self, examples: np.ndarray) -> np.ndarray:
        """Returns the scores of `examples`, given as indices in file order, as float32 [examples]; NaN for IR."""
        if self.task == "ir":
            return np.full(len(examples), np.nan, np.float32)
        return self.index.score[examples].astype(np.float32)


BUILDER, BUILDER_VERSION = "tokenized_texts", "1.0.0"
"""Name and version of the TensorFlow Datasets builder in `prepare`, which names the folders of each part."""


@contextmanager
def _read_errors(folder: Path) -> Iterator[None]:
    """Raises `UserError` if a prepared dataset cannot be read."""
    try:
        yield
    except Exception as error:  # the libraries raise many types of errors
        reason = shorten(" ".join(str(error).split()), 200)
        raise UserError(f"{folder}: the prepared dataset is damaged ({reason}); delete the folder") from error


def cache_folder() -> Path:
    """Returns the cache folder, for prepared datasets: $CODIEMB_JAX_CACHE, or ~/.cache/codiemb_jax.

    Raises:
      UserError: If it is not a local path, or there is no home directory.
    """
    try:
        return local_path(os.environ.get("CODIEMB_JAX_CACHE") or "~/.cache/codiemb_jax").absolute()
    except ValueError as error:
        raise UserError(f"CODIEMB_JAX_CACHE: {error}; set it to the folder of the cache") from error


def open_parts(folder: Path) -> Any:
    """Opens all parts of a prepared dataset as one random-access sequence of examples."""
    import tensorflow_datasets as tfds  # slow to import, and not needed for planning

    parts = sorted(folder.glob(f"*/{BUILDER}/{BUILDER_VERSION}"))
    return tfds.builder_from_directories(parts).as_data_source(split="train")
