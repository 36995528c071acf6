"""Reads retrieval data in the format of BEIR (https://github.com/beir-cellar/beir).

A folder contains `corpus.jsonl` (`_id`, `text`, optionally `title`), `queries.jsonl` (`_id`, `text`), and judgments in
`qrels/test.tsv`: after a header, lines of query id, document id and integer gain, separated by tabs.
"""

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from codiemb_jax.cache import cache_folder, shown
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import is_unicode
from codiemb_jax.remote import Location, fetch, list_files
from codiemb_jax.text.plain import decode_line, parse_object

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
SPLITS = ("test.tsv", "dev.tsv")
"""Files with judgments, in the order of preference."""
HEADER = ["query-id", "corpus-id", "score"]
MAX_GAIN = 1000
"""trec_eval's memory grows with the gain."""


class Document(NamedTuple):
    """A document of a corpus."""

    id: str
    text: str
    """Title and text, without spaces at both ends; may be empty."""


@dataclass(frozen=True)
class BeirFolder:
    """A folder whose files have been checked. The corpus stays on disk."""

    path: Path
    queries: dict[str, tuple[int, str]]
    """Line number and text of each query that has judgments, by id."""
    relevant: list[dict[str, int]]
    """For each of `queries`, the gains of its judged documents by id."""
    documents: int
    """Number of documents."""

    def blocks(self, size: int) -> Iterator[list[Document]]:
        """Yields the corpus in blocks of at most `size` documents.

        Raises:
          UserError: If the file has changed since it was checked.
        """
        problems: list[str] = []
        count, block = 0, []
        for _, document in _read_corpus(self.path / CORPUS, problems):
            block.append(document)
            if len(block) == size:
                yield block
                count, block = count + size, []
        if block:
            yield block
        if problems or count + len(block) != self.documents:
            raise UserError(f"{shown(self.path / CORPUS)}: has changed while it was used; start again")


def find_folders(locations: Sequence[Location], setting: str) -> list[Path]:
    """Returns the folders at some locations. Copies remote ones.

    Args:
      locations: The folders.
      setting: Name of the setting with the locations, for error messages.

    Raises:
      UserError: If a folder does not exist or is given twice.
    """
    folders: dict[Path, Path] = {}
    for location in locations:
        path = location if isinstance(location, Path) else _fetch(location)
        if not is_unicode(str(path)):
            raise UserError(f"{setting}: {ascii(str(path))}: the name is not valid UTF-8; rename the folder")
        try:
            resolved = path.resolve()
            if not path.is_dir():
                found = "is not a folder" if path.exists() else "no such folder"
                raise UserError(f"{setting}: {path}: {found}; give a folder with {CORPUS}, {QUERIES} and {QRELS}")
        except (OSError, RuntimeError) as error:  # RuntimeError: circular links
            raise UserError(f"{setting}: {shorten(str(path))}: cannot be read: {error}") from error
        if resolved in folders:
            raise UserError(f"{setting}: {path}: the same folder is listed twice; list it once")
        folders[resolved] = path if path.name not in ("", "..") else resolved
    return list(folders.values())


def _fetch(location: epath.Path) -> Path:
    wanted = {
        name: file
        for name, file in list_files(location).items()
        if name in (CORPUS, QUERIES) or re.fullmatch(rf"{QRELS}/[^/]+\.tsv", name)
    }
    if not wanted:
        raise UserError(f"{location}: contains no {CORPUS}, {QUERIES} and {QRELS}")
    return fetch(location, wanted, cache_folder())


def read_folder(path: Path, split: str | None = None) -> BeirFolder:
    """Reads queries and judgments, and checks the corpus.

    Args:
      path: The folder.
      split: The split whose judgments are read. None means test, else dev, else the only one.

    Raises:
      UserError: If a file is missing or invalid.
    """
    problems: list[str] = []
    documents = {name for _, (name, _) in _unique(path / CORPUS, _read_corpus(path / CORPUS, problems), problems)}
    queries = {
        name: (line, text)
        for line, (name, text) in _unique(path / QUERIES, _read_queries(path / QUERIES, problems), problems)
    }
    judgments = _find_judgments(path / QRELS, split)
    relevant = _read_judgments(judgments, None if problems else (queries.keys(), documents), problems)
    if problems:
        raise UserError(f"invalid BEIR data:\n{format_problems(problems)}")
    if not relevant:
        raise UserError(f"{shown(judgments)}: contains no judgments")
    judged = {name: query for name, query in queries.items() if name in relevant}
    return BeirFolder(path, judged, [relevant[name] for name in judged], len(documents))


def _unique(path: Path, entries: Iterator[tuple[int, Document]], problems: list[str]) -> Iterator[tuple[int, Document]]:
    """Yields entries whose ids have not occurred before. Others, and the lack of any, are added to the problems."""
    lines: dict[str, int] = {}
    for line, entry in entries:
        if entry.id in lines:
            other = lines[entry.id]
            problems.append(
                f"{shown(path)}:{line}: _id {shorten(entry.id)!r}: is also in line {other}, expected unique ids"
            )
        else:
            lines[entry.id] = line
            yield line, entry
    if not lines and not problems:
        problems.append(f"{shown(path)}: the file is empty, expected one JSON object per line")


def _read_corpus(path: Path, problems: list[str]) -> Iterator[tuple[int, Document]]:
    """Yields line numbers and documents, with the text that MTEB gives to models."""
    for line, fields in _read_objects(path, problems):
        title, text = (fields.get(name) for name in ("title", "text"))
        if title is not None and not isinstance(title, str):
            problems.append(f"{shown(path)}:{line}: title: not a string")
        elif not isinstance(text, str):
            problems.append(f"{shown(path)}:{line}: text: missing or not a string")
        else:
            yield line, Document(fields["_id"], (f"{title} {text}" if title else text).strip())


def _read_queries(path: Path, problems: list[str]) -> Iterator[tuple[int, Document]]:
    for line, fields in _read_objects(path, problems):
        text = fields.get("text")
        if not isinstance(text, str) or not text.strip():
            problem = "empty text" if isinstance(text, str) else "missing or not a string"
            problems.append(f"{shown(path)}:{line}: text: {problem}, expected the text of the query")
        else:
            yield line, Document(fields["_id"], text)


def _read_objects(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line numbers and objects with a valid `_id`."""
    for number, line in _read_lines(path):
        try:
            fields = parse_object(decode_line(line, number))
            name = fields.get("_id")
            if not isinstance(name, str) or not name or "\0" in name:
                raise ValueError("_id: missing, empty or not a string")
            # Unpaired surrogates, which only escapes can write.
            "".join(value for key in ("_id", "title", "text") if isinstance(value := fields.get(key), str)).encode()
        except UnicodeError as error:
            reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else "contains an unpaired surrogate"
            problems.append(f"{shown(path)}:{number}: {reason}")
        except ValueError as error:
            problems.append(f"{shown(path)}:{number}: {shorten(str(error), 200)}")
        else:
            yield number, fields


def _read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that are not empty, and their numbers."""
    try:
        if not path.is_file():  # reading a pipe would block
            problem = "is not a file" if path.exists() else "no such file"
            raise UserError(f"{shown(path)}: {problem}; a BEIR folder has {CORPUS}, {QUERIES} and {QRELS}")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {error.strerror}") from error


def _find_judgments(folder: Path, split: str | None) -> Path:
    """Returns the file with the judgments of a split, see `read_folder`."""
    try:
        files = {file.name: file for file in folder.iterdir() if file.suffix == ".tsv"} if folder.is_dir() else {}
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be read: {error.strerror}") from error
    found = ", ".join(sorted(map(shorten, files))) or "none"
    if split is not None:
        if f"{split}.tsv" not in files:
            raise UserError(f"{shown(folder)}: no split {shorten(split)!r}, found {found}")
        return files[f"{split}.tsv"]
    names = [name for name in SPLITS if name in files] or list(files)
    if not names or (len(names) > 1 and names[0] not in SPLITS):
        raise UserError(f"{shown(folder)}: expected test.tsv, dev.tsv, or a single other .tsv file, found {found}")
    return files[names[0]]


def _read_judgments(
    path: Path, known: tuple[Container[str], Container[str]] | None, problems: list[str]
) -> dict[str, dict[str, int]]:
    """Returns the gain of each judged document by query.

    Args:
      path: The file.
      known: The ids of queries and of documents, if their files are valid.
      problems: Problems are added to this list.
    """
    relevant: dict[str, dict[str, int]] = {}
    header = False
    for number, line in _read_lines(path):
        try:
            values = decode_line(line, number).rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            problems.append(f"{shown(path)}:{number}: not valid UTF-8")
            continue
        if not header:
            header = True
            if values != HEADER:
                expected = "<tab>".join(HEADER)
                problems.append(f"{shown(path)}:{number}: expected the header {expected}")
                if len(values) != 3:
                    break
            continue
        if problem := _judgment_problem(values, known, relevant):
            problems.append(f"{shown(path)}:{number}: {problem}")
        else:
            relevant.setdefault(values[0], {})[values[1]] = int(values[2])
    return relevant


def _judgment_problem(
    values: Sequence[str], known: tuple[Container[str], Container[str]] | None, relevant: dict[str, dict[str, int]]
) -> str | None:
    if len(values) != 3:
        return f"{len(values)} columns, expected query id, document id and gain, separated by tabs"
    query, document, gain = values
    if not re.fullmatch(r"[+-]?[0-9]{1,9}", gain) or abs(int(gain)) > MAX_GAIN:
        return f"score: {shorten(gain)!r}, expected an integer from -{MAX_GAIN} to {MAX_GAIN}"
    for field, name, names, file in (
        ("query-id", query, known and known[0], QUERIES),
        ("corpus-id", document, known and known[1], CORPUS),
    ):
        if names is not None and name not in names:
            return f"{field}: {shorten(name)!r} is not an _id in {file}"
    if document in relevant.get(query, {}):
        return f"query {shorten(query)!r} and document {shorten(document)!r} are judged twice, expected once"
    return None
