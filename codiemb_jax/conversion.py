"""Converts common data into the data format of this project: tables of pairs and triplets, and BEIR folders."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codiemb_jax.batch import Task
from codiemb_jax.cache import shown
from codiemb_jax.data.tables import read_table
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.evaluation.beir import CORPUS, read_folder
from codiemb_jax.text.records import MAX_ABS_SCORE, Triple

MAX_PROBLEMS = 1000
"""Reading stops after so many."""
DOCUMENTS_PER_BLOCK = 10_000
TRAIN, HELD_OUT = "train.jsonl", "heldout.jsonl"


@dataclass(frozen=True)
class ConversionSettings:
    """What to read, and what the examples are. Columns are those of tables."""

    task: Task
    query: str = "query"
    positives: tuple[str, ...] = ("positive",)
    negatives: tuple[str, ...] = ()
    score: str = "score"
    max_score: float = 1.0
    """Scores are divided by this."""
    instruction: str = ""
    """Task instruction of queries, and of both texts of similarity pairs."""
    split: str = "train"
    held_out: float = 0.0
    """Share of the queries that become held-out data."""
    seed: int = 0
    """Seed of the choice of held-out queries."""


class Example(NamedTuple):
    """One line of the output; `score` is that of similarity pairs."""

    query: str
    positives: dict[str, None]
    negatives: dict[str, None]
    score: float | None = None


class ConversionReport(NamedTuple):
    """How much was read and written."""

    rows: int
    """Rows of the table, or judgments of the BEIR folder."""
    examples: dict[str, int]
    """By name of the file."""


def is_beir(source: Path) -> bool:
    """Whether a folder has the format of BEIR."""
    return (source / CORPUS).is_file()


def convert(source: Path, folder: Path, settings: ConversionSettings) -> ConversionReport:
    """Writes the examples of a table or BEIR folder to train.jsonl and, if wanted, heldout.jsonl.

    Rows with the same query become one IR example, because a relevant passage must not be a negative of the same query
    in a batch. All examples are held in memory.

    Args:
      source: A table, see `read_table`, or a BEIR folder.
      folder: The folder to create for the files.
      settings: What to read.

    Raises:
      UserError: If the source is invalid, or there is no example for one of the files.
    """
    if is_beir(source):
        examples, rows = _read_beir(source, settings.split)
    elif settings.task == "ir":
        examples, rows = _read_ir(source, settings)
    else:
        examples, rows = _read_sts(source, settings)
    if not examples:
        raise UserError(f"{shown(source)}: has no rows")
    queries = list(dict.fromkeys(example.query for example in examples))
    number = round(len(queries) * settings.held_out)
    if settings.held_out and not 0 < number < len(queries):
        raise UserError(
            f"{len(queries)} queries cannot be split into training and held-out data with a share of "
            f"{settings.held_out:g}"
        )
    chosen = {
        queries[i] for i in np.random.default_rng(settings.seed).choice(len(queries), number, replace=False).tolist()
    }
    parts = {TRAIN: [example for example in examples if example.query not in chosen]}
    if number:
        parts[HELD_OUT] = [example for example in examples if example.query in chosen]
    folder.mkdir()
    for name, part in parts.items():
        with (folder / name).open("w", encoding="utf-8") as file:
            for example in part:
                file.write(json.dumps(_record(example, settings), ensure_ascii=False) + "\n")
    return ConversionReport(rows, {name: len(part) for name, part in parts.items()})


def _record(example: Example, settings: ConversionSettings) -> dict[str, Any]:
    """Returns an example in the data format."""
    both = settings.instruction if settings.task == "sts" else ""
    record: dict[str, Any] = {
        "task_type": settings.task,
        "query": [settings.instruction, "", example.query],
        "positives": [[both, "", text] for text in example.positives],
    }
    if example.score is None:
        return record | {"negatives": [["", "", text] for text in example.negatives]}
    return record | {"positive_scores": [example.score]}


class _Cells:
    """Takes texts and scores out of rows, and collects the problems."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def texts(self, location: str, cells: dict[str, Any], column: str) -> list[str]:
        """Returns the texts of a cell, which is a string, a list of strings, or empty."""
        value = cells.get(column)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) for text in values):
            self.problems.append(f"{location}: {shorten(column)}: expected a string, or a list of strings")
            return []
        # As in training, so that the same texts are recognized.
        stripped = [Triple.stripped("", "", text).text for text in values]
        return [text for text in stripped if text.strip()]

    def text(self, location: str, cells: dict[str, Any], column: str) -> str:
        """Returns the only text of a cell."""
        known = len(self.problems)
        texts = self.texts(location, cells, column)
        if len(texts) != 1 and len(self.problems) == known:
            self.problems.append(f"{location}: {shorten(column)}: {'empty' if not texts else 'several texts'}")
        return texts[0] if texts else ""

    def score(self, location: str, cells: dict[str, Any], column: str) -> float:
        value = cells.get(column)
        try:
            score = math.nan if isinstance(value, bool | None) else float(value)
        except (TypeError, ValueError, OverflowError):
            score = math.nan
        if not abs(score) <= MAX_ABS_SCORE:
            self.problems.append(f"{location}: {shorten(column)}: {shorten(repr(value))} is not a finite number")
        return score

    def check(self, *, at_end: bool = False) -> None:
        if self.problems and (at_end or len(self.problems) >= MAX_PROBLEMS):
            raise UserError(f"invalid data:\n{format_problems(self.problems)}")


def _read_ir(source: Path, settings: ConversionSettings) -> tuple[list[Example], int]:
    cells = _Cells()
    rows = 0
    examples: dict[str, Example] = {}
    columns = (settings.query, *settings.positives, *settings.negatives)
    for location, row in read_table(source, settings.split, columns):
        known = len(cells.problems)
        query = cells.text(location, row, settings.query)
        positives, negatives = (
            dict.fromkeys(text for column in names for text in cells.texts(location, row, column))
            for names in (settings.positives, settings.negatives)
        )
        if not positives and len(cells.problems) == known:
            cells.problems.append(f"{location}: {', '.join(map(shorten, settings.positives))}: empty")
        example = examples.setdefault(query, Example(query, {}, {}))
        example.positives.update(positives)
        example.negatives.update(negatives)
        rows += 1
        cells.check()
    cells.check(at_end=True)
    return _without_positives(examples.values()), rows


def _without_positives(examples: Iterable[Example]) -> list[Example]:
    """Removes the positives of each example from its negatives."""
    found = list(examples)
    for example in found:
        for text in example.positives.keys() & example.negatives.keys():
            del example.negatives[text]
    return found


def _read_sts(source: Path, settings: ConversionSettings) -> tuple[list[Example], int]:
    cells = _Cells()
    examples = []
    columns = (settings.query, settings.positives[0], settings.score)
    for location, row in read_table(source, settings.split, columns):
        known = len(cells.problems)
        first, second = (cells.text(location, row, column) for column in columns[:2])
        score = cells.score(location, row, settings.score) / settings.max_score
        if not -1 <= score <= 1 and len(cells.problems) == known:
            cells.problems.append(
                f"{location}: {shorten(settings.score)}: {score * settings.max_score:g} is not between "
                f"-{settings.max_score:g} and {settings.max_score:g}; set --max_score to the highest possible score"
            )
        examples.append(Example(first, {second: None}, {}, score))
        cells.check()
    cells.check(at_end=True)
    return examples, len(examples)


def _read_beir(source: Path, split: str) -> tuple[list[Example], int]:
    """Returns an example for each query with a relevant document. Documents with a gain of 0 or less are negatives."""
    beir = read_folder(source, split)
    wanted = {name for gains in beir.relevant for name in gains}
    texts = {
        document.id: text
        for block in beir.blocks(DOCUMENTS_PER_BLOCK)
        for document in block
        if document.id in wanted and (text := Triple.stripped("", "", document.text).text).strip()
    }
    examples: dict[str, Example] = {}
    for (_, query), gains in zip(beir.queries.values(), beir.relevant, strict=True):
        stripped = Triple.stripped("", "", query).text
        example = examples.setdefault(stripped, Example(stripped, {}, {}))
        for name, gain in gains.items():
            if name in texts:
                (example.positives if gain > 0 else example.negatives)[texts[name]] = None
    found = [example for example in _without_positives(examples.values()) if example.positives]
    if not found:
        raise UserError(f"{shown(source)}: no query of the split {split} has a relevant document with a text")
    return found, sum(map(len, beir.relevant))
