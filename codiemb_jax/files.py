"""Files: read with a word on what is wrong, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from codiemb_jax.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path, kind: type[dict] | type[list]) -> Any:
    """A JSON file that holds an object or a list.  UserError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected a JSON {'list' if kind is list else 'object'}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that people may read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_new(path: Path, flag: str) -> None:
    """UserError unless a folder can be made at `path`; nothing is left there."""
    made: list[Path] = []
    try:
        if path.exists():
            raise UserError(f"{flag} {path}: already exists; give a folder that does not")
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be made: {error.strerror}") from error
    finally:
        for folder in reversed(made):
            folder.rmdir()
