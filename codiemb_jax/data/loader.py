"""Loads the planned batches as global arrays."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import grain
import jax
import numpy as np

from codiemb_jax.batch import Batch, PassageTexts
from codiemb_jax.data.sampler import Plan, StepPlan
from codiemb_jax.data.store import PreparedDataset
from codiemb_jax.sharding import place
from codiemb_jax.text.rows import lay_out

NUM_THREADS = 2
PREFETCH_BATCHES = 4


class StepSource:
    """Grain data source with the part of each batch that belongs to the devices of this host.

    Each host reads only the examples of its own devices.
    """

    def __init__(self, plan: Plan, datasets: Sequence[PreparedDataset], sharding: jax.sharding.Sharding, steps: int):
        self.plan, self.datasets, self.sharding, self.steps = plan, datasets, sharding, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> tuple[StepPlan, list[Batch]]:
        """Returns the plan of a step and one batch per range of `local_ranges`, in the same order."""
        plan = self.plan.step(number)
        return plan, [self._batch(plan, *part) for part in local_ranges(self.sharding, plan.examples.size)]

    def _batch(self, plan: StepPlan, start: int, stop: int) -> Batch:
        """Loads examples start … stop - 1 of a step, which are all on one device."""
        dataset = self.datasets[plan.sources[start * len(plan.sources) // plan.examples.size]]
        layout = plan.layout
        examples, passages = plan.examples[start:stop], plan.passages[start:stop]
        text_rows, numbers = layout.text_rows[start:stop], layout.order[start:stop]
        present = text_rows >= 0
        # The texts of an example are its query and then its passages, so passage j is text j + 1.
        chosen = np.concatenate([np.zeros((stop - start, 1), int), passages + 1], axis=1)
        texts, queries = dataset.read(examples)
        texts = texts.take((queries[:, None] + chosen)[present])
        rows, slots = lay_out(texts, text_rows[present], layout.rows, layout.row_length)
        embeddings = np.full(text_rows.shape, -1, np.int32)
        embeddings[present] = text_rows[present] * layout.slots + slots
        text_ids = np.full((layout.rows, layout.slots), -1, np.int32)
        ids = numbers[:, None] * text_rows.shape[1] + np.arange(text_rows.shape[1])
        text_ids.flat[embeddings[present]] = ids[present]
        return Batch(
            rows=rows,
            text_ids=text_ids,
            queries=embeddings[:, 0],
            passages=embeddings[:, 1:],
            scores=dataset.scores(examples),
            texts=plan.texts and PassageTexts(*(array[start:stop] for array in plan.texts)),
        )


def local_ranges(sharding: jax.sharding.Sharding, examples: int) -> list[tuple[int, int]]:
    """Returns the ranges (start, stop) of examples of the global batch that are on this host's devices, in order."""
    indices = sharding.addressable_devices_indices_map((examples,)).values()
    return sorted({index[0].indices(examples)[:2] for index in indices if index is not None})


def to_global(parts: Sequence[np.ndarray], starts: Sequence[int], shards: int, sharding: Any) -> jax.Array:
    """Assembles a global array from the shards of this host.

    Args:
      parts: The shards of this host, one for each of its devices along the data and fsdp axes.
      starts: The index of each shard among all `shards` of the array.
      shards: Total number of shards.
      sharding: Sharding of the global array.
    """
    size = parts[0].shape[0]
    blocks = dict(zip(starts, parts, strict=True))

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # None only for devices of other hosts
        return blocks[(index[0].start or 0) // size]

    return place((shards * size, *parts[0].shape[1:]), sharding, block)


def batches(
    plan: Plan, datasets: Sequence[PreparedDataset], sharding: jax.sharding.Sharding, *, start: int, stop: int
) -> Iterator[tuple[StepPlan, Batch]]:
    """Yields the plans and global batches of steps start … stop - 1, prefetched in threads, with `sharding`."""
    source = StepSource(plan, datasets, sharding, stop)
    options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=PREFETCH_BATCHES)
    for step_plan, parts in grain.MapDataset.source(source)[start:].to_iter_dataset(options):
        count = parts[0].queries.size
        starts = [first // count for first, _ in local_ranges(sharding, step_plan.examples.size)]
        assemble = partial(to_global, starts=starts, shards=step_plan.examples.size // count, sharding=sharding)
        yield step_plan, jax.tree.map(lambda *leaves, assemble=assemble: assemble(leaves), *parts)
