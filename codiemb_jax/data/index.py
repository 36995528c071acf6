"""The index of a prepared dataset: lengths, counts and scores of all examples, for planning without reading texts.

It is a folder with one .npy file per field, which are mapped into memory, so opening it takes the same time and memory
for any number of examples. Checksums of small blocks are in files of their own. A manifest with totals is written last
and marks the dataset as complete.
"""

import errno
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

import numpy as np

from codiemb_jax.data.column import Column, ColumnWriter
from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import read_json, write_json
from codiemb_jax.text.rows import ragged_ranges

INDEX = "index"
"""Name of the folder of the index."""

MANIFEST = "manifest.json"
COMPLETE = f"{INDEX}/{MANIFEST}"
"""File that is written last."""

DTYPES: dict[str, np.dtype] = {
    "score": np.dtype("<f8"),
    "query_tokens": np.dtype("<i4"),
    "positives": np.dtype("<i4"),
    "negatives": np.dtype("<i4"),
    "passage_offsets": np.dtype("<i8"),
    "passage_tokens": np.dtype("<i4"),
    "passage_hashes": np.dtype("<u8"),
}
"""The dtype of each field of the index."""


Values = Column | np.ndarray
"""A field of the index, in a file or in memory."""


@dataclass(frozen=True)
class Totals:
    """Totals over all examples of a dataset."""

    examples: int
    passages: int
    tokens: int
    """Number of tokens of all texts."""
    longest: int
    """Number of tokens of the longest text."""
    with_negatives: int
    """Number of examples with negatives."""
    full: int
    """Number of texts that have as many tokens as their limit allows, so nearly all of them have been truncated."""
    min_score: float
    max_score: float

    @classmethod
    def read(cls, folder: Path) -> "Totals":
        """Reads the manifest of a prepared dataset.

        Raises:
          UserError: If it is damaged.
        """
        with read_errors(folder):
            values = read_json(folder / INDEX / MANIFEST, dict)
            if set(values) != {field.name for field in fields(cls)}:
                raise ValueError("unknown totals")
            for field in fields(cls):
                value = values[field.name]
                if type(value) is not field.type or not 0 <= value < 2**62 and field.type is int:
                    raise ValueError(f"{field.name}: {value!r}")
            return cls(**values)


def is_complete(folder: Path) -> bool:
    """Whether a prepared dataset has been written completely."""
    return (folder / COMPLETE).exists()


@contextmanager
def read_errors(folder: Path) -> Iterator[None]:
    """Raises `UserError` if a prepared dataset cannot be read."""
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise UserError(f"{folder}: the prepared dataset cannot be read: {error.strerror}") from error
        raise _damaged(folder, error) from error
    except Exception as error:  # the libraries raise many types of errors
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> UserError:
    reason = shorten(" ".join(str(error).split()), 200)
    return UserError(f"{folder}: the prepared dataset is damaged ({reason}); delete the folder")


@dataclass(frozen=True)
class Index:
    """Lengths, counts and scores of all examples, in file order."""

    score: Values
    """float64 [examples]: score of the STS pair; 0 for IR"""
    query_tokens: Values
    """int32 [examples]: number of tokens of the query"""
    positives: Values
    """int32 [examples]: number of positives; 1 for STS"""
    negatives: Values
    """int32 [examples]: number of negatives; 0 for STS"""
    passage_offsets: Values
    """int64 [examples + 1]: example i has passages passage_offsets[i] … passage_offsets[i + 1] - 1"""
    passage_tokens: Values
    """int32 [passages]: number of tokens; the positives of an example come before its negatives"""
    passage_hashes: Values
    """uint64 [passages]: `Triple.hash` of each passage without its task instruction, in the same order"""
    folder: Path = Path()
    """The prepared dataset, for error messages."""

    @classmethod
    def open(cls, folder: Path, totals: Totals) -> "Index":
        """Maps the index of a prepared dataset into memory.

        Checks the dtype, the shape and the size of each file, and the first and the last offset. Everything else,
        checksums included, is checked where it is used, because that would take longer the larger the dataset is.

        Raises:
          UserError: If the index is damaged.
        """
        with read_errors(folder):
            sizes = {"passage_tokens": totals.passages, "passage_hashes": totals.passages}
            sizes["passage_offsets"] = totals.examples + 1
            columns = {
                name: Column(folder / INDEX / f"{name}.npy", dtype, sizes.get(name, totals.examples))
                for name, dtype in DTYPES.items()
            }
            if columns["passage_offsets"][[0, totals.examples]].tolist() != [0, totals.passages]:
                raise ValueError("passage_offsets do not match the number of passages")
        return cls(**columns, folder=folder)

    def __len__(self) -> int:
        return self.query_tokens.size

    def counts(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of positives and negatives of some examples, each int32 [n].

        Raises:
          UserError: If the index is damaged.
        """
        with read_errors(self.folder):
            positives, negatives = self.positives[examples], self.negatives[examples]
            start, stop = self.passage_offsets[examples], self.passage_offsets[examples + 1]
            valid = (positives >= 1) & (negatives >= 0) & (start >= 0) & (stop <= self.passage_tokens.size)
            if not (valid & (stop - start == positives.astype(np.int64) + negatives)).all():
                raise ValueError("numbers of passages do not match their offsets")
        return positives, negatives

    def lengths(self, examples: np.ndarray, passages: np.ndarray, limit: int) -> np.ndarray:
        """Returns the number of tokens of some queries and their passages.

        Args:
          examples: int [n], whose `counts` have been checked.
          passages: int [n, m], indices among the passages of each example; -1 for padding.
          limit: Maximum number of tokens of a text.

        Returns:
          int32 [n, 1 + m]; 0 for padding.

        Raises:
          UserError: If the index is damaged.
        """
        with read_errors(self.folder):
            queries = self.query_tokens[examples]
            tokens = self.passage_tokens[self.passage_offsets[examples][:, None] + np.maximum(passages, 0)]
            lengths = np.concatenate([queries[:, None], tokens], axis=1)
            if not ((lengths >= 1) & (lengths <= limit)).all():
                raise ValueError("lengths of texts are out of range")
        lengths[:, 1:][passages < 0] = 0
        return lengths

    def hashes(self, examples: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Returns the hashes of some passages, uint64 [n, m]; any for padding. See `lengths` for the arguments.

        Raises:
          UserError: If the index is damaged.
        """
        with read_errors(self.folder):
            return self.passage_hashes[self.passage_offsets[examples][:, None] + np.maximum(passages, 0)]

    def positive_hashes(self, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of positives of some examples, int32 [n], and the hashes of all of them, uint64 [sum].

        Raises:
          UserError: If the index is damaged.
        """
        with read_errors(self.folder):
            counts, starts = self.positives[examples], self.passage_offsets[examples]
            return counts, self.passage_hashes[ragged_ranges(starts, counts)]


class IndexWriter:
    """Writes the index piece by piece, so that it never has to be in memory. A context manager."""

    def __init__(self, folder: Path, query_max_tokens: int, passage_max_tokens: int):
        """Creates the files.

        Args:
          folder: The folder of the prepared dataset.
          query_max_tokens: Maximum number of tokens of queries.
          passage_max_tokens: Maximum number of tokens of passages.
        """
        self._folder = folder / INDEX
        self._limits = query_max_tokens, passage_max_tokens
        self._totals = Totals(0, 0, 0, 0, 0, 0, math.inf, -math.inf)
        self._folder.mkdir(parents=True)
        self._stack = ExitStack()
        self._files = {
            name: self._stack.enter_context(ColumnWriter(self._folder / f"{name}.npy", dtype))
            for name, dtype in DTYPES.items()
        }
        self._files["passage_offsets"].write(np.zeros(1))

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends examples.

        Args:
          arrays: Fields of `Index`, where `passage_offsets` are the ends of the passages of each example among those
            that are appended.
        """
        totals, (query_limit, passage_limit) = self._totals, self._limits
        queries, passages = arrays["query_tokens"], arrays["passage_tokens"]
        for name, file in self._files.items():
            file.write(arrays[name] + (totals.passages if name == "passage_offsets" else 0))
        self._totals = Totals(
            examples=totals.examples + queries.size,
            passages=totals.passages + passages.size,
            tokens=totals.tokens + int(queries.sum(dtype=np.int64) + passages.sum(dtype=np.int64)),
            longest=max(totals.longest, int(queries.max()), int(passages.max())),
            with_negatives=totals.with_negatives + int((arrays["negatives"] > 0).sum()),
            full=totals.full + int((queries == query_limit).sum() + (passages == passage_limit).sum()),
            min_score=min(totals.min_score, float(arrays["score"].min())),
            max_score=max(totals.max_score, float(arrays["score"].max())),
        )

    def finish(self) -> None:
        """Closes the files and writes the manifest."""
        self._stack.close()
        write_json(self._folder / MANIFEST, asdict(self._totals))
