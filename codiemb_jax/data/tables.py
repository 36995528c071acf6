"""Reads tables of texts: CSV, TSV, JSON Lines, Parquet, and folders that Hugging Face datasets has saved."""

import csv
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from codiemb_jax.cache import shown
from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import is_bare_name, is_unicode, read_json
from codiemb_jax.text.plain import decode_line, parse_object

MAX_CELL_CHARACTERS = 2**31 - 1
"""Limit of `csv`, which by default is too low for long documents."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*DELIMITERS, ".jsonl", ".json", ".parquet")
STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files in folders of `Dataset.save_to_disk` and `DatasetDict.save_to_disk`."""


class Row(NamedTuple):
    """A row of a table."""

    location: str
    """File and line, or file and row, for error messages."""
    cells: dict[str, Any]
    """Values by name of their column."""


def read_table(path: Path, split: str, columns: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of a file or folder.

    Args:
      path: A file whose ending is in `ENDINGS`, or a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.
      split: The split to read of a folder with several.
      columns: The columns that must exist. In JSON Lines, each line can leave some out, but not all lines.

    Raises:
      UserError: If the file or folder cannot be read or has no such column or split.
    """
    try:
        if path.is_dir():
            yield from _read_saved(path, split, columns)
        elif not path.is_file():  # reading a pipe would block
            raise UserError(f"{shown(path)}: {'is not a file' if path.exists() else 'no such file or folder'}")
        elif path.suffix in DELIMITERS:
            yield from _read_csv(path, columns)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, columns)
        elif path.suffix in ENDINGS:
            yield from _read_json_lines(path, columns)
        else:
            raise UserError(f"{shown(path)}: expected a name that ends in one of {', '.join(ENDINGS)}")
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {error.strerror or error}") from error


def _check_columns(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    repeated = sorted({shorten(name) for name in found if found.count(name) > 1})
    if repeated:
        raise UserError(f"{shown(path)}: several columns are called {', '.join(repeated)}; rename them")
    for name in wanted:
        if name not in found:
            names = ", ".join(shorten(column) for column in found[:50]) or "none"
            raise UserError(f"{shown(path)}: no column {shorten(name)!r}; its columns: {names}")


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=DELIMITERS[path.suffix], strict=True)
        try:
            header = next(reader, [])
            _check_columns(path, header, columns)
            start = reader.line_num + 1
            for cells in reader:
                location, start = f"{shown(path)}:{start}", reader.line_num + 1
                if not cells:  # an empty line
                    continue
                if len(cells) != len(header):
                    raise UserError(f"{location}: {len(cells)} cells, expected {len(header)} as in the first line")
                yield Row(location, dict(zip(header, cells, strict=True)))
        except UnicodeDecodeError as error:
            raise UserError(f"{shown(path)}:{_undecodable_line(path)}: not valid UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{shown(path)}:{reader.line_num}: {error}") from error


def _undecodable_line(path: Path) -> int:
    """Returns the number of the first line that is not UTF-8. Text is decoded in blocks, so the error does not tell."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise UserError(f"{shown(path)}: changed while it was read; run again")


def _read_json_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    known: dict[str, None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            location = f"{shown(path)}:{number}"
            if not line.strip():
                continue
            try:
                cells = parse_object(decode_line(line, number))
            except UnicodeDecodeError as error:
                raise UserError(f"{location}: not valid UTF-8") from error
            except ValueError as error:
                raise UserError(f"{location}: {error}") from error
            if not is_unicode(cells):
                raise UserError(f"{location}: unpaired surrogate (\\ud800 to \\udfff), expected valid Unicode")
            known.update(dict.fromkeys(cells))
            yield Row(location, cells)
    if known:
        _check_columns(path, list(known), columns)


def _require_pyarrow(path: Path) -> None:
    if find_spec("pyarrow") is None:
        raise UserError(f"{shown(path)}: reading it needs pyarrow; run pip install pyarrow")


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    _require_pyarrow(path)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, columns)
            yield from _rows(path, 0, file.iter_batches(columns=list(columns)))
    except (ArrowException, ValueError) as error:
        raise UserError(f"{shown(path)}: not a readable Parquet file: {shorten(str(error), 200)}") from error


def _read_saved(path: Path, split: str, columns: Sequence[str]) -> Iterator[Row]:
    if (path / SPLITS).is_file():
        splits = read_json(path / SPLITS, dict).get("splits")
        if not isinstance(splits, list) or not all(is_bare_name(name) for name in splits):
            raise UserError(f"{shown(path / SPLITS)}: splits: expected a list of names")
        if split not in splits:
            raise UserError(f"{shown(path)}: no split {split!r}; give one of {', '.join(splits)}")
        path /= split
    if not (path / STATE).is_file():
        raise UserError(
            f"{shown(path)}: neither a BEIR folder (corpus.jsonl, queries.jsonl, qrels) nor a saved dataset ({STATE})"
        )
    _require_pyarrow(path)
    from pyarrow import ArrowException, ipc

    files = read_json(path / STATE, dict).get("_data_files")
    entries = files if isinstance(files, list) else []
    names = [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
    if not names or not all(is_bare_name(name) for name in names):
        raise UserError(f"{shown(path / STATE)}: _data_files: expected names of files in this folder")
    first = 0
    for name in names:
        try:
            with (path / name).open("rb") as file, ipc.open_stream(file) as stream:
                _check_columns(path, stream.schema.names, columns)
                for batch in stream:
                    yield from _rows(path, first, [batch.select(list(columns))])
                    first += len(batch)
        except (ArrowException, ValueError) as error:
            raise UserError(f"{shown(path / name)}: not a readable Arrow file: {shorten(str(error), 200)}") from error


def _rows(path: Path, first: int, batches: Any) -> Iterator[Row]:
    for batch in batches:
        for i, cells in enumerate(batch.to_pylist(), first + 1):
            yield Row(f"{shown(path)}: row {i}", cells)
        first += len(batch)
