"""Tokenizes lines of a data file into ArrayRecord files, written by a TensorFlow Datasets builder."""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from codiemb_jax.batch import Task
from codiemb_jax.cache import shown
from codiemb_jax.data.store import BUILDER, BUILDER_VERSION, stored_features
from codiemb_jax.files import temporary_path
from codiemb_jax.text.prompts import EmptyContentError, PromptTokenizer, Tokens
from codiemb_jax.text.records import Lines, Record, Triple, read_lines
from codiemb_jax.text.rows import Texts

BATCH_SIZE = 32
"""Number of records tokenized in one call. Larger batches take longer per text."""

PART_TOKENS = 2**24
"""Datasets are split into parts of at most about this many tokens.

TensorFlow Datasets keeps a part in memory to sort it, and needs TensorFlow for parts of more than 1 GB.
"""

Example = dict[str, Any]


@dataclass(frozen=True)
class DataFile:
    """A data file, and how it is tokenized."""

    path: Path
    task: Task
    tokenizer: PromptTokenizer
    query_max_tokens: int
    passage_max_tokens: int


@dataclass
class Outcome:
    """What is known of some lines after they have been tokenized, apart from their tokens."""

    index: dict[str, np.ndarray] | None = None
    """The index of their examples, as `IndexWriter.append` takes it; None if there are no examples, or problems."""
    line_problems: list[str] = field(default_factory=list)
    """Problems of invalid lines."""
    text_problems: list[str] = field(default_factory=list)
    """Problems of texts without a content token."""

    def save(self, path: Path) -> None:
        """Writes the outcome atomically, as several workers may write the same one."""
        unfinished = temporary_path(path)
        problems = {name: np.array(getattr(self, name), np.str_) for name in ("line_problems", "text_problems")}
        with unfinished.open("xb") as file:
            np.savez(file, allow_pickle=False, **problems, **(self.index or {}))
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Outcome":
        with np.load(path, allow_pickle=False) as arrays:
            values = dict(arrays)
        problems = [values.pop(name).tolist() for name in ("line_problems", "text_problems")]
        return cls(values or None, *problems)


class LineTokenizer:
    """Tokenizes lines of a data file, and collects their index and all problems along the way."""

    def __init__(self, file: DataFile):
        self._file = file
        self._name = shown(file.path)
        self._outcome = Outcome()
        self._index: list[dict[str, np.ndarray]] = []

    def examples(self, lines: Lines, check_only: bool = False) -> Iterator[tuple[int, Example]]:
        """Yields the line number and the tokens of each example, until there are problems.

        Args:
          lines: The lines.
          check_only: Only checks that the lines are valid.
        """
        outcome = self._outcome
        records = read_lines(self._file.path, self._file.task, lines, outcome.line_problems)
        while batch := list(itertools.islice(records, BATCH_SIZE)):
            if check_only or outcome.line_problems:
                continue
            queries, passages = self._texts(batch)
            if outcome.text_problems:
                continue  # the rest is tokenized only to find all problems
            # Both texts of an STS pair are tokenized as queries.
            others = queries if self._file.task == "sts" else passages
            texts: list[Tokens] = []
            for record in batch:
                texts += [next(queries), *itertools.islice(others, len(record.passages))]
            yield from self._examples(batch, Texts.join(texts))

    def outcome(self) -> Outcome:
        """Returns the index and the problems of the lines that have been tokenized."""
        outcome = self._outcome
        if self._index and not (outcome.line_problems or outcome.text_problems):
            outcome.index = {name: np.concatenate([part[name] for part in self._index]) for name in self._index[0]}
            passages = outcome.index["positives"] + outcome.index["negatives"]
            outcome.index["passage_offsets"] = np.cumsum(passages, dtype=np.int64)
        return outcome

    def _texts(self, batch: Sequence[Record]) -> tuple[Iterator[Tokens], Iterator[Tokens]]:
        """Returns the tokenized queries and passages of a batch, each in file order."""
        queries: list[tuple[str, Triple]] = []
        passages: list[tuple[str, Triple]] = []
        others = queries if self._file.task == "sts" else passages
        for record in batch:
            line = f"{self._name}:{record.line}"
            queries.append((f"{line}: query", record.query))
            others += [(f"{line}: positives[{i}]", triple) for i, triple in enumerate(record.positives)]
            others += [(f"{line}: negatives[{i}]", triple) for i, triple in enumerate(record.negatives)]
        tokenizer = self._file.tokenizer
        return (
            self._tokenize(tokenizer.tokenize_queries, queries, self._file.query_max_tokens, "query_max_tokens"),
            self._tokenize(tokenizer.tokenize_passages, passages, self._file.passage_max_tokens, "passage_max_tokens"),
        )

    def _tokenize(
        self,
        tokenize: Callable[[Sequence[Triple], int], list[Tokens]],
        texts: Sequence[tuple[str, Triple]],
        max_tokens: int,
        setting: str,
    ) -> Iterator[Tokens]:
        try:
            return iter(tokenize([triple for _, triple in texts], max_tokens))
        except EmptyContentError as error:
            self._outcome.text_problems += error.problems_at([location for location, _ in texts], f"data.{setting}")
            return iter(())

    def _examples(self, batch: Sequence[Record], texts: Texts) -> Iterator[tuple[int, Example]]:
        """Adds the records of a batch to the index, and yields their examples.

        Args:
          batch: The records.
          texts: The query of each record, followed by its passages.
        """
        positives = np.array([len(record.positives) for record in batch], np.int32)
        negatives = np.array([len(record.negatives) for record in batch], np.int32)
        counts = 1 + positives + negatives
        queries = np.cumsum(counts) - counts
        # Passages are tokenized without their task instruction, so it does not distinguish them either.
        hashes = [Triple("", passage.instance, passage.text).hash() for record in batch for passage in record.passages]
        self._index.append({
            "score": np.array([record.score or 0 for record in batch], np.float64),
            "query_tokens": texts.lengths[queries],
            "positives": positives,
            "negatives": negatives,
            "passage_tokens": np.delete(texts.lengths, queries),
            "passage_hashes": np.array(hashes, np.uint64),
        })  # fmt: skip
        # Splitting the arrays of the batch is faster than joining those of each example.
        by_example = (
            np.split(texts.ids, np.cumsum(texts.lengths)[queries[1:] - 1]),
            np.split(texts.lengths, queries[1:]),
            np.split(texts.content_starts, queries[1:]),
        )
        for record, ids, lengths, content_starts in zip(batch, *by_example, strict=True):
            yield record.line, {"tokens": ids, "lengths": lengths, "content_starts": content_starts}


def write_lines(file: DataFile, lines: Lines, folder: Path, check_only: bool = False) -> Outcome:
    """Tokenizes lines of a data file and writes their examples as parts of a dataset, named in the order of the lines.

    Args:
      file: The data file.
      lines: The lines.
      folder: The folder of the dataset.
      check_only: Only checks that the lines are valid, and writes nothing.
    """
    tokenizer = LineTokenizer(file)
    examples = tokenizer.examples(lines, check_only)
    for number, first in enumerate(examples):
        write_part(_take_part(itertools.chain([first], examples)), folder / f"{lines.start:015d}-{number:05d}")
    return tokenizer.outcome()


def _take_part(examples: Iterable[tuple[int, Example]]) -> Iterator[tuple[int, Example]]:
    """Yields examples with PART_TOKENS tokens in total and leaves the rest in `examples`."""
    tokens = 0
    for line, example in examples:
        yield line, example
        tokens += example["tokens"].size
        if tokens >= PART_TOKENS:
            return


class TokenizedTexts(tfds.core.GeneratorBasedBuilder):
    """TensorFlow Datasets builder of one part of a tokenized file.

    Examples are sorted by their keys, which are line numbers, so they are stored in file order.
    """

    name = BUILDER
    VERSION = tfds.core.Version(BUILDER_VERSION)

    def __init__(self, examples: Any, data_dir: Path):
        """Creates the builder.

        Args:
          examples: Pairs of keys and examples, as an iterable or as a transform of Beam.
          data_dir: The folder of the part.
        """
        self._examples = examples
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=stored_features(), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._examples}

    def _generate_examples(self) -> Iterator[tuple[int, Example]]:
        raise NotImplementedError  # `_split_generators` has them already


def write_part(examples: Any, folder: Path, **options: Any) -> None:
    """Writes one part of a dataset.

    Args:
      examples: Pairs of keys and examples, as an iterable or as a transform of Beam.
      folder: The folder of the part.
      **options: More fields of `DownloadConfig`.

    Raises:
      OSError: If the part cannot be written, for example because the disk is full.
    """
    config = tfds.download.DownloadConfig(try_download_gcs=False, **options)
    tfds.disable_progress_bar()
    # Hides a message about a download that does not happen.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            TokenizedTexts(examples, folder).download_and_prepare(download_config=config)
        except RuntimeError as error:
            if "write() failed" not in str(error):
                raise
            raise OSError(str(error)) from error  # ArrayRecord has no type of its own for this
