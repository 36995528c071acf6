"""Tests that trackers get the metrics of metrics.jsonl."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from codiemb_jax.errors import UserError
from tests.helpers import golden_settings, run

STEPS = 5


@pytest.fixture
def settings(golden, tmp_path, monkeypatch) -> dict[str, Any]:
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    data = golden / "data"
    return golden_settings(
        golden, tmp_path / "run", export=False, optimizer={"max_steps": STEPS}, data={"ir": [str(data / "news.jsonl")]},
        evaluation={"sts": [str(data / "small_questions.jsonl")], "every_steps": 2},
    )  # fmt: skip


def records(path: Path) -> Iterator[bytes]:
    """Yields the records of a file in LevelDB's log format, after a header of 7 bytes."""
    content, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:  # a block ends with zeros
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def history(folder: Path) -> dict[int, dict[str, float]]:
    """Returns the metrics that Weights & Biases has kept for later, by step."""
    from wandb.proto import wandb_internal_pb2

    found: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in records(path):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "history":
                values = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                step = values.pop("_step")
                # A later start repeats steps, which Weights & Biases ignores.
                found.setdefault(step, {}).update(values)
    return found


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_offline_weights_and_biases_get_all_metrics(settings, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    # In a process of its own, because wandb starts others.
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(config)]
    command += ["--tracking.wandb.project", "tests", "--tracking.wandb.mode", "offline"]
    command += ["--tracking.tensorboard", "false"]
    environment = os.environ | {"WANDB_API_KEY": "", "WANDB_ERROR_REPORTING": "false"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run"
    assert not (folder / "tensorboard").exists()
    found = history(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "evaluation" in line:
            expected = {f"evaluation/{name}": value for name, value in line["evaluation"].items()}
        else:
            expected = {
                "learning_rate": line["learning_rate"],
                **{f"ir/{name}": line[name] for name in ("loss", "info_nce", "grad_norm", "masked")},
            }
        assert {name: found[line["step"]].get(name) for name in expected} == expected
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5]
    run_id = json.loads((folder / "inputs.json").read_text())["id"]
    assert [path.stem for path in folder.glob("wandb/offline-run-*/*.wandb")] == [f"run-{run_id}"]


def test_run_without_trackers(settings, tmp_path):
    lines = run(settings, tmp_path, "--tracking.tensorboard", "false", "--tracking.wandb.project", "null")
    assert len(lines) == STEPS + 3
    assert not (tmp_path / "run" / "tensorboard").exists()


INVALID = {
    "mode: offline requires project": {"tracking": {"wandb": {"mode": "offline"}}},
    "tracking.wandb.mode: Input should be 'online' or 'offline'": {"tracking": {"wandb": {"mode": "shared"}}},
    "tracking.wandb.project: String should match pattern": {"tracking": {"wandb": {"project": "a/b"}}},
    "tracking.wandb.mode: offline requires a local output_dir": {
        "tracking": {"wandb": {"project": "p", "mode": "offline"}}, "output_dir": "gs://bucket/run",
    },
}  # fmt: skip


@pytest.mark.parametrize("message", INVALID)
def test_invalid_settings_raise_user_error(message, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings | INVALID[message]))
    with pytest.raises(UserError) as error:
        run(settings | INVALID[message], tmp_path)
    assert message in str(error.value)


def test_missing_weights_and_biases_is_named(settings, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    folder = SimpleNamespace(origin=None)  # a folder with this name, which is no package
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder if name == "wandb" else find_spec(name))
    with pytest.raises(UserError, match=r'Weights & Biases is not installed; run pip install "codiemb-jax\[wandb\]"'):
        run(settings | {"tracking": {"wandb": {"project": "p"}}}, tmp_path)
    assert not (tmp_path / "run").exists()
