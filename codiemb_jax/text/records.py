"""The unified data format: parse, validate, say what is wrong and where."""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from codiemb_jax.batch import Task
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.files import is_unicode

ENDINGS = (".json", ".jsonl")
REQUIRED = ("task_type", "query", "positives")
OPTIONAL = ("negatives", "positive_scores", "negative_scores", "meta_data")
"""`meta_data` may hold anything and is not read, as in the original."""
LARGEST_SCORE = 1e15
"""Steps compute with squares of scores in float32."""
TRIPLE = "a list of three strings [task instruction, instance instruction, text]"


class Triple(NamedTuple):
    """A text with its instructions; tabs, newlines, blanks and colons are stripped at both ends of each."""

    task: str
    instance: str
    text: str

    @classmethod
    def of(cls, task: str, instance: str, text: str) -> "Triple":
        """Strips the parts."""
        return cls(*(part.strip("\t\n :") for part in (task, instance, text)))


NOTHING = Triple("", "", "")
"""Stands for a triple that has a problem, until the line is given up."""


class Record(NamedTuple):
    """One line of a data file.

    STS: `positives` holds the pair's second text alone, `negatives` is empty.  IR: `score` is None.
    """

    line: int
    """Counted from 1."""
    query: Triple
    positives: tuple[Triple, ...]
    negatives: tuple[Triple, ...]
    score: float | None


def find_files(paths: Sequence[Path], setting: str) -> list[Path]:
    """Data files under `paths`, sorted by path so that every host has the same order.

    Args:
      paths: .json/.jsonl files, or folders that are searched for such files at any depth.
      setting: name of the setting that lists the paths, for messages.

    Raises:
      UserError: a path is missing, no such file, or holds none; or a file is listed twice.
    """
    files: list[Path] = []
    problems: list[str] = []
    for path in paths:
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                found = [file for file in path.rglob("*") if file.suffix in ENDINGS and file.is_file()]
                if not found:
                    problems.append(f"{path}: the folder holds no .json or .jsonl file")
                files += found
            elif not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and can be read only once
                problems.append(f"{path}: is neither a file nor a folder")
            elif path.suffix not in ENDINGS:
                problems.append(f"{path}: expected a .json or .jsonl file, one JSON object per line, or a folder")
            else:
                files.append(path)
        except FileNotFoundError:
            problems.append(f"{path}: no such file or folder")
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
    problems += [
        f"{ascii(str(file))}: the name is not valid UTF-8; rename the file"
        for file in files
        if not is_unicode(str(file))
    ]
    problems += [
        f"{file}: cannot be read; give yourself the right to" for file in files if not os.access(file, os.R_OK)
    ]
    same: dict[tuple[int, int], list[Path]] = {}
    for file in files:
        status = file.stat()  # the same file through links, soft or hard
        same.setdefault((status.st_dev, status.st_ino), []).append(file)
    for names in same.values():
        if len(names) > 1:
            problems.append(f"{' and '.join(map(str, names))}: the same file {len(names)} times; list each file once")
    if problems:
        raise UserError(f"{setting}:\n{format_problems(problems)}")
    return sorted(files)


def data_set_names(files: Sequence[Path]) -> list[str]:
    """A name for each file, by which metrics call it: its stem, or as much of its path as tells it from the others."""
    for name in (lambda file: file.stem, lambda file: file.name):
        counts = Counter(map(name, files))
        if max(counts.values(), default=0) <= 1:
            return [name(file) for file in files]
    return [str(file) for file in files]


def read_records(path: Path, task: Task) -> Iterator[Record]:
    """Streams the records of a file.

    Once a line is found wrong, the rest of the file is checked but not given out.

    Raises:
      UserError: at the end of the file, with every problem as `FILE:LINE: field: what, what is expected`.
    """
    problems: list[str] = []
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            record = _Line(number, task).parse(line)
            if isinstance(record, Record):
                if not problems:
                    yield record
            else:
                problems += [f"{path}:{number}: {problem}" for problem in record]
    if empty:
        raise UserError(f"{path}: the file is empty, expected one JSON object per line")
    if problems:
        raise UserError(f"the {task} data cannot be used:\n{format_problems(problems)}")


class _Object:
    """A JSON object as it stands in the file: a dict would hide that a key appears twice."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        self.pairs = pairs


class _Line:
    """Checks one line; goes on after a problem so that all of them are told at once."""

    def __init__(self, number: int, task: Task):
        self.number = number
        self.task = task
        self.problems: list[str] = []

    def parse(self, line: bytes) -> Record | list[str]:
        """The record, or what is wrong with it."""
        fields = self._fields(line)
        if fields is None:
            return self.problems
        self._task_type(fields.get("task_type", self.task))  # what is missing is reported already
        query = self._triple("query", fields["query"]) if "query" in fields else NOTHING
        positives = self._triples("positives", fields["positives"]) if "positives" in fields else None
        negatives = self._triples("negatives", fields.get("negatives", []))
        scores = self._scores("positive_scores", fields.get("positive_scores", []), positives)
        self._scores("negative_scores", fields.get("negative_scores", []), negatives)
        if positives == []:
            self._problem("positives", "empty", "at least one")
        if self.task == "sts" and scores == []:
            self._problem("positive_scores", "empty", "the score of the pair")
        if self.problems or not positives:
            return self.problems
        if self.task == "sts" and scores:
            return Record(self.number, query, tuple(positives[:1]), (), scores[0])
        return Record(self.number, query, tuple(positives), tuple(negatives or ()), None)

    def _problem(self, field: str, wrong: str, expected: str) -> None:
        self.problems.append(f"{field}: {wrong}, expected {expected}")

    def _fields(self, line: bytes) -> dict[str, Any] | None:
        try:
            value = json.loads(line.decode("utf-8"), object_pairs_hook=_Object)
        except UnicodeDecodeError as error:
            self.problems.append(f"byte {error.start + 1} is not valid UTF-8, expected UTF-8 text")
            return None
        except (ValueError, RecursionError) as error:
            # Not JSONDecodeError alone: a number of thousands of digits is a bare ValueError.
            self.problems.append(f"invalid JSON ({error}), expected one JSON object per line")
            return None
        if not isinstance(value, _Object):
            self.problems.append(f"{_shown(value)} is not an object, expected one JSON object per line")
            return None
        for key, times in Counter(key for key, _ in value.pairs).items():
            if key not in REQUIRED + OPTIONAL:
                self._problem(ascii(key)[1:-1], "unknown key", "one of " + ", ".join(REQUIRED + OPTIONAL))
            if times > 1:
                self._problem(ascii(key)[1:-1], f"appears {times} times", "each key once")
        fields = dict(value.pairs)
        self.problems += [f"{key}: missing" for key in REQUIRED if key not in fields]
        return fields

    def _task_type(self, value: Any) -> None:
        if value == self.task:
            return
        if value in ("ir", "sts"):
            self.problems.append(
                f"task_type: '{value}' in a file of {self.task} data, expected '{self.task}'; "
                f"if the whole file is {value} data, move it from data.{self.task} to data.{value}"
            )
        else:
            self._problem("task_type", _shown(value), f"'{self.task}'")

    def _triple(self, field: str, value: Any) -> Triple:
        if type(value) is not list or len(value) != 3 or not all(isinstance(part, str) for part in value):
            self._problem(field, _shown(value), TRIPLE)
            return NOTHING
        triple = Triple.of(*value)
        try:
            "".join(triple).encode()
        except UnicodeEncodeError:
            self._problem(field, "half a surrogate pair (\\ud800 to \\udfff)", "valid Unicode")
        if not triple.text.strip():
            self._problem(field, "the text is empty", "a text (its third part)")
        return triple

    def _triples(self, field: str, value: Any) -> list[Triple] | None:
        if type(value) is not list:
            self._problem(field, _shown(value), f"a list; each item {TRIPLE}")
            return None
        return [self._triple(f"{field}[{i}]", item) for i, item in enumerate(value)]

    def _scores(self, field: str, value: Any, triples: list[Triple] | None) -> list[float] | None:
        if type(value) is not list:
            self._problem(field, _shown(value), "a list of numbers")
            return None
        scores = [self._score(f"{field}[{i}]", item) for i, item in enumerate(value)]
        if scores and triples is not None and len(scores) != len(triples):
            texts = field.replace("_scores", "s")
            self._problem(field, f"{len(scores)} scores for {len(triples)} {texts}", "one for each, or none")
        return scores

    def _score(self, field: str, value: Any) -> float:
        try:
            score = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            score = math.inf
        if not abs(score) <= LARGEST_SCORE:
            self._problem(field, _shown(value), "a finite number, at most 1e15")
        return score


def _shown(value: Any) -> str:
    """A JSON value, short enough for a message and safe to print."""
    if isinstance(value, _Object):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a huge number"  # str() refuses integers of thousands of digits
    try:
        shown = json.dumps(value, ensure_ascii=False)
    except ValueError:
        shown = ascii(value)
    shown = shown.encode("utf-8", "backslashreplace").decode("utf-8")
    return shown if len(shown) <= 60 else shown[:57] + "..."
