"""Tests of a run that is stopped from outside, and of two runs in one folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from codiemb_jax.checkpoints.run_checkpoints import saved_steps
from codiemb_jax.config import Settings
from codiemb_jax.errors import UserError
from codiemb_jax.training.loop import train
from codiemb_jax.training.run import open_run, open_training_model
from codiemb_jax.training.run_folder import LOCK
from tests.helpers import assert_bitwise, golden_settings, load_weights, read_files, run


@pytest.fixture
def settings(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    return golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / "data" / "news.jsonl")]})


def stop_after_first_step(settings: dict[str, Any], folder: Path) -> str:
    """Starts a run, sends it SIGTERM once it has logged a step, and returns what it has written to stderr."""
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(config)]
    metrics, errors = folder / "run" / "metrics.jsonl", folder / "stderr"
    with errors.open("w") as stderr, subprocess.Popen(command, stderr=stderr, env=os.environ) as process:
        try:
            deadline = time.monotonic() + 200
            while not metrics.exists() or not metrics.read_text():
                assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
                time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 0, errors.read_text()
    return errors.read_text()


def test_sigterm_ends_a_long_run_with_a_checkpoint(settings, tmp_path):
    settings["optimizer"]["max_steps"] = 100_000
    settings["checkpoint"] = {"every_epochs": None}
    error = stop_after_first_step(settings, tmp_path)
    assert "stopped by SIGTERM; run the same command again to continue" in error
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0 < done < 10_000
    assert saved_steps(tmp_path / "run" / "checkpoints") == [done]
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_code_0(settings, tmp_path):
    expected = run({**settings, "output_dir": str(tmp_path / "whole")}, tmp_path)
    error = stop_after_first_step(settings, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    if "stopped by SIGTERM" in error:  # unless the run was faster
        done = len(metrics.read_text().splitlines())
        # An epoch has one step, and three checkpoints are kept.
        assert saved_steps(tmp_path / "run" / "checkpoints") == list(range(max(done - 2, 1), done + 1))
        assert not (tmp_path / "run" / "export").exists()
    lines = run(settings, tmp_path)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert_bitwise(*(load_weights(tmp_path / name / "export") for name in ("run", "whole")))


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_sigterm_at_the_start_exits_with_code_0(seconds, settings, tmp_path):
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=200)
    # Python itself starts in less than the shorter time, unless the machine is busy.
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in error


def test_second_run_in_the_same_folder_is_refused(settings, tmp_path):
    run(settings, tmp_path, "--optimizer.max_steps", "2")
    before = read_files(tmp_path / "run")
    with FileLock(tmp_path / "run" / LOCK), pytest.raises(UserError, match="is in use by another run; wait until"):
        run(settings, tmp_path, "--optimizer.max_steps", "2")
    assert read_files(tmp_path / "run") == before


def test_run_that_ended_since_the_folder_was_checked_is_not_continued(settings, tmp_path):
    opened = open_run(open_training_model(Settings.model_validate(settings)))
    other = settings | {"optimizer": settings["optimizer"] | {"learning_rate": 0.5, "max_steps": 2}}
    run(other, tmp_path)
    before = read_files(tmp_path / "run")
    with pytest.raises(UserError, match="another run has written to .*; run the same command again"):
        train(opened, lambda params: {}, "")
    assert read_files(tmp_path / "run") == before


def test_renamed_checkpoint_is_refused(settings, tmp_path):
    run(settings, tmp_path, "--optimizer.max_steps", "4", "--export", "false")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "4").rename(checkpoints / "9")
    (checkpoints / "3").rename(checkpoints / "4")
    (checkpoints / "9").rename(checkpoints / "3")
    with pytest.raises(UserError, match=f"{checkpoints}/4: the checkpoint is damaged: it was saved after 3 steps"):
        run(settings, tmp_path, "--optimizer.max_steps", "4", "--export", "false")


def test_leftovers_of_interrupted_saves_are_removed(settings, tmp_path):
    run(settings, tmp_path, "--optimizer.max_steps", "2", "--export", "false")
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("5.orbax-checkpoint-tmp", ".3.0123abcd.deleted", "5.orbax-checkpoint-tmp-mine"):
        shutil.copytree(checkpoints / "2", checkpoints / name)
    run(settings, tmp_path, "--optimizer.max_steps", "2", "--export", "false")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["1", "2", "5.orbax-checkpoint-tmp-mine"]


@pytest.mark.parametrize("anchors", [6, 9])
def test_damaged_files_of_the_run_are_named(anchors, settings, tmp_path):
    run(settings, tmp_path, "--optimizer.max_steps", "2", "--export", "false")
    evaluation = tmp_path / "run" / "evaluation.json"
    evaluation.write_text(f'{{"before": {{"a b": {"9" * 400}}}}}')
    with pytest.raises(UserError, match="evaluation.json: has no valid metrics under `before`"):
        run(settings, tmp_path, "--optimizer.max_steps", "2", "--export", "false")
    evaluation.write_text("[]")
    fix = "restore the file, or remove it to continue without these metrics"
    with pytest.raises(UserError, match=f"evaluation.json: expected a JSON object.*; {fix}"):
        run(settings, tmp_path, "--optimizer.max_steps", "2", "--export", "false")
    names = "abcdefghij"[: anchors + 1]
    lines = ["a: &a {x: 1, y: 2}"]
    lines += [
        f"{name}: &{name} {{{', '.join(f'k{i}: *{before}' for i in range(9))}}}"
        for before, name in zip(names, names[1:], strict=False)
    ]
    (tmp_path / "run" / "config.yaml").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="config.yaml and inputs.json, which identify the run, cannot be read"):
        run(settings, tmp_path, "--optimizer.max_steps", "2", "--export", "false")


def test_link_in_place_of_the_lock_is_refused(settings, tmp_path):
    run(settings, tmp_path, "--optimizer.max_steps", "2")
    (tmp_path / "run" / LOCK).unlink()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"\.lock: is not a file; move it away"):
        run(settings, tmp_path, "--optimizer.max_steps", "2")
    assert not (tmp_path / "other").exists()


def test_vanished_data_file_is_named_and_the_checkpoint_is_kept(settings, golden, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes((golden / "data" / "news.jsonl").read_bytes())
    settings["data"]["ir"] = [str(data)]
    expected = run({**settings, "output_dir": str(tmp_path / "whole")}, tmp_path)
    run(settings, tmp_path, "--export", "false", "--optimizer.max_steps", "8")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    before = read_files(tmp_path / "run")
    content = data.read_bytes()
    data.unlink()
    with pytest.raises(UserError, match=rf"data\.ir:\n  {data}: no such file or folder"):
        run(settings, tmp_path)
    assert read_files(tmp_path / "run") == before
    data.write_bytes(content)
    assert [line["loss"] for line in run(settings, tmp_path)] == [line["loss"] for line in expected]


def test_unreadable_shard_of_the_model_is_named(settings, golden, tmp_path):
    model = shutil.copytree(golden / "youtu_tiny", tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    settings["model"]["path"] = str(model)
    with pytest.raises(UserError, match=rf"{weights}: invalid safetensors file"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()
