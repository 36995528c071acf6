"""Prepared datasets: tokens in ArrayRecord files, and an index for planning without reading them."""

import resource
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from codiemb_jax.batch import Task
from codiemb_jax.data.index import Index, Totals, read_errors
from codiemb_jax.files import read_json
from codiemb_jax.text.rows import Texts, ragged_ranges

BUILDER, BUILDER_VERSION = "tokenized_texts", "2.0.0"
"""Name and version of the TensorFlow Datasets builder in `records`, which names the folders of each part."""
RECORD_FILES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
"""How the builder names files of records."""


class PreparedDataset:
    """A tokenized data file. Pickles as its paths and opens its files on first use."""

    def __init__(self, path: Path, task: Task, folder: Path):
        """Opens the index.

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
        self.totals = Totals.read(folder)
        self.index = Index.open(folder, self.totals)

    def __reduce__(self) -> tuple[type["PreparedDataset"], tuple[Path, Task, Path]]:
        return PreparedDataset, (self.path, self.task, self.folder)

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def _records(self) -> Any:
        return open_parts(self.folder)

    def read(self, examples: np.ndarray) -> tuple[Texts, np.ndarray]:
        """Reads all texts of some examples.

        Args:
          examples: int [n], indices in file order.

        Returns:
          The texts: the query, the positives and the negatives of each example; and the index of the query of each
          example among them, int64 [n].

        Raises:
          UserError: If the dataset is damaged, or its texts do not have the lengths in the index.
        """
        index = self.index
        with read_errors(self.folder):
            starts = index.passage_offsets[examples]
            counts = index.passage_offsets[examples + 1] - starts
            if not ((starts >= 0) & (counts >= 1) & (starts + counts <= self.totals.passages)).all():
                raise ValueError("passage_offsets are out of range")
        queries = np.cumsum(counts + 1) - (counts + 1)
        is_passage = np.ones(int(counts.sum()) + counts.size, bool)
        is_passage[queries] = False
        expected = np.empty(is_passage.size, np.int32)
        rows = ragged_ranges(starts, counts)
        with read_errors(self.folder):
            expected[queries] = index.query_tokens[examples]
            expected[is_passage] = index.passage_tokens[rows]
            records = self._records.__getitems__(examples.tolist())
            ids, lengths, content_starts = (
                np.concatenate([np.empty(0, np.int32), *(record[name] for record in records)])
                for name in ("tokens", "lengths", "content_starts")
            )
            if not np.array_equal(lengths, expected) or ids.size != lengths.sum():
                raise ValueError("the lengths of texts differ from the index")
            if content_starts.size != lengths.size or not ((content_starts >= 0) & (content_starts < lengths)).all():
                raise ValueError("content_starts are out of range")
        return Texts(ids, lengths, content_starts), queries

    def scores(self, examples: np.ndarray) -> np.ndarray:
        """Returns the scores of `examples`, given as indices in file order, as float32 [examples]; NaN for IR."""
        if self.task == "ir":
            return np.full(len(examples), np.nan, np.float32)
        with read_errors(self.folder):
            scores = self.index.score[examples]
            if not ((scores >= self.totals.min_score) & (scores <= self.totals.max_score)).all():
                raise ValueError("scores are out of range")
        return scores.astype(np.float32)


def _raise_file_limit() -> None:
    """Allows as many open files as the system does: readers keep the file of each part open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS allows fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stored_features() -> Any:
    """Returns the features of an example as TensorFlow Datasets stores them."""
    import tensorflow_datasets as tfds  # slow to import, and not needed for planning

    # Encoding as bytes is twice as fast as encoding single elements.
    flat = {"shape": (None,), "dtype": np.int32, "encoding": tfds.features.Encoding.BYTES}
    return tfds.features.FeaturesDict({
        "tokens": tfds.features.Tensor(**flat),  # query, positives and negatives, concatenated
        "lengths": tfds.features.Tensor(**flat),  # tokens of each text
        "content_starts": tfds.features.Tensor(**flat),  # of each text
    })  # fmt: skip


def open_parts(folder: Path) -> Any:
    """Opens all parts of a prepared dataset as one random-access sequence of examples, in file order."""
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import MessageToDict

    _raise_file_limit()
    parts = sorted(folder.glob(f"*/{BUILDER}/{BUILDER_VERSION}"))
    expected = MessageToDict(stored_features().to_proto())
    for part in parts:
        # TensorFlow Datasets would import whatever classes this file names.
        if read_json(part / "features.json", dict) != expected:
            raise ValueError("features.json has unknown features")
        # Names in this file lead to the records.
        info = read_json(part / "dataset_info.json", dict)
        splits = [(split.get("name"), split.get("filepathTemplate")) for split in info.get("splits", [])]
        if (info.get("name"), info.get("fileFormat"), splits) != (BUILDER, "array_record", [("train", RECORD_FILES)]):
            raise ValueError("dataset_info.json has unknown names")
        if not all(path.is_file() and not path.is_symlink() for path in part.iterdir()):
            raise ValueError(f"{part.parent.parent.name}: contains something that is not a file")
    return tfds.builder_from_directories(parts).as_data_source(split="train")
