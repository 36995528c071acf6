"""Plans which examples of which dataset each step uses, as a pure function of seed and step.

Planning reads no texts: lengths come from the index that `prepare` writes. Every host can therefore plan the global
batch, and all hosts agree on its shape without communication.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from codiemb_jax.batch import TASKS, PassageTexts, StepTask, Task
from codiemb_jax.config import DataSettings
from codiemb_jax.data.duplicates import find_texts
from codiemb_jax.data.index import Index
from codiemb_jax.data.layout import BatchLayout, Layout
from codiemb_jax.data.permutation import permute
from codiemb_jax.errors import UserError, format_problems

_SHUFFLE, _BATCHES, _CHOICES, _SUBSET = range(4)  # independent random streams
_BLOCK_KEYS = 2**20
"""Number of random keys that are sorted at a time to choose passages."""


@dataclass(frozen=True)
class Source:
    """A dataset as the plan sees it."""

    name: str
    task: Task
    index: Index


@dataclass(frozen=True)
class StepPlan:
    """The global batch of one step."""

    number: int
    epoch: int
    task: StepTask
    sources: tuple[int, ...]
    """Dataset indices of the equal consecutive parts of the batch: one part, or one per device in mixed steps."""
    examples: np.ndarray
    """int [examples]: indices in file order, in the order of `layout`"""
    passages: np.ndarray
    """int [examples, passages]: indices among the passages of each example; -1 for padding"""
    layout: BatchLayout
    """Where the texts of the examples lie."""
    tokens: int
    """Number of tokens in the batch, without padding."""
    texts: PassageTexts | None
    """Which passages have the same text; None for STS, or if the plan does not compare texts."""

    @property
    def computed_tokens(self) -> int:
        """Number of tokens in the batch, including padding."""
        return self.layout.devices * self.layout.rows * self.layout.row_length


class BatchStream:
    """An infinite stream of batches from some of the datasets.

    In each round, every dataset is shuffled and split into batches, which are then shuffled across datasets.
    Leftover examples are not used until the next round. None of this is stored: every position of an order is
    computed when it is needed, so time and memory do not grow with the datasets.
    """

    def __init__(self, counts: Mapping[int, int], batch_sizes: Sequence[int], seed: int):
        """Creates the stream.

        Args:
          counts: The number of examples of each dataset, by the index of the dataset.
          batch_sizes: The batch size of every dataset.
          seed: The seed of the run.
        """
        self._counts, self._sizes, self._seed = counts, batch_sizes, seed
        self._sources = list(counts)
        self._ends = np.cumsum([counts[source] // batch_sizes[source] for source in self._sources])
        self.length = int(self._ends[-1]) if self._sources else 0
        """Number of batches per round."""

    def batch(self, number: int, position: int) -> tuple[int, np.ndarray]:
        """Returns the dataset and the examples of the batch at `position` in round `number`, both from 0.

        Examples are numbered from 0 to the dataset's count - 1.
        """
        key = [self._seed, _BATCHES, number, self._sources[0]]
        batch = int(permute(np.array([position]), self.length, key)[0])  # among the batches of all datasets
        i = int(np.searchsorted(self._ends, batch, side="right"))
        source = self._sources[i]
        count, size = self._counts[source], self._sizes[source]
        start = (batch - int(self._ends[i]) + count // size) * size
        return source, permute(np.arange(start, start + size), count, [self._seed, _SHUFFLE, number, source])


class Plan:
    """Plans all steps. Batches of all datasets come in random order, or with a fixed share of IR steps."""

    parts = 1
    """Number of parts of a batch that come from different datasets."""

    def __init__(
        self,
        sources: Sequence[Source],
        settings: DataSettings,
        seed: int,
        layout: Layout,
        group_sizes: Mapping[Task, int | None],
        compare_texts: bool = False,
    ):
        """Creates the plan.

        Args:
          sources: The datasets.
          settings: The data settings.
          seed: The seed of the run.
          layout: Lays out the texts of a batch. Which examples a step has does not depend on it.
          group_sizes: For each task, the number of consecutive examples that are compared; None for the whole batch.
          compare_texts: Whether to find passages of IR examples that have the same text.

        Raises:
          UserError: If a dataset is smaller than one batch.
        """
        self.sources, self.settings, self.seed = sources, settings, seed
        self.layout, self.group_sizes, self.compare_texts = layout, group_sizes, compare_texts
        sizes = {"ir": settings.ir_global_batch_size, "sts": settings.sts_global_batch_size}
        self.batch_sizes = [sizes[source.task] // self.parts for source in sources]
        counts = {i: self._count(source) for i, source in enumerate(sources)}
        part = "a device's part of " if self.parts > 1 else ""
        too_small = [
            f"{source.name}: {counts[i]} examples, {part}data.{source.task}_global_batch_size is {self.batch_sizes[i]}"
            for i, source in enumerate(sources)
            if counts[i] < self.batch_sizes[i]
        ]
        if too_small:
            raise UserError(
                "datasets smaller than one global batch would never be used; lower the batch size, add examples, merge "
                "files, or raise data.max_examples:\n" + format_problems(too_small)
            )
        self.all = BatchStream(counts, self.batch_sizes, seed)
        self.steps_per_epoch = self.all.length // self.parts
        # An exact fraction, so 0.3 means three of ten steps although no float equals 3/10.
        self._share = None if settings.ir_share is None else Fraction(str(settings.ir_share))
        if self._share is not None:
            self._task_streams = {
                task: BatchStream(
                    {i: count for i, count in counts.items() if sources[i].task == task}, self.batch_sizes, seed
                )
                for task in TASKS
            }

    def _count(self, source: Source) -> int:
        """Returns the number of examples of a dataset that are used."""
        return min(len(source.index), self.settings.max_examples or len(source.index))

    def _batch(self, number: int) -> tuple[int, np.ndarray]:
        """Returns the dataset and the examples of step `number`."""
        if self._share is None:
            return self._draw(self.all, *divmod(number, self.all.length))
        ir_before, ir_after = (math.floor(steps * self._share) for steps in (number, number + 1))
        if ir_after > ir_before:
            stream, number = self._task_streams["ir"], ir_before
        else:
            stream, number = self._task_streams["sts"], number - ir_before
        return self._draw(stream, *divmod(number, stream.length))

    def _draw(self, stream: BatchStream, number: int, position: int) -> tuple[int, np.ndarray]:
        """Returns the dataset and the examples, as indices in file order, of a batch of a stream.

        The subset of `max_examples` is the beginning of a permutation of all examples.
        """
        i, examples = stream.batch(number, position)
        source = self.sources[i]
        if self._count(source) == len(source.index):
            return i, examples
        key = [self.seed, _SUBSET, zlib.crc32(source.name.encode())]
        return i, permute(examples, len(source.index), key)

    def step(self, number: int) -> StepPlan:
        """Returns the plan of step `number`, from 0."""
        source, examples = self._batch(number)
        passages = self._passages(source, examples, self._rng(number))
        return self._step(number, self.sources[source].task, [(source, examples, passages)])

    def _rng(self, number: int) -> np.random.Generator:
        """Returns the random generator that draws the passages of a step."""
        return np.random.default_rng([self.seed, _CHOICES, number])

    def _step(self, number: int, task: StepTask, parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> StepPlan:
        """Assembles a plan from (dataset, examples, passages) parts."""
        settings = self.settings
        limit = settings.max_tokens(task)
        lengths = np.concatenate(
            [self.sources[source].index.lengths(examples, passages, limit) for source, examples, passages in parts]
        )
        # In a mixed step, each device is a group of its own.
        group_size = lengths.shape[0] // self.parts if task == "mixed" else self.group_sizes[task]
        layout = self.layout(lengths, limit, group_size)
        texts = None
        if self.compare_texts and task != "sts":
            indexed = [(self.sources[source].index, examples, passages) for source, examples, passages in parts]
            texts = PassageTexts(*(array[layout.order] for array in find_texts(indexed)))
        return StepPlan(
            number=number,
            epoch=number // self.steps_per_epoch,
            task=task,
            sources=tuple(source for source, _, _ in parts),
            examples=np.concatenate([examples for _, examples, _ in parts])[layout.order],
            passages=np.concatenate([passages for _, _, passages in parts])[layout.order],
            layout=layout,
            tokens=int(lengths.sum()),
            texts=texts,
        )

    def _passages(self, source: int, examples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draws the passages of each example, int [examples, passages]."""
        num_positives, num_negatives = self.sources[source].index.counts(examples)
        if self.sources[source].task == "sts":
            return np.zeros((examples.size, 1), int)
        positives = _choose(num_positives, self.settings.positives_per_query, rng)
        negatives = _choose(num_negatives, self.settings.negatives_per_query, rng)
        negatives = np.where(negatives < 0, -1, negatives + num_positives[:, None])
        return np.concatenate([positives, negatives], axis=1)


def _choose(counts: np.ndarray, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draws texts for each example, using every text once before repeating any.

    Args:
      counts: int [examples], the number of texts of each example.
      num_draws: Number of texts to draw for each example.
      rng: The random generator.

    Returns:
      Indices of texts, int [examples, num_draws]; -1 for examples without texts.
    """
    max_count = max(int(counts.max(initial=0)), 1)
    chosen = np.empty((counts.size, num_draws), int)
    # Some examples at a time, as a single one may have very many texts. This does not change what is drawn.
    block_size = max(_BLOCK_KEYS // max_count, 1)
    for start in range(0, counts.size, block_size):
        block = counts[start : start + block_size, None]
        keys = rng.random((len(block), max_count))
        keys[np.arange(max_count) >= block] = np.inf  # sorts padding last
        order = np.argsort(keys, axis=1)
        draws = np.arange(num_draws) % np.maximum(block, 1)
        chosen[start : start + block_size] = np.where(block > 0, np.take_along_axis(order, draws, axis=1), -1)
    return chosen
