"""Plan -> this host's rows -> global arrays."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import grain
import jax
import numpy as np

from codiemb_jax.batch import Batch
from codiemb_jax.data.sampler import Plan, StepPlan
from codiemb_jax.data.store import PreparedDataSet
from codiemb_jax.text.prompts import Tokens
from codiemb_jax.text.rows import pad

THREADS = 2
BATCHES_AHEAD = 4


class StepSource:
    """Random access to this host's part of every step's batch: a data source for grain.

    A host reads the examples of its own devices only.
    """

    def __init__(self, plan: Plan, data_sets: Sequence[PreparedDataSet], sharding: jax.sharding.Sharding, steps: int):
        self.plan, self.data_sets, self.sharding, self.steps = plan, data_sets, sharding, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> tuple[StepPlan, list[Batch]]:
        """A step's plan, and a batch for each of this host's parts of it, in the order of `own_parts`."""
        plan = self.plan.step(number)
        return plan, [self._batch(plan, *part) for part in own_parts(self.sharding, plan.examples.size)]

    def _batch(self, plan: StepPlan, start: int, stop: int) -> Batch:
        """The examples start … stop - 1 of a step, which lie on one device."""
        data_set = self.data_sets[plan.sources[start * len(plan.sources) // plan.examples.size]]
        examples, chosen = plan.examples[start:stop], plan.passages[start:stop]
        texts = data_set.read(examples)
        # Text 0 of an example is its query, so its passage j is text j + 1.
        laid_out: list[Tokens | None] = [own[0] for own in texts]
        laid_out += [None if j < 0 else own[j + 1] for own, row in zip(texts, chosen, strict=True) for j in row]
        count, width = chosen.shape
        numbers = np.arange(start, stop, dtype=np.int32)[:, None] * (width + 1) + np.arange(width + 1, dtype=np.int32)
        text_ids = np.concatenate([numbers[:, 0], np.where(chosen < 0, -1, numbers[:, 1:]).ravel()])
        places = np.arange(count, count * (width + 1), dtype=np.int32).reshape(count, width)
        return Batch(
            rows=pad(laid_out, plan.row_length),
            text_ids=text_ids[:, None],
            queries=np.arange(count, dtype=np.int32),
            passages=np.where(chosen < 0, np.int32(-1), places),
            scores=data_set.scores(examples),
        )


def own_parts(sharding: jax.sharding.Sharding, examples: int) -> list[tuple[int, int]]:
    """The parts (start, stop) of the global batch's examples that this host's devices hold, in order."""
    indices = sharding.addressable_devices_indices_map((examples,)).values()
    return sorted({index[0].indices(examples)[:2] for index in indices if index is not None})


def to_global(parts: Sequence[np.ndarray], starts: Sequence[int], shards: int, sharding: Any) -> jax.Array:
    """This host's parts of an array, one per device that holds different rows, as its share of the global array.

    starts: which of the `shards` parts each one is.
    """
    size = parts[0].shape[0]
    blocks = dict(zip(starts, parts, strict=True))

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # it would be for a device of another host
        return blocks[(index[0].start or 0) // size]

    return jax.make_array_from_callback((shards * size, *parts[0].shape[1:]), sharding, block)


def batches(
    plan: Plan, data_sets: Sequence[PreparedDataSet], sharding: jax.sharding.Sharding, *, start: int, stop: int
) -> Iterator[tuple[StepPlan, Batch]]:
    """Steps start … stop - 1, read ahead in threads, as global arrays laid out by `sharding`."""
    source = StepSource(plan, data_sets, sharding, stop)
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    for step_plan, parts in grain.MapDataset.source(source)[start:].to_iter_dataset(options):
        count = parts[0].queries.size
        starts = [first // count for first, _ in own_parts(sharding, step_plan.examples.size)]
        place = partial(to_global, starts=starts, shards=step_plan.examples.size // count, sharding=sharding)
        yield step_plan, jax.tree.map(lambda *leaves, place=place: place(leaves), *parts)
