"""A run that is killed and started again leaves what an undisturbed one leaves."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def lines_of(path: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock says; a half-written last one counts as none."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [
        {name: value for name, value in json.loads(line).items() if name != "seconds"}
        for line in lines
        if line.endswith("\n")
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, golden):
    """Output folders of an undisturbed run, and of one killed three times."""
    folder = tmp_path_factory.mktemp("resume")
    configs = {}
    for name in ("undisturbed", "killed"):
        configs[name] = folder / f"{name}.yaml"
        configs[name].write_text(SETTINGS.format(output_dir=folder / name, golden=golden))
    finish(start(configs["undisturbed"], folder / "cache"))
    # Before the first checkpoint, right after a line that one covers, and late, with old checkpoints removed.
    for lines in (1, 6, 11):
        process = start(configs["killed"], folder / "cache")
        deadline = time.monotonic() + 200
        while len(lines_of(folder / "killed" / "metrics.jsonl")) < lines:
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.wait()
    output = finish(start(configs["killed"], folder / "cache"))
    return folder, output


def test_metrics_are_those_of_an_undisturbed_run(runs) -> None:
    folder, _ = runs
    expected = lines_of(folder / "undisturbed" / "metrics.jsonl")
    assert [line["step"] for line in expected] == list(range(STEPS))
    assert lines_of(folder / "killed" / "metrics.jsonl") == expected


def test_weights_are_those_of_an_undisturbed_run(runs) -> None:
    folder, _ = runs
    exports = [(folder / name / "export" / "model.safetensors").read_bytes() for name in ("undisturbed", "killed")]
    assert exports[0] == exports[1]


def test_it_did_continue(runs) -> None:
    _, output = runs
    assert "continuing from step" in output


def test_a_finished_run_stays_as_it_is(runs) -> None:
    folder, _ = runs
    metrics = folder / "undisturbed" / "metrics.jsonl"
    before = metrics.read_text()
    finish(start(folder / "undisturbed.yaml", folder / "cache"))
    assert metrics.read_text() == before


def test_other_settings_do_not_continue_a_run(runs) -> None:
    folder, _ = runs
    other = folder / "other.yaml"
    other.write_text((folder / "undisturbed.yaml").read_text().replace("1.0e-3", "2.0e-3"))
    process = start(other, folder / "cache")
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 2
    assert "optimizer.learning_rate: was 0.001, now 0.002" in output
    assert "Traceback" not in output


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_serves(runs, tmp_path) -> None:
    folder, _ = runs
    shutil.copytree(folder / "undisturbed", tmp_path / "damaged")
    config = tmp_path / "damaged.yaml"
    undisturbed = (folder / "undisturbed.yaml").read_text()
    config.write_text(undisturbed.replace(str(folder / "undisturbed"), str(tmp_path / "damaged")))
    newest = tmp_path / "damaged" / "checkpoints" / str(STEPS)
    max((newest / "params").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()).write_bytes(b"")
    process = start(config, folder / "cache")
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 2
    assert f"error: {newest}: the checkpoint cannot be read" in output
    shutil.rmtree(newest)
    finish(start(config, folder / "cache"))
    names = ("undisturbed", "damaged")
    lines, again = (
        lines_of(parent / name / "metrics.jsonl") for parent, name in zip((folder, tmp_path), names, strict=True)
    )
    assert again == lines
