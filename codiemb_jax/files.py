"""JSON reading with clear errors; atomic writes."""

import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from codiemb_jax.errors import UserError, shorten


def local_path(text: str) -> Path:
    """Returns the path of a local file or folder, with `~` expanded.

    Raises:
      ValueError: If it is the address of a remote file, or there is no home directory.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise ValueError("this address is not supported; give a local path, or in the settings a gs:// address")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"no home directory for {shorten(text.split('/')[0])}") from error


def temporary_path(path: Path) -> Path:
    """Returns a unique path in the same folder, for a file that will be renamed to `path`."""
    # File systems limit names to 255 bytes.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{name}.{secrets.token_hex(4)}.tmp")


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under a unique temporary name and renames it."""
    temporary = temporary_path(path)
    try:
        with temporary.open("x", encoding="utf-8") as file:  # "x" never follows an existing link
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, kind: type[dict] | type[list]) -> Any:
    """Reads a JSON file whose top level is an object (`kind` dict) or a list.

    Raises:
      UserError: If the file cannot be read, or its top level is of another type.
    """
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would block
            raise UserError(f"{path}: is not a file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, kind):
        raise UserError(f"{path}: expected a JSON {'list' if kind is list else 'object'}")
    if not is_unicode(content):
        raise UserError(f"{path}: contains an unpaired surrogate (\\ud800 to \\udfff)")
    return content


def is_unicode(content: Any) -> bool:
    """Whether all strings in a JSON value can be encoded as UTF-8; unpaired surrogates cannot."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def write_json(path: Path, content: Any) -> None:
    """Writes an indented JSON file atomically."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def is_bare_name(name: Any) -> bool:
    """Whether a value is the name of a file or folder without a path."""
    return isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\0" not in name


def check_new_file(path: Path, *endings: str) -> None:
    """Checks that the file of the flag --output can be created.

    Args:
      path: The file.
      *endings: The endings of its name that are allowed.

    Raises:
      UserError: If it exists, its folder does not, or its name ends otherwise.
    """
    if path.suffix not in endings:
        raise UserError(f"--output {path}: expected a name that ends in {' or '.join(endings)}")
    try:
        if not path.parent.is_dir():
            raise UserError(f"--output {path}: there is no folder {path.parent}; create it first")
        with suppress(FileNotFoundError):
            path.lstat()
            raise UserError(f"--output {path}: already exists; give a new file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # the folder can be written
    except OSError as error:
        raise UserError(f"--output {shorten(str(path))}: cannot be written: {error.strerror}") from error


def check_new_folder(path: Path, flag: str, *inputs: Path) -> None:
    """Checks that a folder can be created at `path`, outside the input folders, without leaving anything behind.

    Args:
      path: The folder.
      flag: The flag that sets `path`, for error messages.
      *inputs: Folders that the program reads.

    Raises:
      UserError: If the folder exists, cannot be created, or is inside an input folder.
    """
    created: list[Path] = []
    try:
        if not is_unicode(str(path)):
            raise UserError(f"{flag} {ascii(str(path))}: the name is not valid UTF-8")
        if not is_bare_name(path.name):
            raise UserError(f"{flag} {path}: give the name of a new folder")
        path = path.parent.resolve() / path.name  # `..` may lead through a folder that does not exist
        if path.exists() or path.is_symlink():
            raise UserError(f"{flag} {path}: already exists; give a new folder")
        for folder in inputs:
            if path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{flag} {path}: is inside the input folder {folder}; give a folder outside it")
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir()
                created.append(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: circular links
        raise UserError(f"{flag} {path}: cannot be created: {getattr(error, 'strerror', error)}") from error
    finally:
        for folder in reversed(created):
            folder.rmdir()


def _remove(folder: Path) -> None:
    """Removes a folder. After an error, threads of libraries may still be writing to it for a moment."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary path at which to create a folder; renames it to `folder`, or removes it on an error.

    Raises:
      UserError: If `folder` exists or cannot be written.
    """
    folder = folder.parent.resolve() / folder.name
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        if folder.exists() or folder.is_symlink():
            raise UserError(f"{folder}: already exists")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.mkdir()
        except FileExistsError as error:
            raise UserError(f"{unfinished}: left over from an unfinished write; remove it") from error
        try:
            yield unfinished / folder.name
            (unfinished / folder.name).rename(folder)
        finally:
            _remove(unfinished)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder.parent):
            raise  # an error of reading, not of writing
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
