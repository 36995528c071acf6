"""Digests of data files, which are remembered for large files that have not changed."""

import hashlib
import time
from pathlib import Path

from codiemb_jax.errors import UserError
from codiemb_jax.files import read_json, write_json

REMEMBERED_BYTES = 2**28
"""Digests of files from this size on are remembered; smaller ones are read in a moment."""

SETTLED_SECONDS = 10
"""A digest is not remembered until the file is this old: a change soon after another may leave the same time stamp."""


def file_digest(path: Path, cache: Path) -> str:
    """Returns the SHA-256 digest of the content of a file.

    The digest of a large file is taken from `cache` if it is the same file as when the digest was computed, with the
    same size and the same times of the last change of its content and of its inode. Programs can set the former time,
    but not the latter.

    Args:
      path: The file.
      cache: The folder of all prepared datasets.
    """
    before = _status(path)
    if before["size"] < REMEMBERED_BYTES:
        return _compute(path)
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()
    remembered = cache / "digests" / f"{name[:32]}.json"
    try:
        content = read_json(remembered, dict)
        if content["file"] == before and isinstance(content["digest"], str):
            return content["digest"]
    except (UserError, KeyError):
        pass  # not there, or damaged
    now = time.time_ns()
    digest = _compute(path)
    settled = now - max(before["modified"], before["changed"]) > SETTLED_SECONDS * 10**9
    if settled and _status(path) == before:
        try:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            write_json(remembered, {"file": before, "digest": digest})
        except OSError:
            pass  # it is only recomputed; `prepare` reports a cache that cannot be written
    return digest


def _compute(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _status(path: Path) -> dict[str, int]:
    status = path.stat()
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "size": status.st_size,
        "modified": status.st_mtime_ns,
        "changed": status.st_ctime_ns,
    }
