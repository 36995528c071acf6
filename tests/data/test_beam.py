"""Tests that Apache Beam writes the same datasets as processes do. Skipped where Beam is not installed."""

import importlib.util

import numpy as np
import pytest

from codiemb_jax.data import beam
from codiemb_jax.data import prepare as module
from codiemb_jax.data.beam import check_runner
from codiemb_jax.data.index import DTYPES
from codiemb_jax.data.prepare import prepare
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import PromptTokenizer
from tests.data.test_prepare import LIMITS, PROMPT, rows_on_disk, write_ir

needs_beam = pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs apache-beam")


@pytest.fixture
def prompt_tokenizer(tokenizer) -> PromptTokenizer:
    return PromptTokenizer(tokenizer, PROMPT)


@needs_beam
@pytest.mark.parametrize("shard_bytes", [2**26, 20_000])
def test_beam_writes_the_same_dataset(tmp_path, prompt_tokenizer, monkeypatch, shard_bytes):
    monkeypatch.setattr(beam, "SHARD_BYTES", shard_bytes)
    path = write_ir(tmp_path / "a.jsonl")
    expected = prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "one", **LIMITS)
    monkeypatch.setattr(module, "MIN_PART_BYTES", 5000)
    data = prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "two", beam_runner="DirectRunner", **LIMITS)
    assert data.folder.name == expected.folder.name
    assert (len(list(data.folder.rglob("*.array_record*"))) > 1) == (shard_bytes < 2**26)
    assert rows_on_disk(data) == rows_on_disk(expected)
    assert data.totals == expected.totals
    for name in DTYPES:
        assert np.array_equal(getattr(data.index, name), getattr(expected.index, name))
    for actual, other in zip(data.read(np.arange(300))[0], expected.read(np.arange(300))[0], strict=True):
        assert np.array_equal(actual, other)
    assert sorted(entry.name for entry in data.folder.iterdir()) == ["00000", "index"]
    assert list((tmp_path / "two").iterdir()) == [data.folder]


@needs_beam
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "^invalid ir data:\n  .*a.jsonl:1: invalid JSON.*$"),
        (["", " "], "a.jsonl: the file is empty"),
    ],
)
def test_beam_reports_problems(lines, message, tmp_path, prompt_tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=message):
        prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "cache", beam_runner="DirectRunner", **LIMITS)
    assert list((tmp_path / "cache").iterdir()) == []


@needs_beam
def test_beam_lists_problems_of_all_lines(tmp_path, prompt_tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MIN_PART_BYTES", 5000)
    path = write_ir(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    for number in (9, len(lines) - 1):
        lines[number] = "{"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=f":10: invalid JSON.*\n.*:{len(lines)}: invalid JSON"):
        prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "cache", beam_runner="DirectRunner", **LIMITS)
    assert list((tmp_path / "cache").iterdir()) == []


@needs_beam
def test_unknown_runner_raises_user_error():
    check_runner("DirectRunner")
    with pytest.raises(UserError, match="--beam Other: no such runner"):
        check_runner("Other")


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_missing_beam_raises_user_error():
    with pytest.raises(UserError, match=r'not installed; pip install "codiemb-jax\[beam\]"'):
        check_runner("DirectRunner")
