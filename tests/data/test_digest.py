"""Tests digests of data files, and that remembered ones are not used for a file that has changed."""

import hashlib
import os
from pathlib import Path

import pytest

from codiemb_jax.data import digest as module
from codiemb_jax.data.digest import file_digest


@pytest.fixture
def computed(monkeypatch) -> list[Path]:
    """Makes all files large enough, and returns those whose content has been read."""
    read: list[Path] = []
    compute = module._compute

    def record(path: Path) -> str:
        read.append(path)
        return compute(path)

    monkeypatch.setattr(module, "_compute", record)
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 4)
    monkeypatch.setattr(module, "SETTLED_SECONDS", -1)
    return read


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_digest_of_an_unchanged_file_is_remembered(tmp_path, computed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"content")
    assert [file_digest(path, tmp_path / "cache") for _ in range(3)] == [sha256(b"content")] * 3
    assert len(computed) == 1
    assert file_digest(path, tmp_path / "other cache") == sha256(b"content")
    assert len(computed) == 2


def replace(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(b"changed")
    times = path.stat()
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(path)


def change_in_place(path: Path) -> None:
    times = path.stat()
    with path.open("r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time of the change of the inode stays


@pytest.mark.parametrize(
    "change",
    [replace, change_in_place, lambda path: path.write_bytes(b"changed"), lambda path: path.open("ab").write(b"!")],
)
def test_change_is_noticed(change, tmp_path, computed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"content")
    file_digest(path, tmp_path / "cache")
    change(path)
    assert file_digest(path, tmp_path / "cache") == sha256(path.read_bytes()) != sha256(b"content")


def test_file_that_changed_a_moment_ago_is_not_remembered(tmp_path, computed, monkeypatch):
    monkeypatch.setattr(module, "SETTLED_SECONDS", 60)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"content")
    for _ in range(2):
        file_digest(path, tmp_path / "cache")
    assert len(computed) == 2 and not (tmp_path / "cache").exists()


def test_small_files_are_read_each_time(tmp_path, computed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc")
    assert [file_digest(path, tmp_path / "cache") for _ in range(2)] == [sha256(b"abc")] * 2
    assert len(computed) == 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"file": 1, "digest": 2}'])
def test_damaged_memory_is_ignored(content, tmp_path, computed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"content")
    file_digest(path, tmp_path / "cache")
    (remembered,) = (tmp_path / "cache" / "digests").iterdir()
    remembered.write_text(content)
    assert file_digest(path, tmp_path / "cache") == sha256(b"content")
    assert len(computed) == 2
