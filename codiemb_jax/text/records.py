"""Parses and validates data files in the data format of this project (docs/guides/data.md)."""

import codecs
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from codiemb_jax.batch import Task
from codiemb_jax.cache import shown
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.text.plain import decode_line

REQUIRED = ("task_type", "query", "positives")
OPTIONAL = ("negatives", "positive_scores", "negative_scores", "meta_data")
"""`meta_data` may have any value and is ignored, as in the original."""
MAX_ABS_SCORE = 1e15
"""Training steps compute squares of scores in float32."""
TRIPLE = "a list of three strings [task instruction, instance instruction, text]"


class Triple(NamedTuple):
    """A text with its instructions."""

    task: str
    instance: str
    text: str

    @classmethod
    def stripped(cls, task: str, instance: str, text: str) -> "Triple":
        """Creates a triple from parts stripped of tabs, newlines, spaces and colons at both ends."""
        return cls(task.strip("\t\n :"), instance.strip("\t\n :"), text.strip("\t\n :"))

    def hash(self) -> int:
        """Returns a 64-bit hash, equal for equal triples in every process."""
        content = f"{len(self.task)} {len(self.instance)} {self.task}{self.instance}{self.text}".encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


INVALID = Triple("", "", "")
"""Placeholder for an invalid triple while the rest of its line is checked."""


class Record(NamedTuple):
    """One line of a data file.

    In STS records, `positives` has only the second text of the pair and `negatives` is empty. In IR records, `score` is
    None.
    """

    line: int
    """Line number, from 1."""
    query: Triple
    positives: tuple[Triple, ...]
    negatives: tuple[Triple, ...]
    score: float | None

    @property
    def passages(self) -> tuple[Triple, ...]:
        """The positives, followed by the negatives."""
        return self.positives + self.negatives


def read_records(path: Path, task: Task) -> Iterator[Record]:
    """Yields the records of a file up to the first invalid line, then only checks the rest.

    Raises:
      UserError: If a line is invalid. Raised at the end of the file, with all problems as `FILE:LINE: field: problem`.
    """
    problems: list[str] = []
    empty = True
    for record in read_lines(path, task, Lines(0, path.stat().st_size, 1), problems):
        empty = False
        if not problems:
            yield record
    check_records(path, task, empty, problems)


class Lines(NamedTuple):
    """Consecutive lines of a file."""

    start: int
    """Index of the first byte."""
    stop: int
    """Index after the last byte."""
    first: int
    """Number of the first line, from 1."""


def split_lines(path: Path, num_bytes: int) -> Iterator[Lines]:
    """Splits a file at the ends of lines into parts of at least `num_bytes`, except for the last."""
    start, line = 0, 1
    with path.open("rb") as file:
        while content := file.read(num_bytes):
            newlines = content.count(b"\n")
            if not content.endswith(b"\n"):
                newlines += file.readline().endswith(b"\n")
            yield Lines(start, file.tell(), line)
            start, line = file.tell(), line + newlines


def read_lines(path: Path, task: Task, lines: Lines, problems: list[str]) -> Iterator[Record]:
    """Yields the records of valid lines, and adds the problems of the others as `FILE:LINE: field: problem`."""
    with path.open("rb") as file:
        file.seek(lines.start)
        remaining = lines.stop - lines.start
        number = lines.first
        while remaining > 0 and (line := file.readline()):
            if line.strip():
                record = _LineParser(number, task).parse(line)
                if isinstance(record, Record):
                    yield record
                else:
                    problems += [f"{shown(path)}:{number}: {problem}" for problem in record]
            remaining -= len(line)
            number += 1


def check_records(path: Path, task: Task, empty: bool, problems: Sequence[str]) -> None:
    """Checks that a file that was read has valid records.

    Args:
      path: The file.
      task: The task of its data.
      empty: Whether the file has no valid line.
      problems: The problems of its invalid lines.

    Raises:
      UserError: If the file has invalid lines or none at all.
    """
    if problems:
        raise UserError(f"invalid {task} data{_hint(path)}:\n{format_problems(problems)}")
    if empty:
        raise UserError(f"{shown(path)}: the file is empty, expected one JSON object per line")


def _hint(path: Path) -> str:
    """Returns what is wrong with a file as a whole, from how it starts; nothing if it may be JSON Lines."""
    start = b""
    with suppress(OSError), path.open("rb") as file:
        start = file.read(1000)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return " (the file is UTF-16; convert it to UTF-8)"
    if re.match(rb'\s*(\[|\{\s*\n\s*")', start.removeprefix(codecs.BOM_UTF8)):
        return " (the file is not JSON Lines; write each example as one object on a line of its own)"
    return ""


class _Object:
    """A JSON object as a list of pairs, because a dict would hide duplicate keys."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        self.pairs = pairs


class _LineParser:
    """Parses one line and collects all of its problems."""

    def __init__(self, number: int, task: Task):
        self.number = number
        self.task = task
        self.problems: list[str] = []

    def parse(self, line: bytes) -> Record | list[str]:
        """Returns the record, or the problems if the line is invalid."""
        fields = self._fields(line)
        if fields is None:
            return self.problems
        self._task_type(fields.get("task_type", self.task))  # a missing key has already been reported
        query = self._triple("query", fields["query"]) if "query" in fields else INVALID
        positives = self._triples("positives", fields["positives"]) if "positives" in fields else None
        negatives = self._triples("negatives", fields.get("negatives", []))
        scores = self._scores("positive_scores", fields.get("positive_scores", []), positives)
        self._scores("negative_scores", fields.get("negative_scores", []), negatives)
        if positives == []:
            self._problem("positives", "empty", "at least one positive")
        if self.task == "sts" and scores == []:
            self._problem("positive_scores", "empty", "the score of the pair")
        if self.problems or not positives:
            return self.problems
        if self.task == "sts" and scores:
            return Record(self.number, query, tuple(positives[:1]), (), scores[0])
        return Record(self.number, query, tuple(positives), tuple(negatives or ()), None)

    def _problem(self, field: str, problem: str, expected: str) -> None:
        self.problems.append(f"{field}: {problem}, expected {expected}")

    def _fields(self, line: bytes) -> dict[str, Any] | None:
        try:
            value = json.loads(decode_line(line, self.number), object_pairs_hook=_Object)
        except UnicodeDecodeError as error:
            self.problems.append(f"byte {error.start + 1}: not valid UTF-8, expected UTF-8 text")
            return None
        except (ValueError, RecursionError) as error:
            # Numbers with thousands of digits raise a ValueError that is not a JSONDecodeError.
            self.problems.append(f"invalid JSON ({error}), expected one JSON object per line")
            return None
        if not isinstance(value, _Object):
            self.problems.append(f"found {_format(value)}, expected one JSON object per line")
            return None
        for key, count in Counter(key for key, _ in value.pairs).items():
            if key not in REQUIRED + OPTIONAL:
                self._problem(ascii(key)[1:-1], "unknown key", "one of " + ", ".join(REQUIRED + OPTIONAL))
            if count > 1:
                self._problem(ascii(key)[1:-1], "duplicate key", "each key once")
        fields = dict(value.pairs)
        self.problems += [f"{key}: missing" for key in REQUIRED if key not in fields]
        return fields

    def _task_type(self, value: Any) -> None:
        if value == self.task:
            return
        if value in ("ir", "sts"):
            self.problems.append(
                f"task_type: '{value}' in {self.task} data, expected '{self.task}'; "
                f"if all of the file is {value} data, move it from data.{self.task} to data.{value}"
            )
        else:
            self._problem("task_type", _format(value), f"'{self.task}'")

    def _triple(self, field: str, value: Any) -> Triple:
        match value:
            case [str(), str(), str()]:
                triple = Triple.stripped(*value)
            case _:
                self._problem(field, _format(value), TRIPLE)
                return INVALID
        try:
            "".join(triple).encode()
        except UnicodeEncodeError:
            self._problem(field, "unpaired surrogate (\\ud800 to \\udfff)", "valid Unicode")
        if not triple.text.strip():
            self._problem(field, "empty text", "a text as the third string")
        return triple

    def _triples(self, field: str, value: Any) -> list[Triple] | None:
        if type(value) is not list:
            self._problem(field, _format(value), f"a list of items that are each {TRIPLE}")
            return None
        return [self._triple(f"{field}[{i}]", item) for i, item in enumerate(value)]

    def _scores(self, field: str, value: Any, triples: list[Triple] | None) -> list[float] | None:
        if type(value) is not list:
            self._problem(field, _format(value), "a list of numbers")
            return None
        scores = [self._score(f"{field}[{i}]", item) for i, item in enumerate(value)]
        if scores and triples is not None and len(scores) != len(triples):
            texts = field.replace("_scores", "s")
            self._problem(field, f"{len(scores)} scores for {len(triples)} {texts}", "one score for each, or none")
        return scores

    def _score(self, field: str, value: Any) -> float:
        try:
            score = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            score = math.inf
        if not abs(score) <= MAX_ABS_SCORE:
            self._problem(field, _format(value), "a finite number between -1e15 and 1e15")
        return score


def _format(value: Any) -> str:
    """Formats a JSON value for an error message, shortened and safe to print."""
    if isinstance(value, _Object):
        return "an object"
    if isinstance(value, list):
        return f"a list of length {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a huge number"  # str() rejects integers with thousands of digits
    try:
        text = json.dumps(value, ensure_ascii=False)
    except ValueError:
        text = ascii(value)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 60 else text[:57] + "..."
