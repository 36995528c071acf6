"""Tests of the program that tells whether a configuration fits, with the compiler for TPUs."""

import json
import os
import subprocess
import sys

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # tests run at the same time

import jax
import pytest

from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import Settings
from codiemb_jax.config_file import find_config, load_settings
from codiemb_jax.errors import UserError
from codiemb_jax.preflight import main
from codiemb_jax.sharding import make_mesh
from codiemb_jax.training import preflight
from codiemb_jax.training.ahead import tpu_devices
from codiemb_jax.training.chips import Chip, chip_of
from codiemb_jax.training.estimate import StepEstimate, needed_memory, state_bytes
from codiemb_jax.training.flops import count_flops
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.preflight import Preflight, chunk_counts, with_changes
from codiemb_jax.training.schedule import make_schedule
from codiemb_jax.training.state import abstract_state, initial_state
from tests.helpers import golden_settings


def test_quickstart_is_compiled_for_a_tpu_slice(capsys):
    main(["--config", "quickstart", "--topology", "v5e:2x2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["devices"], found["device_kind"], found["fits"]) == (4, "TPU v5 lite", True)
    assert found["parameters"] == 1_368_448
    # Weights and two moments in float32 on every device, and two counters.
    assert found["state_bytes"] == 3 * 4 * 1_368_448 + 8
    for task in ("ir", "sts"):
        step = found["steps"][task]
        assert step["tokens"] <= step["computed_tokens"]
        assert found["state_bytes"] < step["needed"] < 1e9
        # Every device gets at least the gradients of the others.
        assert step["collective_bytes"] >= 2 * found["parameters"]
        assert step["seconds"] == pytest.approx(
            max(step["flops"] / 197e12, step["collective_bytes"] / 200e9, 2 * found["state_bytes"] / 819e9), rel=0.2
        )


def test_report_is_printed_as_a_table(capsys):
    settings = ["--mesh.fsdp", "8", "--data.sts", "[]", "--data.row_tokens", "256"]
    main(["--config", "quickstart", *settings])
    out = capsys.readouterr().out
    assert "8 x cpu; 1,368,448 parameters; weights and moments: 2" in out
    assert "All per device and step." in out


def test_flops_are_those_of_a_hand_count():
    """Youtu-Embedding, 28 queries with 6 passages per device, without recomputation."""
    devices = tpu_devices("v5e:2x4")
    settings = load_settings(find_config("youtu_embedding"), ["--encode_chunks", "1", "--model.remat", "none"])
    program = Preflight(with_changes(settings, {"mesh.fsdp": 8}), devices)
    step, shapes = program.trace(program.settings, "ir")
    layers, hidden, mlp = 32, 2048, 8192
    weights = 4 * hidden**2 + 3 * hidden * mlp
    # The forward pass of attention has two products per pair of tokens in a row, its backward pass five.
    attention = 2 * (2 + 5) * shapes.layout.row_length * hidden
    expected = shapes.computed_tokens * layers * (6 * weights + attention)
    assert count_flops(step.jaxpr) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("recipe", ["youtu_embedding", "minicpm_embedding"])
@pytest.mark.parametrize(("chunks", "remat"), [(1, "full"), (14, "dots")])
def test_executed_flops_are_little_more_than_needed(recipe, chunks, remat):
    """Operations over 6 x parameters x tokens without padding, with long texts."""
    devices = tpu_devices("v5e:2x4")
    settings = load_settings(find_config(recipe), ["--encode_chunks", str(chunks), "--model.remat", remat])
    program = Preflight(settings, devices)
    step, shapes = program.trace(program.settings, "ir")
    parameters = {"youtu_embedding": 2_410_289_152, "minicpm_embedding": 2_724_880_896}[recipe]
    assert count_flops(step.jaxpr) / (6 * parameters * shapes.tokens) < 1.45


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh.fsdp": 4},
        {"model.param_dtype": "bfloat16"},
        {"optimizer.moments_dtype": "bfloat16", "mesh.tensor": 2},
    ],
)
def test_state_bytes_are_those_of_a_real_state(changes, golden, tmp_path):
    values = golden_settings(golden, tmp_path, data={"ir": ["data"]})
    settings = with_changes(Settings.model_validate(values), changes)
    mesh = make_mesh(settings.mesh, jax.devices()[:4])
    model = open_model(settings.model, settings.prompt, mesh)
    optimizer = make_optimizer(settings.optimizer, make_schedule(settings.optimizer, 8))
    with jax.set_mesh(mesh):
        state = initial_state(optimizer, model.load(), abstract_state(optimizer, model.abstract))
    for device in mesh.devices.flat:
        shards = [shard for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]
        assert state_bytes(settings, model.abstract) == (sum(s.data.nbytes for s in shards if s.device == device), 0)


@pytest.mark.parametrize(("query_max_tokens", "passage_max_tokens"), [(16, 512), (128, 16)])
def test_padded_pairs_have_rows_of_query_length(query_max_tokens, passage_max_tokens, golden, tmp_path):
    data = {
        "sts": ["data"], "packing": False, "query_max_tokens": query_max_tokens,
        "passage_max_tokens": passage_max_tokens,
    }  # fmt: skip
    settings = Settings.model_validate(golden_settings(golden, tmp_path, data=data))
    _, shapes = Preflight(settings, jax.devices()[:1]).trace(settings, "sts")
    # All texts drawn are longer than 16 tokens, and the longest has between a quarter and three quarters of 128.
    assert shapes.layout.row_length in ({16} if query_max_tokens == 16 else {64, 96})


@pytest.fixture
def compiled(golden, tmp_path, monkeypatch):
    """Returns a function that looks for a change with which a step fits, and what it tried; nothing is compiled."""

    def find(fits, **sections):
        tried = []
        data = {"ir": ["data"]} | sections.pop("data", {})
        settings = Settings.model_validate(golden_settings(golden, tmp_path, data=data, **sections))

        def trace(settings, task):
            tried.append(settings)
            return None, program._shapes(settings, make_mesh(settings.mesh), task)

        def estimate(*_):
            return StepEstimate(1.0, None, fits(tried[-1]), 1.0, None, None, None)

        monkeypatch.setattr(preflight, "estimate_step", estimate)
        monkeypatch.setattr(preflight, "chip_of", lambda device: Chip(memory=1e12))
        program = Preflight(settings, jax.devices())
        monkeypatch.setattr(program, "trace", trace)
        report = program.report()
        assert not report.fits
        return program.smallest_change(report), tried

    return find


def test_smallest_number_of_chunks_is_found(compiled):
    change, tried = compiled(lambda settings: settings.encode_chunks >= 3)
    assert change is not None and change[0] == {"encode_chunks": 4}
    assert change[1].fits
    assert len(tried) <= 5


def test_chunks_of_padded_batches_have_whole_examples(compiled):
    data = {"packing": False, "ir_global_batch_size": 96}  # 12 examples per device
    change, _ = compiled(lambda settings: settings.encode_chunks >= 5, data=data)
    assert change is not None and change[0] == {"encode_chunks": 6}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.passage_max_tokens", "100000"], "may be at most 1024, the model's number of positions"),
        (["--config", "bge_large_zh", "--model.attention", "causal"], "causal needs a decoder; a bert model"),
    ],
)
def test_what_training_refuses_is_refused(flags, message):
    config = [] if "--config" in flags else ["--config", "quickstart"]
    with pytest.raises(UserError, match=message):
        main([*config, *flags])


def test_it_is_not_known_whether_it_fits_on_a_cpu(capsys):
    main(["--config", "quickstart", "--data.sts", "[]", "--mesh.fsdp", "8", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is None and found["device_memory"] is None and found["change"] is None


def test_cheaper_changes_come_first(compiled):
    change, _ = compiled(lambda settings: settings.mesh.fsdp == 8)
    assert change is not None and change[0] == {"mesh.data": 1, "mesh.fsdp": 8}
    change, _ = compiled(lambda settings: settings.model.remat == "full" or settings.mesh.fsdp == 8)
    assert change is not None and change[0] == {"model.remat": "full"}


def test_changes_are_combined(compiled):
    change, _ = compiled(
        lambda settings: settings.optimizer.moments_dtype is not None and settings.encode_chunks > 1
        and settings.mesh.fsdp == 8
    )  # fmt: skip
    assert change is not None
    assert change[0] == {"mesh.data": 1, "mesh.fsdp": 8, "encode_chunks": 2, "optimizer.moments_dtype": "bfloat16"}


def test_nothing_fits(compiled):
    change, tried = compiled(lambda settings: False)
    assert change is None
    assert len(tried) < 12


def test_state_that_is_too_large_is_not_compiled(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "chip_of", lambda device: Chip(memory=1e5))
    monkeypatch.setattr(preflight, "estimate_step", None)
    settings = Settings.model_validate(golden_settings(golden, tmp_path, data={"ir": ["data"]}))
    report = Preflight(settings, jax.devices()[:8]).report()
    assert not report.fits
    assert report.steps["ir"].needed == report.state_bytes > 1e5


def test_chunk_counts():
    assert chunk_counts(1, 42) == [2, 4, 8, 16, 32, 42]
    assert chunk_counts(8, 16) == [16]
    assert chunk_counts(16, 16) == []


def test_message_of_the_compiler_is_understood():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded by"
    assert needed_memory(message) == 16.5 * 2**30
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (16.96G) exceeds "
        "available HBM (15.75G)."
    )
    assert needed_memory(message) == 16.96 * 2**30
    assert needed_memory("INTERNAL: something else") is None


def test_known_chips():
    assert chip_of(tpu_devices("v5p:2x2x1")[0]).memory == 95.74 * 2**30
    assert chip_of(tpu_devices("v6e:2x2")[0]).flops == 918e12
    assert chip_of(jax.devices()[0]) == Chip(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9z:2x2"], "cannot compile for v9z:2x2, which must be a TPU slice such as v5e:4x4"),
        (["--topology", "v5e:2x2", "--mesh.fsdp", "3"], "does not match the number of devices, 4"),
        (["--model.path", "nobody/nothing"], "is neither a folder nor the model of a recipe"),
        (["--data.ir_global_batch_size", "7", "--mesh.fsdp", "8"], "must be a multiple of 8"),
    ],
)
def test_mistakes_raise_user_error(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["--config", "quickstart", *arguments])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux counts it")
def test_temporaries_are_those_of_a_real_run_on_a_cpu(tmp_path):
    flags = [
        "--output_dir", str(tmp_path / "run"), "--data.sts", "[]", "--data.packing", "false",
        "--data.ir_global_batch_size", "48", "--optimizer.max_steps", "3", "--export", "false",
        "--evaluation.ir", "[]", "--evaluation.sts", "[]", "--checkpoint.every_epochs", "null",
    ]  # fmt: skip
    report = Preflight(load_settings(find_config("quickstart"), flags), jax.devices()[:1]).report()
    record = tmp_path / "bytes.txt"
    environment = os.environ | {"XLA_FLAGS": "", "CODIEMB_JAX_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tests.measured_train", str(record), "--config", "quickstart", *flags]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["computed_tokens"] for line in lines} == {report.shapes["ir"].computed_tokens}
    measured = max(map(int, record.read_text().split()))
    assert measured > 2e9
    assert report.steps["ir"].temporaries == pytest.approx(measured, rel=0.1)
