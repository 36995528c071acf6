"""Tests of programs in subprocesses: which modules they import, and how they handle interrupts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = {
    "codiemb_jax.train": {
        "--config",
        "--output_dir",
        "--model.path",
        "--optimizer.learning_rate",
        "--data.max_examples",
    },
    "codiemb_jax.prepare": {"--config", "--beam", "--model.path", "--data.max_examples"},
    "codiemb_jax.preflight": {"--config", "--topology", "--json", "--encode_chunks"},
    "convert.hf_to_orbax": {"--model", "--output"},
    "convert.orbax_to_hf": {"--checkpoint", "--output", "--verify"},
    "codiemb": {"--version"},
}
ENVIRONMENT = os.environ | {"XLA_FLAGS": ""}


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_flags_and_imports_no_jax(program):
    run = f"runpy.run_module('{program}', run_name='__main__')"
    if program == "codiemb":
        run = "from codiemb_jax.cli import run; run()"
    code = (
        f"import runpy, sys\nsys.argv = ['x', '--help']\n"
        f"try:\n    {run}\nexcept SystemExit:\n    pass\n"
        "assert not {'jax', 'torch', 'transformers', 'orbax'} & set(sys.modules), sorted(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    flags = set(re.findall(r"--[\w.]+", output))
    assert PROGRAMS[program] <= flags


def test_training_imports_no_pytorch_or_tensorflow():
    modules = (
        "codiemb_jax.embedder, codiemb_jax.evaluation.held_out, codiemb_jax.training.loop, codiemb_jax.training.run"
    )
    code = f"import {modules}, sys\nassert not {{'torch', 'tensorflow', 'sentence_transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_planning_imports_no_tensorflow_datasets():
    code = (
        "import codiemb_jax.data.sampler, codiemb_jax.data.mixed, codiemb_jax.text.rows, sys\n"
        "assert not {'tensorflow_datasets', 'grain', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_full_disk_exits_with_code_2_and_without_traceback(tmp_path: Path):
    """A limit of the size of files stands in for a full disk."""
    code = (
        "import resource\nfrom codiemb_jax.cli import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\nrun()"
    )
    arguments = ["train", "--config", "quickstart", "--optimizer.max_steps", "1", "--data.sts", "[]"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert "checkpoints: the checkpoint cannot be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_interrupt_during_imports_prints_no_traceback(seconds, tmp_path: Path):
    config = tmp_path / "settings.yaml"
    config.write_text("output_dir: run\nmodel: {path: absent}\ndata: {ir: absent}\n")
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    assert process.returncode in (130, 2)  # 2 if the missing model was found before the interrupt
    assert not (tmp_path / "run").exists()
