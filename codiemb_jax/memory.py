"""Memory allocation on CPUs."""

import ctypes

import jax

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory, if JAX computes on a CPU.

    On CPUs, XLA allocates the temporaries of every step anew. By default, glibc returns large blocks to the system when
    they are freed, so that in every step the system maps and clears them again, which takes about 5 % of its time. The
    peak of the memory in use does not change. Other C libraries are left as they are.
    """
    if jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)  # allocate large blocks from the heap, too
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)  # the heap of the other arenas has no room for large blocks
