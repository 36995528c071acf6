"""(seed, step) -> which examples of which data set: a pure function, the same on every host.

Nothing here reads a text: lengths come from the index that `prepare` wrote, so every host can plan the whole global
batch and all agree on its shape without communicating.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from codiemb_jax.batch import TASKS, StepTask, Task
from codiemb_jax.config import DataSettings
from codiemb_jax.data.store import Index
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.text.rows import padded_length

_SHUFFLE, _BATCHES, _CHOICES, _SUBSET = range(4)  # streams of random numbers that must not depend on each other


@dataclass(frozen=True)
class Source:
    """What the plan needs to know of a data set."""

    name: str
    task: Task
    index: Index


@dataclass(frozen=True)
class StepPlan:
    """One step: a global batch."""

    number: int
    epoch: int
    task: StepTask
    sources: tuple[int, ...]
    """The data sets, by their places in the list, of the batch's equal consecutive parts: one, or in a mixed step one
    per device."""
    examples: np.ndarray
    """[examples] in file order"""
    passages: np.ndarray
    """[examples, passages] which of each example's; -1: it has none for this place"""
    row_length: int
    """In tokens."""
    tokens: int
    """Without padding."""

    @property
    def computed_tokens(self) -> int:
        """With padding: a row for each query and each passage."""
        return (self.examples.size + self.passages.size) * self.row_length


class Stream:
    """An endless order of batches of some data sets.

    Each round every data set is shuffled and cut into batches, and the batches of all are shuffled together.  Examples
    that are left over wait for the next round's shuffle.
    """

    def __init__(self, members: Mapping[int, np.ndarray], batch_sizes: Sequence[int], seed: int):
        """`members`: the examples of each data set, by its place in the list."""
        self._members, self._sizes, self._seed = members, batch_sizes, seed
        batches = [
            (place, batch)
            for place, examples in members.items()
            for batch in range(examples.size // batch_sizes[place])
        ]
        self._batches = np.array(batches).reshape(-1, 2)
        self.length = len(batches)
        """Batches per round."""
        self._round = lru_cache(maxsize=2)(self._order_of_round)

    def _order_of_round(self, number: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The (data set, batch) of each place [batches, 2], and each data set's shuffled examples."""
        shuffled = {
            place: examples[np.random.default_rng([self._seed, _SHUFFLE, number, place]).permutation(examples.size)]
            for place, examples in self._members.items()
        }
        key = [self._seed, _BATCHES, number, min(self._members)]
        return np.random.default_rng(key).permutation(self._batches), shuffled

    def batch(self, turn: int, place: int) -> tuple[int, np.ndarray]:
        """The data set and the examples of the batch at `place` of round `turn`, both from 0."""
        order, shuffled = self._round(turn)
        source, batch = order[place].tolist()
        size = self._sizes[source]
        return source, shuffled[source][batch * size : (batch + 1) * size]


class Plan:
    """The order of all steps: the batches of all data sets in random order, or in a given share of tasks."""

    devices = 1
    """In so many parts of different data sets a batch is composed."""

    def __init__(self, sources: Sequence[Source], settings: DataSettings, seed: int):
        """
        Raises:
          UserError: a data set is smaller than one batch.
        """
        self.sources, self.settings, self.seed = sources, settings, seed
        sizes = {"ir": settings.ir_global_batch_size, "sts": settings.sts_global_batch_size}
        self.batch_sizes = [sizes[source.task] // self.devices for source in sources]
        members = {place: self._examples(source) for place, source in enumerate(sources)}
        part = "a device's part of " if self.devices > 1 else ""
        too_small = [
            f"{source.name}: {members[place].size} examples, {part}data.{source.task}_global_batch_size is "
            f"{self.batch_sizes[place]}"
            for place, source in enumerate(sources)
            if members[place].size < self.batch_sizes[place]
        ]
        if too_small:
            raise UserError(
                "data sets smaller than one global batch would never be seen; lower the batch size, add examples, join "
                "files, or raise data.max_examples:\n" + format_problems(too_small)
            )
        self.all = Stream(members, self.batch_sizes, seed)
        self.steps_per_epoch = self.all.length // self.devices
        # As written: 0.3 is three of ten steps, although no float is three tenths.
        self._share = None if settings.ir_share is None else Fraction(str(settings.ir_share))
        if self._share is not None:
            self._of_task = {
                task: Stream(
                    {place: found for place, found in members.items() if sources[place].task == task},
                    self.batch_sizes,
                    seed,
                )
                for task in TASKS
            }

    def _examples(self, source: Source) -> np.ndarray:
        """The examples of a data set that are used: all, or a random choice of `max_examples`."""
        size, most = source.index.position.size, self.settings.max_examples
        if most is None or size <= most:
            return np.arange(size)
        random = np.random.default_rng([self.seed, _SUBSET, zlib.crc32(source.name.encode())])
        return np.sort(random.choice(size, most, replace=False, shuffle=False))

    def _batch(self, number: int) -> tuple[int, np.ndarray]:
        """The data set and the examples of step `number`."""
        if self._share is None:
            return self.all.batch(*divmod(number, self.all.length))
        before, after = (math.floor(steps * self._share) for steps in (number, number + 1))
        stream, number = (self._of_task["ir"], before) if after > before else (self._of_task["sts"], number - before)
        return stream.batch(*divmod(number, stream.length))

    def step(self, number: int) -> StepPlan:
        """The plan of step `number`, from 0."""
        source, examples = self._batch(number)
        passages = self._passages(source, examples, self._random(number))
        return self._step(number, self.sources[source].task, [(source, examples, passages)])

    def _random(self, number: int) -> np.random.Generator:
        """The random numbers of a step's choices."""
        return np.random.default_rng([self.seed, _CHOICES, number])

    def _step(self, number: int, task: StepTask, parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> StepPlan:
        """A plan of (data set, examples, passages) parts."""
        settings = self.settings
        limits = {"ir": max(settings.query_max_tokens, settings.passage_max_tokens), "sts": settings.query_max_tokens}
        lengths = []
        for source, examples, passages in parts:
            index = self.sources[source].index
            lengths.append(index.query_tokens[examples].ravel())
            places = index.passage_offsets[examples][:, None] + passages
            lengths.append(np.where(passages < 0, 0, index.passage_tokens[places]).ravel())
        of_texts = np.concatenate(lengths)
        sources, examples, passages = zip(*parts, strict=True)
        return StepPlan(
            number=number,
            epoch=number // self.steps_per_epoch,
            task=task,
            sources=sources,
            examples=np.concatenate(examples),
            passages=np.concatenate(passages),
            row_length=padded_length(int(of_texts.max()), limits.get(task, limits["ir"])),
            tokens=int(of_texts.sum()),
        )

    def _passages(self, source: int, examples: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Which passages of each example are used, [examples, passages]."""
        if self.sources[source].task == "sts":
            return np.zeros((examples.size, 1), int)
        settings, index = self.settings, self.sources[source].index
        positives = _choose(index.positives[examples], settings.positives_per_query, random)
        negatives = _choose(index.negatives[examples], settings.negatives_per_query, random)
        negatives = np.where(negatives < 0, -1, negatives + index.positives[examples][:, None])
        return np.concatenate([positives, negatives], axis=1)


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
