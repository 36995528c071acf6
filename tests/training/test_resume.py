"""Tests that a run that is killed and resumed gives the same result as an uninterrupted run."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SETTINGS = """
output_dir: {output_dir}
model: {{path: {golden}/youtu_tiny}}
data:
  ir: [{golden}/data/news.jsonl]
  sts: [{golden}/data/questions.jsonl]
  ir_global_batch_size: 4
  sts_global_batch_size: 8
  query_max_tokens: 64
  passage_max_tokens: 64
objective: {{sts_list_size: null}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 2, epochs: 3}}
checkpoint: {{every_steps: 2, keep: 2}}
"""
STEPS = 12


def start(config: Path, cache: Path) -> subprocess.Popen:
    environment = os.environ | {"CODIEMB_JAX_CACHE": str(cache), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(config)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    return output.decode()


def read_metrics(path: Path) -> list[dict]:
    """Reads the complete lines of metrics.jsonl, without the measured times."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [
        {name: value for name, value in json.loads(line).items() if name != "seconds"}
        for line in lines
        if line.endswith("\n")
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, golden):
    """The folder with an uninterrupted run and a run that was killed three times, and the output of the last start."""
    folder = tmp_path_factory.mktemp("resume")
    configs = {}
    for name in ("uninterrupted", "killed"):
        configs[name] = folder / f"{name}.yaml"
        configs[name].write_text(SETTINGS.format(output_dir=folder / name, golden=golden))
    finish(start(configs["uninterrupted"], folder / "cache"))
    # Before the first checkpoint, at a checkpoint, and after old checkpoints have been deleted.
    for lines in (1, 6, 11):
        process = start(configs["killed"], folder / "cache")
        deadline = time.monotonic() + 200
        while len(read_metrics(folder / "killed" / "metrics.jsonl")) < lines:
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.wait()
    output = finish(start(configs["killed"], folder / "cache"))
    return folder, output


def test_resumed_run_has_same_metrics(runs) -> None:
    folder, _ = runs
    expected = read_metrics(folder / "uninterrupted" / "metrics.jsonl")
    assert [line["step"] for line in expected] == list(range(STEPS))
    assert read_metrics(folder / "killed" / "metrics.jsonl") == expected


def test_resumed_run_has_same_weights(runs) -> None:
    folder, _ = runs
    exports = [(folder / name / "export" / "model.safetensors").read_bytes() for name in ("uninterrupted", "killed")]
    assert exports[0] == exports[1]


def test_resumed_run_continues_from_a_checkpoint(runs) -> None:
    _, output = runs
    assert "continuing from step" in output


def test_restarting_a_finished_run_changes_nothing(runs) -> None:
    folder, _ = runs
    metrics = folder / "uninterrupted" / "metrics.jsonl"
    before = metrics.read_text()
    finish(start(folder / "uninterrupted.yaml", folder / "cache"))
    assert metrics.read_text() == before


def test_other_settings_exit_with_code_2(runs) -> None:
    folder, _ = runs
    other = folder / "other.yaml"
    other.write_text((folder / "uninterrupted.yaml").read_text().replace("1.0e-3", "2.0e-3"))
    process = start(other, folder / "cache")
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 2
    assert "optimizer.learning_rate: was 0.001, now 0.002" in output
    assert "Traceback" not in output


def test_damaged_checkpoint_exits_with_code_2_and_the_previous_one_can_be_used(runs, tmp_path) -> None:
    folder, _ = runs
    shutil.copytree(folder / "uninterrupted", tmp_path / "damaged")
    config = tmp_path / "damaged.yaml"
    text = (folder / "uninterrupted.yaml").read_text()
    config.write_text(text.replace(str(folder / "uninterrupted"), str(tmp_path / "damaged")))
    newest = tmp_path / "damaged" / "checkpoints" / str(STEPS)
    max((newest / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()).write_bytes(b"")
    process = start(config, folder / "cache")
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 2
    assert f"error: {newest}: the checkpoint cannot be read" in output
    shutil.rmtree(newest)
    finish(start(config, folder / "cache"))
    expected = read_metrics(folder / "uninterrupted" / "metrics.jsonl")
    assert read_metrics(tmp_path / "damaged" / "metrics.jsonl") == expected
