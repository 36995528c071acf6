"""What accelerators can do at most: memory, and rates of computation and transfers."""

from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """The limits of a device. None if unknown."""

    memory: float | None
    """Bytes of device memory that a program can use."""
    flops: float | None = None
    """Operations per second of dense bfloat16 products."""
    memory_bandwidth: float | None = None
    """Bytes per second."""
    link_bandwidth: float | None = None
    """Bytes per second to and from other devices, over all links together."""


CHIPS = {
    "TPU v5 lite": Chip(15.75 * GIB, 197e12, 819e9, 1600e9 / 8),
    "TPU v5": Chip(95.74 * GIB, 459e12, 2765e9, 4800e9 / 8),
    "TPU v6 lite": Chip(31.25 * GIB, 918e12, 1640e9, 3584e9 / 8),
    "NVIDIA A100": Chip(None, 312e12, 1555e9, 600e9),
    "NVIDIA H100": Chip(None, 989e12, 3350e9, 900e9),
    "NVIDIA H200": Chip(None, 989e12, 4800e9, 900e9),
}
"""By the beginning of JAX's `device_kind`. Rates are those of the vendors' pages (cloud.google.com/tpu/docs, and
NVIDIA's data sheets); the memory of a TPU is what its compiler says that it can use."""


def chip_of(device: Any) -> Chip:
    """Returns the limits of a device. The memory of a GPU, or of another unknown device, is what its driver reports."""
    names = [name for name in CHIPS if device.device_kind.startswith(name)]
    chip = CHIPS[max(names, key=len)] if names else Chip(None)
    if chip.memory is None and device.platform != "cpu":
        statistics = device.memory_stats() or {}
        chip = chip._replace(memory=statistics.get("bytes_limit"))
    return chip
