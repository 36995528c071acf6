"""Tests of programs in subprocesses: which modules they import, and how they handle interrupts."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codiemb_jax.program import exit_code, loading_modules
from tests.processes import free_port

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
    "codiemb_jax.encode": {"--model", "--input", "--output", "--kind", "--instruction", "--dim", "--precision"},
    "codiemb_jax.evaluate": {"--model", "--ir", "--sts", "--beir", "--output", "--query_prompt", "--max_tokens"},
    "codiemb_jax.mine": {"--model", "--ir", "--corpus", "--output", "--range_min", "--keep_negatives"},
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


def test_garbage_is_collected_again_after_imports():
    with pytest.raises(ImportError), loading_modules():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with loading_modules():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_a_program_imports_is_frozen_but_not_the_garbage_of_a_user_of_jax():
    program = (
        "import gc\nfrom codiemb_jax.program import loading_modules\n"
        "with loading_modules():\n    import jax\n"
        "frozen = gc.get_freeze_count()\n"
        "with loading_modules():\n    import transformers\n"
        "print(frozen > 10_000, gc.get_freeze_count() <= frozen)"  # some are freed
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert done.stdout.split() == ["True", "True"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signal_during_a_callback_that_ignores_exceptions_is_not_lost(number, code):
    program = (
        "import os, sys, time\nfrom codiemb_jax.program import run_program\n"
        "class Callback:\n    def __del__(self):\n        os.kill(os.getpid(), int(sys.argv[1]))\n"
        "        time.sleep(1)\n"
        "def main():\n    callback = Callback()\n    del callback\n    time.sleep(30)\n    print('finished')\n"
        "run_program(main)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(int(number))], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == "\nstopped; run the same command again to continue\n"


def test_sigterm_in_a_cluster_of_one_process_is_not_ignored():
    """JAX replaces the handler when it connects."""
    program = (
        "import os, signal, time\nimport jax\nfrom jax._src.clusters import ClusterEnv\n"
        "from codiemb_jax.config import DistributedSettings\nfrom codiemb_jax.distributed import connected\n"
        "from codiemb_jax.program import run_program\n"
        "class Alone(ClusterEnv):\n    name = 'alone'\n"
        "    is_env_present = classmethod(lambda cls: True)\n"
        "    get_coordinator_address = classmethod(lambda cls, **_: 'localhost:PORT')\n"
        "    get_process_count = classmethod(lambda cls: 1)\n    get_process_id = classmethod(lambda cls: 0)\n"
        "    get_local_process_id = classmethod(lambda cls: None)\n"
        "def main():\n    with connected(DistributedSettings()):\n"
        "        assert jax.distributed.is_initialized()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n        time.sleep(30)\n        print('finished')\n"
        "run_program(main)"
    ).replace("PORT", str(free_port()))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == "\nstopped; run the same command again to continue\n"


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        (">/dev/full", 2, "error: [Errno 28] No space left on device\n"),
        ("2>/dev/full", 0, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("| true", 2, "error: [Errno 32] Broken pipe\n"),
    ],
)
def test_output_that_cannot_be_written_prints_no_traceback(redirection, code, message):
    program = "from codiemb_jax.program import run_program\nrun_program(lambda: print('x' * 100_000, flush=True))"
    command = f'set -o pipefail; {sys.executable} -c "{program}" {redirection}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, message)


def test_interrupt_that_c_code_has_replaced_is_an_interrupt():
    interrupted = SystemError("returned a result with an exception set")
    interrupted.__cause__ = KeyboardInterrupt()
    assert exit_code(interrupted) == 130
    assert exit_code(SystemError()) == 1
    assert exit_code(OSError(28, "No space left on device", "a file")) == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "JAX cannot use the devices"),
        ({"JAX_PLATFORMS": "nonsense"}, "JAX cannot use the devices"),
        ({"JAX_ENABLE_X64": "1"}, "JAX_ENABLE_X64 is set, which would change the results; unset it"),
    ],
)
def test_environment_that_training_cannot_use(variables, message, tmp_path):
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", "quickstart"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, cwd=tmp_path, env=ENVIRONMENT | variables
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"error: {message}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_conversion_on_a_full_disk_leaves_nothing(golden, tmp_path):
    """A limit of the size of files stands in for a full disk."""
    code = (
        "import resource\nfrom codiemb_jax.cli import run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\nrun()"
    )
    arguments = ["hf-to-orbax", "--model", str(golden / "youtu_tiny"), "--output", "converted"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "converted: the checkpoint cannot be written (File too large)" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_exit_with_a_message_prints_it():
    code = "import sys; from codiemb_jax.program import run_program; run_program(lambda: sys.exit('it failed'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "it failed\n")
