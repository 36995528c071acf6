"""Tests the program that tokenizes data ahead of time."""

import json
from typing import Any

import pytest
import yaml

from codiemb_jax.cli import main as codiemb
from codiemb_jax.data import prepare as module
from codiemb_jax.errors import UserError
from tests.helpers import golden_settings, run

IR, STS = "data/news.jsonl", "data/questions.jsonl"


@pytest.fixture
def settings(golden, tmp_path, monkeypatch) -> dict[str, Any]:
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    data = {"ir": [str(golden / IR)], "sts": [str(golden / STS)]}
    return golden_settings(golden, tmp_path / "run", data=data, export=False, optimizer={"max_steps": 1})


def run_prepare(settings: dict[str, Any], folder, *flags: str) -> None:
    config = folder / "prepare.yaml"
    config.write_text(yaml.safe_dump(settings))
    codiemb(["prepare", "--config", str(config), *flags])


def test_training_finds_prepared_data(settings, golden, tmp_path, monkeypatch, capsys):
    run_prepare(settings, tmp_path)
    rows = [line.split()[1::2] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[:3] for row in rows] == [
        [name, task, str(len((golden / path).read_text(encoding="utf-8").splitlines()))]
        for name, task, path in (("news", "ir", IR), ("questions", "sts", STS))
    ]
    assert not (tmp_path / "run").exists()
    totals = {
        path.name.split("-")[0]: json.loads((path / "index" / "manifest.json").read_text())
        for path in (tmp_path / "cache").iterdir()
    }
    for row in rows:
        expected = [totals[row[0]][name] for name in ("tokens", "longest", "full")]
        assert [int(number.replace(",", "")) for number in row[3:]] == expected

    def fail(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(module, "write_dataset", fail)
    run(settings, tmp_path)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_data_is_prepared_without_the_accelerator(backend, settings, tmp_path):
    run_prepare(settings, tmp_path, "--model.attention_backend", backend, "--model.compute_dtype", "bfloat16")
    assert len(list((tmp_path / "cache").glob("*/index/manifest.json"))) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beam", "None"], "--beam (needs Apache Beam, which is not installed; pip install|None: no such runner)"),
        (["--data.ir", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--data.passage_max_tokens", "100000"], "may be at most"),
        (["--unknown", "1"], "--unknown"),
    ],
)
def test_mistakes_raise_user_error(flags, message, settings, tmp_path):
    with pytest.raises(UserError, match=message):
        run_prepare(settings, tmp_path, *flags)
    assert not (tmp_path / "cache").exists()


def test_cache_in_the_output_dir_raises_user_error(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "run" / "cache"))
    with pytest.raises(UserError, match="set CODIEMB_JAX_CACHE to another folder"):
        run_prepare(settings, tmp_path)
