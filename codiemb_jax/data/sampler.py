"""(seed, step) -> which rows of which data set: a pure function, the same on every host.

Nothing here reads a text: lengths come from the index that `prepare` wrote, so every host can plan the whole
global batch and all agree on its shape without talking.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

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
class Part:
    """Examples of one data set."""

    source: int
    """Which data set, by its place in the list."""
    examples: np.ndarray
    """[examples] in file order"""
    texts: np.ndarray
    """[examples, texts] which passages of each example; -1: it has none to put here"""


@dataclass(frozen=True)
class StepPlan:
    """One step: a global batch.  It is of one data set, or (sampler: mixed) each device's part is."""

    number: int
    epoch: int
    task: Task | Literal["mixed"]
    parts: tuple[Part, ...]
    """Parts of the batch, alike in shape, in order."""
    query_row: int
    """Row length of the queries, in tokens; of both texts of STS pairs."""
    passage_row: int
    """Row length of the passages."""
    tokens: int
    """Real tokens of the global batch."""

    @property
    def size(self) -> int:
        """Examples of the global batch."""
        return sum(part.examples.size for part in self.parts)

    @property
    def computed_tokens(self) -> int:
        """Tokens with padding."""
        return self.size * self.query_row + sum(part.texts.size for part in self.parts) * self.passage_row


class _Stream:
    """An endless order of batches of some data sets.

    Each round every data set is shuffled and cut into batches; what is left over waits for the next round's shuffle.
    The batches of all data sets are shuffled together and dealt out `deal` at a time; what is left of them waits, too.
    """

    def __init__(self, members: Mapping[int, int], batch_sizes: Sequence[int], deal: int, seed: int):
        """`members`: the data sets' places in the list, and how many examples each has."""
        self._members, self._sizes, self._deal, self._seed = members, batch_sizes, deal, seed
        batches = [(place, batch) for place, size in members.items() for batch in range(size // batch_sizes[place])]
        self._batches = np.array(batches).reshape(-1, 2)
        self.length = len(batches) // deal
        """Deals a round."""
        self._round = lru_cache(maxsize=2)(self._order_of_round)

    def _order_of_round(self, number: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The (data set, batch) of each place [batches, 2], and each data set's shuffled examples."""
        shuffled = {
            place: np.random.default_rng([self._seed, _SHUFFLE, number, place]).permutation(size)
            for place, size in self._members.items()
        }
        key = [self._seed, _BATCHES, number, min(self._members)]
        return np.random.default_rng(key).permutation(self._batches), shuffled

    def deal(self, number: int) -> list[tuple[int, np.ndarray]]:
        """The data set and the examples of each batch of deal `number`, from 0."""
        turn, within = divmod(number, self.length)
        order, shuffled = self._round(turn)
        dealt = []
        for place, batch in order[within * self._deal : (within + 1) * self._deal].tolist():
            size = self._sizes[place]
            dealt.append((place, shuffled[place][batch * size : (batch + 1) * size]))
        return dealt


class Plan:
    """The order of all steps: the batches of all data sets as they fall, or in a given share of tasks."""

    def __init__(self, sources: Sequence[Source], settings: DataSettings, seed: int, devices: int = 1):
        """`devices`: that hold examples of their own; matters for sampler: mixed only."""
        self.sources, self.settings, self.seed = sources, settings, seed
        self._mixed = settings.sampler == "mixed"
        deal = devices if self._mixed else 1
        sizes = {"ir": settings.ir_global_batch_size // deal, "sts": settings.sts_global_batch_size // deal}
        self.batch_sizes = [sizes[source.task] for source in sources]
        examples = {place: source.index.position.size for place, source in enumerate(sources)}
        too_small = [
            f"{source.name}: {examples[place]} examples, "
            + ("a device's part of " if self._mixed else "")
            + f"data.{source.task}_global_batch_size is {self.batch_sizes[place]}"
            for place, source in enumerate(sources)
            if examples[place] < self.batch_sizes[place]
        ]
        if too_small:
            raise UserError(
                "data sets smaller than one global batch would never be seen; lower the batch size, or add "
                "examples, or join files:\n" + listed(too_small)
            )

        def stream(members: Mapping[int, int]) -> _Stream:
            return _Stream(members, self.batch_sizes, deal, seed)

        self._all = stream(examples)
        if not self._all.length:
            raise UserError(
                f"sampler: mixed needs a batch for each of the {devices} devices, all data sets together have fewer; "
                "lower data.ir_global_batch_size and data.sts_global_batch_size"
            )
        self.steps_per_epoch = self._all.length
        # As written: 0.3 is three of ten steps, although no float is three tenths.
        self._share = None if settings.ir_share is None else Fraction(str(settings.ir_share))
        if self._share is not None:
            self._of_task = {
                task: stream({place: size for place, size in examples.items() if sources[place].task == task})
                for task in ("ir", "sts")
            }

    def _dealt(self, number: int) -> list[tuple[int, np.ndarray]]:
        if self._share is None:
            return self._all.deal(number)
        before, after = (math.floor(steps * self._share) for steps in (number, number + 1))
        return self._of_task["ir"].deal(before) if after > before else self._of_task["sts"].deal(number - before)

    def step(self, number: int) -> StepPlan:
        """The plan of step `number`, from 0."""
        random = np.random.default_rng([self.seed, _CHOICES, number])
        parts = tuple(Part(place, found, self._texts(place, found, random)) for place, found in self._dealt(number))
        queries, passages = [], []
        for part in parts:
            index = self.sources[part.source].index
            queries.append(index.query_tokens[part.examples])
            places = index.passage_offsets[part.examples][:, None] + part.texts
            passages.append(np.where(part.texts < 0, 0, index.passage_tokens[places]))
        task = "mixed" if self._mixed else self.sources[parts[0].source].task
        query_row, passage_row = self._row_lengths(task, np.max(queries), max(lengths.max() for lengths in passages))
        tokens = sum(int(lengths.sum()) for lengths in (*queries, *passages))
        return StepPlan(number, number // self.steps_per_epoch, task, parts, query_row, passage_row, tokens)

    def _row_lengths(self, task: str, longest_query: int, longest_passage: int) -> tuple[int, int]:
        query_limit, passage_limit = self.settings.query_max_tokens, self.settings.passage_max_tokens
        if task == "sts":  # both texts of a pair are queries
            length = row_length(max(longest_query, longest_passage), query_limit)
            return length, length
        if task == "mixed":  # a pair's second text lies among the passages
            passage_limit = max(passage_limit, query_limit)
        return row_length(longest_query, query_limit), row_length(longest_passage, passage_limit)

    def _texts(self, place: int, examples: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Which passages of each example are used, [examples, texts]."""
        settings, index = self.settings, self.sources[place].index
        per_query = settings.positives_per_query + settings.negatives_per_query
        if self.sources[place].task == "sts":
            texts = np.full((examples.size, per_query if self._mixed else 1), -1)
            texts[:, 0] = 0
            return texts
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


def row_length(longest: int, limit: int) -> int:
    """The shortest of the limit, its half, quarter, eighth and sixteenth that holds `longest` tokens.

    A few lengths only, for each new shape is one more compilation.
    """
    return next(length for length in (-(-limit // part) for part in (16, 8, 4, 2, 1)) if length >= longest)
