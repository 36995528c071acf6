"""Decodes lines of files, and parses those of formats other than that of the training data."""

import json
from typing import Any, NamedTuple

from codiemb_jax.files import is_unicode


class TitledText(NamedTuple):
    """A text and its title, which may be empty."""

    title: str
    text: str


def decode_line(line: bytes, number: int) -> str:
    """Decodes a line of UTF-8 text. The first one, number 1, may start with a byte-order mark, which is left out.

    Raises:
      UnicodeDecodeError: If it is not UTF-8.
    """
    text = line.decode()
    return text.removeprefix("\ufeff") if number == 1 else text


def parse_object(line: str) -> dict[str, Any]:
    """Parses an object.

    Raises:
      ValueError: If the line is something else.
    """
    record = _parse(line)
    if not isinstance(record, dict):
        raise ValueError("expected one JSON object per line")
    return record


def parse_text(line: str) -> TitledText:
    """Parses an object with a `text` and optionally a `title`.

    Raises:
      ValueError: If the line is something else.
    """
    record = _parse(line)
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('text: missing or not a string, expected an object like {"text": "..."}')
    title = record.get("title")
    if not isinstance(title, str | None):
        raise ValueError("title: expected a string")
    found = TitledText(title or "", record["text"])
    if not is_unicode(found):
        raise ValueError("text: unpaired surrogate (\\ud800 to \\udfff), expected valid Unicode")
    return found


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON ({error}), expected one JSON object per line") from error
