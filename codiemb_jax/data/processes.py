"""Tokenizes parts of a data file in several processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from codiemb_jax.cache import shown
from codiemb_jax.data.tokenize import DataFile, Outcome, write_lines
from codiemb_jax.errors import UserError
from codiemb_jax.text.records import Lines

_file: DataFile
"""The file of this worker process."""


def available_processors() -> int:
    """Returns the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_in_processes(file: DataFile, parts: Iterable[Lines], folder: Path, workers: int) -> Generator[Outcome]:
    """Tokenizes parts of a data file and writes their examples, several parts at a time.

    Processes are more efficient than the threads of the tokenizers library, because parsing and writing are in Python.
    They are spawned, because a fork of a process that runs JAX may hang. They end with this process in any case.

    Args:
      file: The data file.
      parts: The parts.
      folder: The folder of the dataset.
      workers: Number of processes.

    Yields:
      The outcome of each part, in order. Once a line is invalid, the parts that follow are only checked.

    Raises:
      UserError: If a process was killed.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    # Not more processes than are needed are started, so `workers` is only an upper limit.
    executor = ProcessPoolExecutor(workers, context, _start_worker, (file, receiver))
    pending: deque[Future[Outcome]] = deque()
    check_only = False
    try:
        remaining = iter(parts)
        while True:
            while len(pending) < 2 * workers and (lines := next(remaining, None)) is not None:
                pending.append(executor.submit(_write_lines, lines, folder, check_only))
            if not pending:
                return
            outcome = pending.popleft().result()
            check_only = check_only or bool(outcome.line_problems)
            yield outcome
    except BrokenProcessPool as error:
        raise UserError(
            f"{shown(file.path)}: a process that tokenizes it ended, perhaps because memory ran out; run again with "
            "more memory, or with fewer processors (taskset)"
        ) from error
    finally:
        sender.close()  # ends the processes at once
        executor.shutdown(wait=True, cancel_futures=True)
        receiver.close()


def _start_worker(file: DataFile, receiver: Connection) -> None:
    global _file
    _file = file
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles interrupts
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    threading.Thread(target=_exit_with_parent, args=(receiver,), daemon=True).start()


def _exit_with_parent(receiver: Connection) -> None:
    """Ends this process when the other end of the pipe is closed, by the main process or because that was killed."""
    try:
        receiver.recv()
    except (EOFError, OSError):
        os._exit(1)


def _write_lines(lines: Lines, folder: Path, check_only: bool) -> Outcome:
    return write_lines(_file, lines, folder, check_only)
