"""Tests of runs with several processes, which are connected on this machine."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from codiemb_jax.config import DistributedSettings, Settings
from codiemb_jax.distributed import check_same, exchange, in_turns, to_host
from codiemb_jax.errors import UserError
from codiemb_jax.training.run import run_identity
from tests.helpers import golden_settings, load_weights
from tests.processes import Processes

SETTINGS = """
model: {{path: {golden}/youtu_tiny}}
data:
  ir: [{golden}/data/news.jsonl]
  sts: [{golden}/data/questions.jsonl]
  ir_global_batch_size: 8
  sts_global_batch_size: 16
  positives_per_query: 1
  negatives_per_query: 4
  query_max_tokens: 64
  passage_max_tokens: 64
  row_tokens: 128
objective: {{sts_list_size: null}}
optimizer: {{learning_rate: 1.0e-4, warmup_steps: 2, max_steps: {steps}}}
checkpoint: {{every_steps: 4, every_epochs: null}}
"""
STEPS = 12
EXACT = ("loss", "grad_norm", "learning_rate")
"""Compared relative to their size; parts of the loss are much smaller than the loss."""


def write_config(folder: Path, golden: Path, steps: int = STEPS) -> Path:
    config = folder / "settings.yaml"
    config.write_text(SETTINGS.format(golden=golden, steps=steps))
    return config


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_close(actual: list[dict], expected: list[dict]) -> None:
    """Asserts that metrics are equal up to 1e-5 at the first step and 5e-4 at the others."""
    assert len(actual) == len(expected)
    for step, (line, expected_line) in enumerate(zip(actual, expected, strict=True)):
        assert line.keys() == expected_line.keys()
        for name, value in expected_line.items():
            if name in ("computed_tokens", "seconds"):  # depend on the devices
                continue
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-5 if step == 0 else 5e-4, abs=0 if name in EXACT else 1e-5)
            assert line[name] == value, (step, name)


@pytest.fixture(scope="module")
def single(golden, tmp_path_factory):
    """A folder with a run in a single process on a single device: its settings and its output."""
    folder = tmp_path_factory.mktemp("distributed")
    config = write_config(folder, golden)
    with Processes(folder, config, "single", 1, 1) as run:
        run.finish()
        return folder, config, run


@pytest.mark.parametrize(
    ("processes", "devices", "flags"),
    [
        (2, 2, ["--mesh.fsdp", "4"]),
        pytest.param(1, 4, ["--mesh.fsdp", "2"], marks=pytest.mark.slow),
        pytest.param(2, 1, ["--data.packing", "false", "--data.row_tokens", "null"], marks=pytest.mark.slow),
        pytest.param(2, 1, ["--mesh.tensor", "2"], marks=pytest.mark.slow),
        pytest.param(2, 4, ["--ring", "--mesh.fsdp", "2", "--mesh.tensor", "2"], marks=pytest.mark.slow),
        pytest.param(4, 1, ["--ring", "--data.packing", "false", "--data.row_tokens", "null"], marks=pytest.mark.slow),
        pytest.param(4, 2, ["--mesh.fsdp", "4", "--encode_chunks", "2"], marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else str(value),
)
def test_run_does_not_depend_on_the_number_of_processes(processes, devices, flags, single, tmp_path):
    folder, config, expected = single
    shutil.copytree(folder / "cache", tmp_path / "cache")
    with Processes(tmp_path, config, "several", processes, devices, *flags) as run:
        run.finish()
    assert_close(read_metrics(run.output), read_metrics(expected.output))
    actual_weights, weights = (load_weights(output / "export") for output in (run.output, expected.output))
    assert actual_weights.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(
            actual_weights[name].astype(np.float32), weight.astype(np.float32), rtol=0, atol=2e-5, err_msg=name
        )
    read = [read_examples(record) for record in run.records]
    whole = read_examples(expected.records[0])
    tensor_parallel = "--mesh.tensor" in flags and devices == 1  # then both processes have the same rows
    for step in range(STEPS):
        parts = [examples[step] for examples in read]
        if tensor_parallel:
            assert all(sorted(part) == sorted(whole[step]) for part in parts)
        else:
            assert all(parts)
            assert sorted(sum(parts, [])) == sorted(whole[step])  # disjoint and complete


def read_examples(record: Path) -> dict[int, list[int]]:
    """Returns the examples that a process has read, by step."""
    examples = defaultdict(list)
    for line in record.read_text().splitlines():
        step, part = json.loads(line)
        examples[step] += part
    return examples


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "flags"), [(1, []), (8, ["--mesh.data", "8"])], ids=["one device", "data 8"])
def test_checkpoint_of_two_processes_continues_in_one(devices, flags, single, golden, tmp_path):
    folder, config, expected = single
    shutil.copytree(folder / "cache", tmp_path / "cache")
    with Processes(tmp_path, config, "run", 2, 2, "--mesh.fsdp", "4") as run:
        run.wait_for_lines(6)  # after the checkpoint of step 4
        for process in run.processes:
            process.kill()
        run.wait()
    with Processes(tmp_path, config, "run", 1, devices, *flags) as run:
        (output,) = run.finish()
    assert "continuing from step" in output
    assert_close(read_metrics(run.output), read_metrics(expected.output))


@pytest.mark.slow
def test_all_processes_stop_early_and_keep_the_same_checkpoint(single, golden, tmp_path):
    """The weights hardly change, so no evaluation is better than the first."""
    folder, config, _ = single
    shutil.copytree(folder / "cache", tmp_path / "cache")
    flags = {
        "optimizer.learning_rate": "1e-12", "optimizer.warmup_steps": "0", "evaluation.ir": f"{golden}/data/news.jsonl",
        "evaluation.every_steps": "2", "evaluation.patience": "2",
    }  # fmt: skip
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    with Processes(tmp_path, config, "run", 2, 1, *arguments) as run:
        first, second = run.finish()
    assert "stopped after 6 steps: no improvement in 2 evaluations" in first
    assert "taking the best checkpoint, that after 2 steps" in first
    assert "stopped" not in second
    lines = read_metrics(run.output)
    assert [line["step"] for line in lines if "evaluation" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "evaluation" not in line] == list(range(6))
    assert json.loads((run.output / "evaluation.json").read_text())["step"] == 2


@pytest.mark.slow
def test_failed_process_stops_the_others_with_its_reason(single, tmp_path):
    _, config, _ = single
    broken = tmp_path / "settings.yaml"
    broken.write_text(config.read_text())
    with Processes(tmp_path, broken, "run", 2, 1) as run:
        # The second process cannot read its data.
        run.processes[1].kill()
        run.processes[1].wait()
        environment = {**os.environ, "XLA_FLAGS": "", "CODIEMB_JAX_CACHE": str(tmp_path / "cache")}
        arguments = ["--distributed.coordinator", run.address, "--distributed.num_processes", "2"]
        arguments += ["--distributed.process_id", "1", "--data.ir", str(tmp_path / "absent.jsonl")]
        command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(broken), *arguments]
        run.processes[1] = subprocess.Popen(
            [*command, "--output_dir", str(run.output)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        (first_code, first), (second_code, second) = run.wait(120)
    assert (first_code, second_code) == (2, 2)
    assert "error: data.ir:" in second and "absent.jsonl" in second
    assert "process 0 stops because process 1 failed: data.ir:" in first
    assert "Traceback" not in first + second
    assert not run.output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_dead_process_stops_the_others(killed, single, tmp_path):
    _, config, _ = single
    long = tmp_path / "settings.yaml"
    long.write_text(config.read_text().replace(f"max_steps: {STEPS}", "max_steps: 100000"))
    with Processes(tmp_path, long, "run", 2, 1) as run:
        run.wait_for_lines(3)
        run.processes[killed].send_signal(signal.SIGKILL)
        start = time.monotonic()
        code, output = run.wait(200)[1 - killed]
    assert time.monotonic() - start < 150
    assert code != 0
    assert f"process {1 - killed} lost another process" in output
    # JAX calls process 0 the leader.
    assert ("tasks are unhealthy (stopped sending heartbeats):\n1\n" if killed else "the leader task") in output


@pytest.mark.slow
def test_sigterm_of_one_process_saves_and_ends_all(single, tmp_path):
    folder, config, expected = single
    shutil.copytree(folder / "cache", tmp_path / "cache")
    flags = ["--checkpoint.every_steps", "null"]
    with Processes(tmp_path, config, "run", 2, 1, *flags) as run:
        run.wait_for_lines(2)
        run.processes[1].send_signal(signal.SIGTERM)
        ended = run.wait()
    assert [code for code, _ in ended] == [0, 0], ended
    if "stopped by SIGTERM" in ended[0][1]:  # unless the run was faster
        assert not (run.output / "export").exists()
        with Processes(tmp_path, config, "run", 2, 1, *flags) as run:
            assert "continuing from step" in run.finish()[0]
    assert_close(read_metrics(run.output), read_metrics(expected.output))


@pytest.mark.parametrize(
    ("process", "address", "problem"),
    [
        (0, "localhost:0", "error: distributed: other processes are missing after 2 seconds; start all of them"),
        (1, "localhost:1", "error: distributed.coordinator: nothing answers at localhost:1"),
    ],
)
def test_process_that_is_alone_at_the_start_gives_up(process, address, problem, single, tmp_path):
    _, config, _ = single
    code = (
        "import sys\nfrom codiemb_jax import distributed, train\nfrom codiemb_jax.program import run_program\n"
        "distributed.CONNECT_SECONDS = 2\nrun_program(lambda: train.main(sys.argv[1:]))"
    )
    if process == 0:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
    flags = ["--distributed.coordinator", address, "--distributed.num_processes", "2"]
    command = [sys.executable, "-c", code, "--config", str(config), "--output_dir", str(tmp_path / "run"), *flags]
    done = subprocess.run(
        [*command, "--distributed.process_id", str(process)],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(problem)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"coordinator": "host:1"}, "together"),
        ({"num_processes": 2}, "together"),
        ({"process_id": 0, "num_processes": 1}, "together"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "must be less than num_processes 2"),
        ({"coordinator": "host:99999", "num_processes": 2, "process_id": 1}, "port must be between 1 and 65535"),
        ({"coordinator": "host:0", "num_processes": 2, "process_id": 1}, "port must be between 1 and 65535"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 1}, "coordinator"),
        ({"coordinator": "http://host:1", "num_processes": 2, "process_id": 1}, "coordinator"),
    ],
)
def test_incomplete_settings_are_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        DistributedSettings.model_validate(values)


@pytest.mark.parametrize("address", ["host:1234", "10.0.0.1:80", "[::1]:8476"])
def test_addresses_are_accepted(address):
    settings = DistributedSettings.model_validate({"coordinator": address, "num_processes": 2, "process_id": 1})
    assert settings.coordinator == address


def test_a_single_process_talks_to_itself():
    assert exchange({"a": 1}) == [{"a": 1}]
    assert in_turns(lambda: "done") == "done"
    check_same({"seed": "1"}, "set it")
    np.testing.assert_array_equal(to_host({"x": np.arange(3)})["x"], np.arange(3))


def test_settings_are_compared_by_name(golden, tmp_path):
    values = golden_settings(golden, tmp_path / "run", data={"ir": ["a.jsonl"]})
    identity = run_identity(Settings.model_validate(values), {"a.jsonl": "0123"})
    assert identity["data.packing"] == "true" and identity["data.ir"] == '["a.jsonl"]'
    assert identity["optimizer.betas"] == "[0.9, 0.999]" and identity["a.jsonl"] == "0123"
    assert not any(name.startswith("distributed") for name in identity)


def test_different_values_are_reported(monkeypatch):
    monkeypatch.setattr("codiemb_jax.distributed.exchange", lambda value: [value, {"seed": "2", "data": "x"}])
    with pytest.raises(
        UserError, match=r"(?s)set it:\n  data: None in process 0, x in process 1\n  seed: 1 in .* 2 in"
    ):
        check_same({"seed": "1"}, "set it")
