"""Runs a program in a process of its own and measures it."""

import os
import subprocess
import time
from collections.abc import Sequence
from typing import Any, NamedTuple


class Usage(NamedTuple):
    """What a program has used."""

    seconds: float
    processor_seconds: float
    peak_mb: float


def run_measured(command: Sequence[Any]) -> Usage:
    """Runs a command, start-up included.

    Raises:
      CalledProcessError: If it fails.
    """
    start = time.perf_counter()
    # A child of its own, whose peak is not that of an earlier one.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.perf_counter() - start
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
