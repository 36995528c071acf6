"""(seed, step) -> which rows of which data set: a pure function, the same on every host.

Nothing here reads a text: lengths come from the index that `prepare` wrote, so every host can plan the whole
global batch and all agree on its shape without talking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from codiemb_jax.config import DataSettings
from codiemb_jax.data.prepare import Index
from codiemb_jax.data.records import Task
from codiemb_jax.errors import UserError, listed

_SHUFFLE, _BATCHES, _CHOICES = range(3)  # streams of random numbers that must not depend on each other


@dataclass(frozen=True)
class Source:
    """What the plan needs to know of a data set."""

    name: str
    task: Task
    index: Index


@dataclass(frozen=True)
class StepPlan:
    """One step: a global batch of one data set."""

    number: int
    epoch: int
    source: int
    """Which data set, by its place in the list."""
    task: Task
    examples: np.ndarray
    """[batch] examples of the data set, in file order"""
    texts: np.ndarray
    """[batch, positives + negatives] which passages of each example; -1: it has none to put here"""
    query_row: int
    """Row length of the queries, in tokens; of both texts of STS pairs."""
    passage_row: int
    """Row length of the passages."""
    tokens: int
    """Real tokens of the global batch."""

    @property
    def computed_tokens(self) -> int:
        """Tokens with padding."""
        return self.examples.size * self.query_row + self.texts.size * self.passage_row


class Plan:
    """The order of all steps.

    Each epoch every data set is shuffled and cut into global batches of its task's size; what is left over
    waits for the next epoch's shuffle.  The batches of all data sets are shuffled together.
    """

    def __init__(self, sources: Sequence[Source], settings: DataSettings, seed: int):
        self.sources, self.settings, self.seed = sources, settings, seed
        self.batch_sizes = [
            settings.ir_global_batch_size if source.task == "ir" else settings.sts_global_batch_size
            for source in sources
        ]
        sizes = [source.index.position.size for source in sources]
        too_small = [
            f"{source.name}: {size} examples, data.{source.task}_global_batch_size is {batch}"
            for source, size, batch in zip(sources, sizes, self.batch_sizes, strict=True)
            if size < batch
        ]
        if too_small:
            raise UserError(
                "data sets smaller than one global batch would never be seen; lower the batch size, or add "
                "examples, or join files:\n" + listed(too_small)
            )
        self._batches = [size // batch for size, batch in zip(sizes, self.batch_sizes, strict=True)]
        self._epoch = lru_cache(maxsize=2)(self._order_of_epoch)

    @property
    def steps_per_epoch(self) -> int:
        return sum(self._batches)

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def _order_of_epoch(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The (data set, batch) of each step [steps, 2], and each data set's shuffled examples."""
        shuffled = [
            self._random(_SHUFFLE, epoch, place).permutation(source.index.position.size)
            for place, source in enumerate(self.sources)
        ]
        batches = [(place, batch) for place, count in enumerate(self._batches) for batch in range(count)]
        return self._random(_BATCHES, epoch).permutation(np.array(batches)), shuffled

    def step(self, number: int) -> StepPlan:
        """The plan of step `number`, from 0."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order, shuffled = self._epoch(epoch)
        place, batch = (int(value) for value in order[within])
        size, source = self.batch_sizes[place], self.sources[place]
        examples = shuffled[place][batch * size : (batch + 1) * size]
        index = source.index
        if source.task == "ir":
            random = self._random(_CHOICES, number)
            positives = _choose(index.positives[examples], self.settings.positives_per_query, random)
            negatives = _choose(index.negatives[examples], self.settings.negatives_per_query, random)
            negatives = np.where(negatives < 0, -1, negatives + index.positives[examples][:, None])
            texts = np.concatenate([positives, negatives], axis=1)
        else:
            texts = np.zeros((size, 1), np.int64)
        queries = index.query_tokens[examples]
        passages = np.where(texts < 0, 0, index.passage_tokens[index.passage_offsets[examples][:, None] + texts])
        if source.task == "ir":
            query_row = row_length(queries.max(), self.settings.query_max_tokens)
            passage_row = row_length(passages.max(), self.settings.passage_max_tokens)
        else:  # both texts of a pair are queries
            query_row = passage_row = row_length(max(queries.max(), passages.max()), self.settings.query_max_tokens)
        return StepPlan(
            number, epoch, place, source.task, examples, texts, query_row, passage_row,
            tokens=int(queries.sum() + passages.sum()),
        )  # fmt: skip


def _choose(counts: np.ndarray, wanted: int, random: np.random.Generator) -> np.ndarray:
    """Draws `wanted` of each example's `counts` texts, [examples, wanted]: each once before any repeats.

    -1 where an example has none.
    """
    most = int(counts.max(initial=0))
    keys = random.random((counts.size, max(most, 1)))
    keys[np.arange(keys.shape[1]) >= counts[:, None]] = np.inf  # sorts what does not exist behind the rest
    order = np.argsort(keys, axis=1)
    turn = np.arange(wanted) % np.maximum(counts, 1)[:, None]
    return np.where(counts[:, None] > 0, np.take_along_axis(order, turn, axis=1), -1)


def row_length(longest: int, limit: int) -> int:
    """The shortest of the limit, its half, quarter, eighth and sixteenth that holds `longest` tokens.

    A few lengths only, for each new shape is one more compilation.
    """
    return next(length for length in (-(-limit // part) for part in (16, 8, 4, 2, 1)) if length >= longest)
