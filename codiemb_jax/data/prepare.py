"""Records -> tokenized ArrayRecord data set (a TensorFlow Datasets builder) and its index."""

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
from codiemb_jax.data.store import BUILDER, BUILDER_VERSION, INDEX, Index, PreparedDataSet, open_parts
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.text.prompts import EmptyContent, PromptTokenizer, Tokens
from codiemb_jax.text.records import Record, Triple, read_records

FORMAT_VERSION = 1
"""Part of the fingerprint: raise it when what is stored changes."""

BATCH = 256
"""Records tokenized in one call."""

PART_TOKENS = 2**26
"""Tokens after which the next part of a data set is begun.

TensorFlow Datasets holds a part in memory to reorder it, and beyond 1 GB would need TensorFlow.
"""


def prepare(
    path: Path,
    task: Task,
    tokenizer: PromptTokenizer,
    *,
    query_max_tokens: int,
    passage_max_tokens: int,
    cache: Path,
) -> PreparedDataSet:
    """The tokenized data set of a file: taken from `cache` if nothing it depends on has changed, else made.

    Processes may prepare the same file at the same time: each writes into a folder of its own, and the first
    to be done moves it into place.  After an error nothing half-written stays.

    Raises:
      UserError: lines that cannot be used, listed by file, line and field; or a cache that cannot be written.
    """
    limits = [query_max_tokens, passage_max_tokens]
    digest = _digest(path)
    depends_on = json.dumps([FORMAT_VERSION, task, limits, tokenizer.fingerprint, digest])
    fingerprint = hashlib.sha256(depends_on.encode()).hexdigest()
    # File systems allow names of 255 bytes, and the working folder's name is longer than this one.
    stem = path.stem.encode()[:100].decode(errors="ignore")
    folder = cache / f"{stem}-{fingerprint[:16]}"
    if not (folder / INDEX).exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Host and process in the name tell the leftovers of a killed process from the work of a live one.
            prefix = f".{folder.name}.{socket.gethostname().replace('.', '-')}."
            _remove_leftovers(cache, prefix)
            scratch = tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}.", dir=cache)
        except OSError as error:
            raise UserError(
                f"the cache {cache} cannot be written ({error}); set CODIEMB_JAX_CACHE to another folder"
            ) from error
        with scratch:
            made = Path(scratch.name) / "made"
            try:
                _Preparation(path, task, tokenizer, query_max_tokens, passage_max_tokens).write(made)
                if _digest(path) != digest:
                    raise UserError(f"{path}: has changed while it was read; start again")
                _move_into_place(made, folder)
            except OSError as error:
                raise UserError(f"{path}: cannot be prepared in the cache {cache}: {error}") from error
    return PreparedDataSet(path, task, folder)


def _move_into_place(made: Path, folder: Path) -> None:
    try:
        made.rename(folder)
    except OSError:
        if (folder / INDEX).exists():
            return  # another process was faster, and made the same
        shutil.rmtree(folder)  # without an index it is of no use to anyone
        made.rename(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_leftovers(cache: Path, prefix: str) -> None:
    """Removes the working folders that killed processes of this host left for the same data set."""
    for leftover in cache.iterdir():
        if leftover.name.startswith(prefix):
            process = int(leftover.name.removeprefix(prefix).split(".")[0])
            # A restarted container has the same process ids: a folder of our own id is no one's, either.
            if process == os.getpid() or not _alive(process):
                shutil.rmtree(leftover, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _Preparation:
    """One file on its way into a folder; gathers index and problems while examples stream through."""

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

    def write(self, folder: Path) -> None:
        """Makes the data set and, last, its index."""
        examples = self._examples(_with_progress(self._path, read_records(self._path, self._task)))
        for number, first in enumerate(examples):
            _write_part(_until_full(itertools.chain([first], examples)), folder / f"{number:05d}")
        self._index(folder).save(folder / INDEX)

    def _examples(self, records: Iterator[Record]) -> Iterator[dict[str, Any]]:
        while batch := list(itertools.islice(records, BATCH)):
            queries, passages = self._texts(batch)
            if self._problems:
                continue  # only looks for more of them
            # Both texts of an STS pair are queries.
            others = queries if self._task == "sts" else passages
            for record in batch:
                count = len(record.positives) + len(record.negatives)
                yield self._example(record, [next(queries), *itertools.islice(others, count)])
        if self._problems:
            raise UserError(f"texts without a content token:\n{format_problems(self._problems)}")

    def _texts(self, batch: Sequence[Record]) -> tuple[Iterator[Tokens], Iterator[Tokens]]:
        """The batch's queries and passages, each in the order of their lines."""
        queries: list[tuple[str, Triple]] = []
        passages: list[tuple[str, Triple]] = []
        others = queries if self._task == "sts" else passages
        for record in batch:
            place = f"{self._path}:{record.line}"
            queries.append((f"{place}: query", record.query))
            others += [(f"{place}: positives[{i}]", triple) for i, triple in enumerate(record.positives)]
            others += [(f"{place}: negatives[{i}]", triple) for i, triple in enumerate(record.negatives)]
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
        except EmptyContent as empty:
            self._problems += empty.at([place for place, _ in texts], f"data.{setting}")
            return iter(())

    def _example(self, record: Record, texts: Sequence[Tokens]) -> dict[str, Any]:
        lengths = np.array([text.ids.size for text in texts], np.int32)
        score = 0.0 if record.score is None else record.score
        self._line.append(record.line)
        self._score.append(score)
        self._positives.append(len(record.positives))
        self._lengths.append(lengths)
        return {
            "line": record.line,
            "tokens": np.concatenate([text.ids for text in texts]),
            "lengths": lengths,
            "content": np.array([text.content for text in texts], np.int32),
            "positives": len(record.positives),
            "score": score,
        }

    def _index(self, folder: Path) -> Index:
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
        )


def _with_progress(path: Path, records: Iterator[Record]) -> Iterator[Record]:
    """The records; a bar on stderr, where it is a terminal, shows how far through the file they are."""
    with path.open("rb") as file:
        lines = sum(1 for _ in file)
    console = Console(stderr=True)
    # What is printed is left alone, for `_write_part` redirects it, too.
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


def _until_full(examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Takes examples until they hold PART_TOKENS; the rest stays in `examples`."""
    tokens = 0
    for example in examples:
        yield example
        tokens += example["tokens"].size
        if tokens >= PART_TOKENS:
            return


class TokenizedTexts(tfds.core.GeneratorBasedBuilder):
    """One part of a tokenized file, as a TensorFlow Datasets builder."""

    name = BUILDER
    VERSION = tfds.core.Version(BUILDER_VERSION)

    def __init__(self, examples: Iterable[dict[str, Any]], data_dir: Path):
        self._stream = examples
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        # Written as bytes twice as fast as one by one.
        flat = {"shape": (None,), "dtype": np.int32, "encoding": tfds.features.Encoding.BYTES}
        features = {
            "line": np.int64,
            "tokens": tfds.features.Tensor(**flat),  # query, positives, negatives, one after the other
            "lengths": tfds.features.Tensor(**flat),  # of each text
            "content": tfds.features.Tensor(**flat),  # of each text
            "positives": np.int32,
            "score": np.float64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for example in self._stream:
            yield example["line"], example


def _write_part(examples: Iterable[dict[str, Any]], folder: Path) -> None:
    tfds.disable_progress_bar()
    # It prints that it downloads, which it does not.
    with contextlib.redirect_stdout(io.StringIO()):
        TokenizedTexts(examples, folder).download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
