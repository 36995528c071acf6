"""Plan -> this host's rows -> global arrays."""

from collections.abc import Iterator, Sequence
from functools import partial

import grain
import jax
import numpy as np

from codiemb_jax.batch import Batch, IRBatch, MixedBatch, Rows, STSBatch
from codiemb_jax.data.prepare import PreparedDataSet
from codiemb_jax.data.prompts import Tokens
from codiemb_jax.data.sampler import Part, Plan, StepPlan

THREADS = 2
BATCHES_AHEAD = 4


def padded_rows(texts: Sequence[Tokens | None], length: int) -> Rows:
    """One text a row, padded at the end; None gives an empty row."""
    rows = Rows(*(np.zeros((len(texts), length), np.int32) for _ in Rows._fields))
    for row, text in enumerate(texts):
        if text is not None:
            count = text.ids.size
            rows.tokens[row, :count] = text.ids
            rows.positions[row, :count] = np.arange(count)
            rows.segments[row, :count] = 1
            rows.pooled[row, text.content : count] = 1
    return rows


class StepSource:
    """Random access to this host's part of every step's batch: a data source for grain.

    A host reads the examples of its own devices only.
    """

    def __init__(self, plan: Plan, data_sets: Sequence[PreparedDataSet], sharding: jax.sharding.Sharding, steps: int):
        self.plan, self.data_sets, self.sharding, self.steps = plan, data_sets, sharding, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, number: int) -> tuple[StepPlan, Batch]:
        plan = self.plan.step(number)
        own = np.concatenate([np.arange(start, stop) for start, stop in own_slices(self.sharding, plan.size)])
        part_size = plan.parts[0].examples.size
        pieces = [
            self._piece(plan.parts[place], own[own // part_size == place] % part_size)
            for place in np.unique(own // part_size)
        ]
        texts = [example for piece in pieces for example in piece[0]]
        chosen, scores, is_ir = (np.concatenate(values) for values in list(zip(*pieces, strict=True))[1:])
        queries = padded_rows([text[0] for text in texts], plan.query_row)
        # Text 0 of an example is its query, so passage j is text j + 1.
        passages = padded_rows(
            [None if j < 0 else text[j + 1] for text, row in zip(texts, chosen, strict=True) for j in row],
            plan.passage_row,
        )
        if plan.task == "sts":
            return plan, STSBatch(queries, passages, scores)
        present = chosen[:, self.plan.settings.positives_per_query :] >= 0
        if plan.task == "ir":
            return plan, IRBatch(queries, passages, present)
        return plan, MixedBatch(queries, passages, present, scores, is_ir)

    def _piece(self, part: Part, places: np.ndarray) -> tuple[list[list[Tokens]], np.ndarray, np.ndarray, np.ndarray]:
        """Of the examples of a part at `places`: all texts, which of them are used, scores, and whether they are IR."""
        data_set, examples = self.data_sets[part.source], part.examples[places]
        is_ir = np.full(places.size, data_set.task == "ir")
        return data_set.read(examples), part.texts[places], data_set.scores(examples), is_ir


def own_slices(sharding: jax.sharding.Sharding, rows: int) -> list[tuple[int, int]]:
    """The parts (start, stop) of a leading axis of `rows` that this host's devices hold, in order."""
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({index[0].indices(rows)[:2] for index in indices if index is not None})


def to_global(local: np.ndarray, sharding: jax.sharding.Sharding, examples: int) -> jax.Array:
    """This host's rows, in the order of `own_slices`, as its part of the global array.

    An example may have several rows; all hosts together hold `examples` examples.
    """
    slices = own_slices(sharding, examples)
    per_example = local.shape[0] // sum(stop - start for start, stop in slices)
    place, blocks = 0, {}
    for start, stop in slices:
        count = (stop - start) * per_example
        blocks[start * per_example] = local[place : place + count]
        place += count
    shape = (examples * per_example, *local.shape[1:])

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # it would be for a device of another host
        return blocks[index[0].start or 0]

    return jax.make_array_from_callback(shape, sharding, block)


def batches(
    plan: Plan, data_sets: Sequence[PreparedDataSet], sharding: jax.sharding.Sharding, *, start: int, stop: int
) -> Iterator[tuple[StepPlan, Batch]]:
    """Steps start … stop - 1, read ahead in threads, as global arrays laid out by `sharding`."""
    source = StepSource(plan, data_sets, sharding, stop)
    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=BATCHES_AHEAD)
    for step_plan, batch in grain.MapDataset.source(source)[start:].to_iter_dataset(options):
        place = partial(to_global, sharding=sharding, examples=step_plan.size)
        yield step_plan, jax.tree.map(place, batch)
