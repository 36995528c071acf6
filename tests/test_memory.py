"""Tests that freed memory is used again."""

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from codiemb_jax.memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 200 * 2**20
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults[1:])
"""


def page_faults(mode: str) -> list[int]:
    """Returns the page faults of writing to a block of memory for the second and the third time."""
    command = [sys.executable, "-c", PROGRAM, mode]
    output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    return [int(number) for number in output.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is the C library of Linux")
def test_freed_memory_is_not_mapped_again():
    assert min(page_faults("default")) > 1000  # otherwise the test would prove nothing
    assert max(page_faults("keep")) < 100
