"""Estimates what a training step needs by compiling it, without weights and, for TPUs, without the devices."""

import math
import re
from contextlib import suppress
from dataclasses import dataclass

import jax
import numpy as np

from codiemb_jax.batch import StepTask
from codiemb_jax.config import Settings
from codiemb_jax.data.layout import BatchLayout
from codiemb_jax.models.build import Params
from codiemb_jax.training.chips import Chip
from codiemb_jax.training.collectives import CollectiveBytes, count_collective_bytes
from codiemb_jax.training.flops import count_flops
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.schedule import make_schedule
from codiemb_jax.training.state import HOST_MEMORY, abstract_state

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Shapes:
    """The shapes of the batches of a task."""

    task: StepTask
    layout: BatchLayout
    passages: int
    """Number of passages per example."""
    tokens: int
    """Number of tokens of the global batch, without padding."""

    @property
    def computed_tokens(self) -> int:
        """Number of tokens of the global batch, with padding."""
        return self.layout.devices * self.layout.rows * self.layout.row_length


@dataclass(frozen=True)
class StepEstimate:
    """What a step needs on each device."""

    needed: float
    """Bytes of memory: on TPUs the compiler's peak, elsewhere the sum of arguments, results and temporaries."""
    temporaries: float | None
    """Bytes of all buffers that exist only during the step; None if it does not fit."""
    fits: bool
    flops: float
    """Operations of all matrix products, with padding and recomputation."""
    collective_bytes: int | None
    """Bytes exchanged with other devices; None if the step does not fit, or the compiler cannot show its program."""
    exposed_collective_bytes: int | None
    """Those exchanged while the device computes nothing."""
    seconds: float | None
    """The least time that a step can take; None for an unknown device."""


def state_bytes(settings: Settings, params: Params) -> tuple[int, int]:
    """Returns the bytes of weights and moments in the memory of each device, and in that of its host.

    Args:
      settings: The settings.
      params: Abstract parameters, with shardings.
    """
    optimizer = make_optimizer(settings.optimizer, make_schedule(settings.optimizer, 1))
    state = abstract_state(optimizer, params, settings.optimizer.offload)
    sizes = {True: 0, False: 0}
    for leaf in jax.tree.leaves(state):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        sizes[leaf.sharding.memory_kind == HOST_MEMORY] += size
    return sizes[False], sizes[True]


def device_flops(step: jax.stages.Traced, mesh: jax.sharding.Mesh) -> float:
    """Returns the operations of a traced step on each device of a mesh."""
    return count_flops(step.jaxpr) / mesh.size


def estimate_step(step: jax.stages.Traced, mesh: jax.sharding.Mesh, chip: Chip) -> StepEstimate:
    """Compiles a traced step for the devices of a mesh."""
    flops = device_flops(step, mesh)
    try:
        compiled = step.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_memory(str(error))
        if needed is None:
            raise
        return StepEstimate(needed, None, False, flops, None, None, None)
    memory = compiled.memory_analysis()
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.peak_memory_in_bytes if is_tpu else arguments + results + memory.temp_size_in_bytes
    collectives: CollectiveBytes | None = None
    with suppress(jax.errors.JaxRuntimeError):  # some programs with asynchronous calls cannot be shown
        collectives = count_collective_bytes(compiled.as_text())
    seconds = None
    if chip.flops and chip.memory_bandwidth and chip.link_bandwidth:
        # Every step reads and writes at least the whole state.
        transferred = memory.argument_size_in_bytes + memory.output_size_in_bytes
        sent = collectives.total if collectives else 0
        seconds = max(flops / chip.flops, transferred / chip.memory_bandwidth, sent / chip.link_bandwidth)
    return StepEstimate(
        needed,
        memory.temp_size_in_bytes,
        is_tpu or chip.memory is None or needed <= chip.memory,  # the compiler for TPUs refuses what does not fit
        flops,
        collectives and collectives.total,
        collectives and collectives.exposed,
        seconds,
    )


def needed_memory(error: str) -> float | None:
    """Returns the bytes that a program needs, from the compiler's message that it does not fit; None for others."""
    messages = (
        r"Used {} of [\d.]+[KMGT]? hbm",
        r"total memory required for HLO temporaries \({}\) exceeds available HBM",
    )
    size = r"([\d.]+)([KMGT]?)"
    used = next(filter(None, (re.search(message.format(size), error) for message in messages)), None)
    return float(used[1]) * UNITS[used[2]] if used else None
