"""Runs a program in a process of its own and measures it."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

# The unit of ru_maxrss: kilobytes on Linux, bytes on macOS.
_UNITS_PER_MB = 1 << 20 if sys.platform == "darwin" else 1 << 10


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
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / _UNITS_PER_MB)
