"""Prepares data files: tokenizes them into a cache of ArrayRecord datasets with an index."""

import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Generator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any

from etils import epath
from filelock import FileLock
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from codiemb_jax.batch import Task
from codiemb_jax.cache import shown
from codiemb_jax.data.digest import file_digest
from codiemb_jax.data.index import COMPLETE, IndexWriter, is_complete
from codiemb_jax.data.processes import available_processors, write_in_processes
from codiemb_jax.data.store import PreparedDataset
from codiemb_jax.data.tokenize import DataFile, Outcome, write_lines
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.remote import download, exists, list_files, upload_folder
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import Lines, check_records, split_lines

FORMAT_VERSION = 5
"""Part of the fingerprint. Increment it when the stored format changes."""

PROCESS_BYTES = 2**23
"""Smaller files are tokenized in this process; larger ones by one process per this many bytes, if there are so many
processors."""

MIN_PART_BYTES, MAX_PART_BYTES = 2**21, 2**25
"""Bounds of the number of bytes that a process tokenizes at a time, and that become one part of the dataset."""

LOCK = "lock"
"""Name of the file in a temporary folder that its process keeps locked."""


def prepare(
    path: Path,
    task: Task,
    tokenizer: PromptTokenizer,
    *,
    query_max_tokens: int,
    passage_max_tokens: int,
    cache: Path,
    shared: epath.Path | None = None,
    beam_runner: str | None = None,
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
      shared: A remote folder of prepared datasets: the dataset is copied from there if it is there, otherwise to there.
      beam_runner: Name of the runner with which Apache Beam tokenizes; None for processes on this machine.

    Raises:
      UserError: If lines are invalid (listed by file, line and field), or if the cache cannot be written.
    """
    limits = [query_max_tokens, passage_max_tokens]
    try:
        digest = file_digest(path, cache)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    dependencies = json.dumps([FORMAT_VERSION, task, limits, tokenizer.fingerprint, digest])
    fingerprint = hashlib.sha256(dependencies.encode()).hexdigest()
    # File systems limit names to 255 bytes, and the name of the temporary folder is longer than this one.
    stem = path.stem.encode()[:100].decode(errors="ignore")
    folder = cache / f"{stem}-{fingerprint[:16]}"
    try:
        complete = is_complete(folder)
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be read ({error.strerror}); set CODIEMB_JAX_CACHE to another folder"
        ) from error
    damaged = False
    if not complete:
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise UserError(f"{folder}: is not a folder; move it away")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Other hosts may share the cache, but not all file systems support locks across hosts.
            prefix = f".{folder.name}.{socket.gethostname().replace('.', '-')}."
            _remove_leftovers(cache, prefix)
            scratch = tempfile.TemporaryDirectory(prefix=prefix, dir=cache)
            lock = _lock(Path(scratch.name))
        except OSError as error:
            raise UserError(
                f"the cache {cache} cannot be written ({error}); set CODIEMB_JAX_CACHE to another folder"
            ) from error
        with scratch, lock:
            unfinished = Path(scratch.name) / "unfinished"
            try:
                copied = shared is not None and _copy_shared(path, task, shared / folder.name, unfinished)
                if not copied:
                    damaged = unfinished.exists()
                    if damaged:
                        shutil.rmtree(unfinished)
                    file = DataFile(path, task, tokenizer, query_max_tokens, passage_max_tokens)
                    write_dataset(file, unfinished, beam_runner)
                    if file_digest(path, cache) != digest:
                        raise UserError(f"{path}: changed while it was read; run again")
                _move_into_place(unfinished, folder)
            except OSError as error:
                raise UserError(f"{shown(path)}: cannot be prepared in the cache {cache}: {error}") from error
    dataset = PreparedDataset(path, task, folder)
    if shared is not None:
        _share(folder, shared / folder.name, damaged)
    return dataset


def _copy_shared(path: Path, task: Task, remote: epath.Path, unfinished: Path) -> bool:
    """Copies a prepared dataset from a remote folder. Returns whether it was there, and undamaged.

    If it was damaged, or changed while it was read, at least the folder `unfinished` is left.
    """
    found = list_files(remote)
    if COMPLETE not in found:
        return False
    unfinished.mkdir()
    try:
        download(remote, found, unfinished)
        PreparedDataset(path, task, unfinished)
    except UserError as error:
        print(f"note: the shared dataset is not used, but prepared again: {error}", file=sys.stderr)
        return False
    return True


def _share(folder: Path, remote: epath.Path, replace: bool) -> None:
    """Copies a prepared dataset to a remote folder, if it is not there. Without permission to do so, prints a note.

    Args:
      folder: The folder of the dataset.
      remote: The remote folder.
      replace: Whether what is there is damaged.
    """
    try:
        # Files that are there are not replaced otherwise, because another machine may be reading them.
        if replace or not exists(remote / COMPLETE):
            upload_folder(folder, remote, last=[COMPLETE], replace=replace)
    except UserError as error:
        print(f"note: the prepared dataset is not shared: {error}", file=sys.stderr)


def _move_into_place(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if is_complete(folder):
            return  # another process finished first and wrote the same dataset
        folder.rename(unfinished.with_name("incomplete"))  # deleted with the temporary folder
        unfinished.rename(folder)


def _lock(folder: Path) -> AbstractContextManager[Any]:
    """Locks a temporary folder, if its file system supports that."""
    try:
        return FileLock(folder / LOCK).acquire()
    except (OSError, NotImplementedError):
        (folder / LOCK).unlink(missing_ok=True)
        return nullcontext()


def _remove_leftovers(cache: Path, prefix: str) -> None:
    """Removes temporary folders for the same dataset that killed processes of this host left: their lock is free."""
    for leftover in cache.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError, NotImplementedError):  # in use, or of another user
            if (leftover / LOCK).is_file() and not leftover.is_symlink():
                with FileLock(leftover / LOCK).acquire(blocking=False):
                    shutil.rmtree(leftover, ignore_errors=True)


def write_dataset(file: DataFile, folder: Path, beam_runner: str | None) -> None:
    """Writes the dataset of one file and finally its index. See `prepare`.

    Raises:
      UserError: If lines are invalid, or texts have no content token.
    """
    line_problems: list[str] = []
    text_problems: list[str] = []
    empty = True
    limits = (file.query_max_tokens, file.query_max_tokens if file.task == "sts" else file.passage_max_tokens)
    with IndexWriter(folder, *limits) as index:
        with closing(_write_parts(file, folder, beam_runner)) as outcomes:
            for outcome in outcomes:
                line_problems += outcome.line_problems
                text_problems += outcome.text_problems
                if outcome.index is not None:
                    index.append(outcome.index)
                    empty = False
        check_records(file.path, file.task, empty and not text_problems, line_problems)
        if text_problems:
            raise UserError(f"texts without a content token:\n{format_problems(text_problems)}")
        index.finish()


def _write_parts(file: DataFile, folder: Path, beam_runner: str | None) -> Generator[Outcome]:
    """Writes the parts of a dataset in file order, and shows a progress bar on stderr if it is a terminal."""
    size = file.path.stat().st_size
    parts = list(split_lines(file.path, min(max(size // 64, MIN_PART_BYTES), MAX_PART_BYTES)))
    workers = min(available_processors(), size // PROCESS_BYTES)
    if beam_runner is not None:
        from codiemb_jax.data.beam import write_with_beam  # an optional dependency

        write = write_with_beam(file, parts, folder, beam_runner)
    elif workers > 1:
        write = write_in_processes(file, parts, folder, workers)
    else:
        write = _write_here(file, parts, folder)
    console = Console(stderr=True)
    # rich must not redirect stdout because `write_part` does.
    with (
        closing(write),
        Progress(
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not console.is_terminal,
        ) as progress,
    ):
        bar = progress.add_task(f"tokenizing {escape(file.path.name)}", total=size)
        for lines, outcome in zip(parts, write, strict=True):
            yield outcome
            progress.update(bar, completed=lines.stop)


def _write_here(file: DataFile, parts: list[Lines], folder: Path) -> Generator[Outcome]:
    check_only = False
    for lines in parts:
        outcome = write_lines(file, lines, folder, check_only)
        check_only = check_only or bool(outcome.line_problems)
        yield outcome
