"""Tokenizes data files into ArrayRecord datasets, written by a TensorFlow Datasets builder, with an index."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from codiemb_jax.batch import Task
from codiemb_jax.data.store import BUILDER, BUILDER_VERSION, INDEX, Index, PreparedDataset, open_parts
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.text.prompts import EmptyContentError, PromptTokenizer, Tokens
from codiemb_jax.text.records import Record, Triple, read_records

FORMAT_VERSION = 2
"""Part of the fingerprint. Increment it when the stored format changes."""

BATCH_SIZE = 256
"""Number of records tokenized in one call."""

PART_TOKENS = 2**26
"""Datasets are split into parts of about this many tokens.

TensorFlow Datasets keeps a part in memory to reorder it, and needs TensorFlow for parts of more than 1 GB.
"""


def prepare(
    path: Path,
    task: Task,
    tokenizer: PromptTokenizer,
    *,
    query_max_tokens: int,
    passage_max_tokens: int,
    cache: Path,
) -> PreparedDataset:
    """Tokenizes a data file, or reuses the dataset in `cache` if nothing it depends on has changed.

    Several processes may prepare the same file at the same time. Each writes to its own temporary folder, and the first
    to finish moves it into place. Temporary folders are removed after an error.

    Args:
      path: The data file.
      task: The task of the data.
      tokenizer: The tokenizer.
      query_max_tokens: Maximum number of tokens of queries and of texts of STS pairs.
      passage_max_tokens: Maximum number of tokens of passages.
      cache: The folder of all prepared datasets.

    Raises:
      UserError: If lines are invalid (listed by file, line and field), or if the cache cannot be written.
    """
    limits = [query_max_tokens, passage_max_tokens]
    digest = _digest(path)
    dependencies = json.dumps([FORMAT_VERSION, task, limits, tokenizer.fingerprint, digest])
    fingerprint = hashlib.sha256(dependencies.encode()).hexdigest()
    # File systems limit names to 255 bytes, and the name of the temporary folder is longer than this one.
    stem = path.stem.encode()[:100].decode(errors="ignore")
    folder = cache / f"{stem}-{fingerprint[:16]}"
    if not (folder / INDEX).exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # The host and the process id in the name distinguish leftovers of killed processes from folders in use.
            prefix = f".{folder.name}.{socket.gethostname().replace('.', '-')}."
            _remove_leftovers(cache, prefix)
            scratch = tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}.", dir=cache)
        except OSError as error:
            raise UserError(
                f"the cache {cache} cannot be written ({error}); set CODIEMB_JAX_CACHE to another folder"
            ) from error
        with scratch:
            unfinished = Path(scratch.name) / "unfinished"
            try:
                _DatasetWriter(path, task, tokenizer, query_max_tokens, passage_max_tokens).write(unfinished)
                if _digest(path) != digest:
                    raise UserError(f"{path}: changed while it was read; run again")
                _move_into_place(unfinished, folder)
            except OSError as error:
                raise UserError(f"{path}: cannot be prepared in the cache {cache}: {error}") from error
    return PreparedDataset(path, task, folder)


def _move_into_place(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        if (folder / INDEX).exists():
            return  # another process finished first and wrote the same dataset
        shutil.rmtree(folder)  # incomplete without an index
        unfinished.rename(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(cache: Path, prefix: str) -> None:
    """Removes temporary folders that killed processes of this host left for the same dataset."""
    for leftover in cache.iterdir():
        if leftover.name.startswith(prefix):
            process = int(leftover.name.removeprefix(prefix).split(".")[0])
            # A restarted container reuses process ids, so a folder with the current id is also a leftover.
            if process == os.getpid() or not _is_running(process):
                shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _DatasetWriter:
    """Writes the dataset of one file, and collects the index and all problems along the way."""

    def __init__(
        self, path: Path, task: Task, tokenizer: PromptTokenizer, query_max_tokens: int, passage_max_tokens: int
    ):
        self._path = path
        self._task = task
        self._tokenizer = tokenizer
        self._query_max_tokens = query_max_tokens
        self._passage_max_tokens = passage_max_tokens
        self._problems: list[str] = []
        self._line: list[int] = []
        self._score: list[float] = []
        self._positives: list[int] = []
        self._lengths: list[np.ndarray] = []
        self._hashes: list[int] = []

    def write(self, folder: Path) -> None:
        """Writes the dataset and finally its index."""
        examples = self._examples(_with_progress(self._path, read_records(self._path, self._task)))
        for number, first in enumerate(examples):
            _write_part(_take_part(itertools.chain([first], examples)), folder / f"{number:05d}")
        self._build_index(folder).save(folder / INDEX)

    def _examples(self, records: Iterator[Record]) -> Iterator[dict[str, Any]]:
        while batch := list(itertools.islice(records, BATCH_SIZE)):
            queries, passages = self._texts(batch)
            if self._problems:
                continue  # the rest of the file is only checked
            # Both texts of an STS pair are tokenized as queries.
            others = queries if self._task == "sts" else passages
            for record in batch:
                count = len(record.positives) + len(record.negatives)
                yield self._example(record, [next(queries), *itertools.islice(others, count)])
        if self._problems:
            raise UserError(f"texts without a content token:\n{format_problems(self._problems)}")

    def _texts(self, batch: Sequence[Record]) -> tuple[Iterator[Tokens], Iterator[Tokens]]:
        """Returns the tokenized queries and passages of a batch, each in file order."""
        queries: list[tuple[str, Triple]] = []
        passages: list[tuple[str, Triple]] = []
        others = queries if self._task == "sts" else passages
        for record in batch:
            line = f"{self._path}:{record.line}"
            queries.append((f"{line}: query", record.query))
            others += [(f"{line}: positives[{i}]", triple) for i, triple in enumerate(record.positives)]
            others += [(f"{line}: negatives[{i}]", triple) for i, triple in enumerate(record.negatives)]
        tokenizer = self._tokenizer
        return (
            self._tokenize(tokenizer.tokenize_queries, queries, self._query_max_tokens, "query_max_tokens"),
            self._tokenize(tokenizer.tokenize_passages, passages, self._passage_max_tokens, "passage_max_tokens"),
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
            self._problems += error.problems_at([location for location, _ in texts], f"data.{setting}")
            return iter(())

    def _example(self, record: Record, texts: Sequence[Tokens]) -> dict[str, Any]:
        lengths = np.array([text.ids.size for text in texts], np.int32)
        score = 0.0 if record.score is None else record.score
        self._line.append(record.line)
        self._score.append(score)
        self._positives.append(len(record.positives))
        self._lengths.append(lengths)
        self._hashes += [triple.hash() for triple in (*record.positives, *record.negatives)]
        return {
            "line": record.line,
            "tokens": np.concatenate([text.ids for text in texts]),
            "lengths": lengths,
            "content": np.array([text.content_start for text in texts], np.int32),
            "positives": len(record.positives),
            "score": score,
        }

    def _build_index(self, folder: Path) -> Index:
        rows = open_parts(folder)
        row_of_line = {rows[row]["line"]: row for row in range(len(rows))}
        passages = np.array([lengths.size - 1 for lengths in self._lengths], np.int64)
        positives = np.array(self._positives, np.int32)
        return Index(
            position=np.array([row_of_line[line] for line in self._line], np.int64),
            score=np.array(self._score, np.float64),
            query_tokens=np.array([lengths[0] for lengths in self._lengths], np.int32),
            positives=positives,
            negatives=(passages - positives).astype(np.int32),
            passage_offsets=np.concatenate([[0], np.cumsum(passages)]),
            passage_tokens=np.concatenate([lengths[1:] for lengths in self._lengths]),
            passage_hashes=np.array(self._hashes, np.uint64),
        )


def _with_progress(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    """Yields the records and shows a progress bar on stderr if it is a terminal."""
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    console = Console(stderr=True)
    # rich must not redirect stdout because `_write_part` does.
    with Progress(
        console=console,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task(f"tokenizing {escape(path.name)}", total=lines)
        for record in records:
            yield record
            progress.update(bar, completed=record.line)


def _take_part(examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields examples with PART_TOKENS tokens in total and leaves the rest in `examples`."""
    tokens = 0
    for example in examples:
        yield example
        tokens += example["tokens"].size
        if tokens >= PART_TOKENS:
            return


class TokenizedTexts(tfds.core.GeneratorBasedBuilder):
    """TensorFlow Datasets builder of one part of a tokenized file."""

    name = BUILDER
    VERSION = tfds.core.Version(BUILDER_VERSION)

    def __init__(self, examples: Iterable[dict[str, Any]], data_dir: Path):
        self._examples = examples
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        # Encoding as bytes is twice as fast as encoding single elements.
        flat = {"shape": (None,), "dtype": np.int32, "encoding": tfds.features.Encoding.BYTES}
        features = {
            "line": np.int64,
            "tokens": tfds.features.Tensor(**flat),  # query, positives and negatives, concatenated
            "lengths": tfds.features.Tensor(**flat),  # tokens of each text
            "content": tfds.features.Tensor(**flat),  # `content_start` of each text
            "positives": np.int32,
            "score": np.float64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for example in self._examples:
            yield example["line"], example


def _write_part(examples: Iterable[dict[str, Any]], folder: Path) -> None:
    tfds.disable_progress_bar()
    # Hides a message about a download that does not happen.
    with contextlib.redirect_stdout(io.StringIO()):
        TokenizedTexts(examples, folder).download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
