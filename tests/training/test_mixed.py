"""sampler: mixed, the ablation in which each device has a data set, and a task, of its own."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

import codiemb_jax
from codiemb_jax.batch import MixedBatch
from codiemb_jax.config import Settings
from codiemb_jax.data.loader import batches
from codiemb_jax.data.prepare import prepare
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.data.sampler import Plan, Source
from codiemb_jax.models.embed import embed_with_middle
from codiemb_jax.models.pooling import unit
from codiemb_jax.objectives.tasks import ir_objective, sts_objective
from codiemb_jax.sharding import row_sharding, make_mesh
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.training.step import batch_loss

TRAIN = Path(codiemb_jax.__file__).parent / "quickstart" / "data" / "train"


def write_data(folder: Path) -> dict[str, list[str]]:
    """Three IR files of 11 to 13 examples and two STS files of 17 and 18."""
    paths: dict[str, list[str]] = {}
    for task, sizes in (("ir", (11, 12, 13)), ("sts", (17, 18))):
        lines = [line for path in sorted((TRAIN / task).glob("*.jsonl")) for line in path.open(encoding="utf-8")]
        for number, size in enumerate(sizes):
            path = folder / f"{task}{number}.jsonl"
            path.write_text("".join(lines[number * 20 :][:size]), encoding="utf-8")
            paths.setdefault(task, []).append(str(path))
    return paths


def settings_of(golden: Path, folder: Path, **sections) -> dict:
    return {
        "output_dir": str(folder / "run"),
        "model": {"path": str(golden / "youtu_tiny"), "compute_dtype": "float32"},
        "data": write_data(folder)
        | {
            "sampler": "mixed", "ir_global_batch_size": 8, "sts_global_batch_size": 8, "positives_per_query": 1,
            "negatives_per_query": 2, "query_max_tokens": 64, "passage_max_tokens": 96,
        },
        "objective": {"sts_list_size": None},
        **sections,
    }  # fmt: skip


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_loss_is_the_mean_of_what_each_device_has(chunks, golden, tmp_path):
    settings = Settings.model_validate(settings_of(golden, tmp_path, encode_chunks=chunks))
    mesh = make_mesh(settings.mesh, jax.devices()[:4])
    model = open_model(settings.model, settings.prompt, mesh)
    encoder = PromptTokenizer(model.blueprint.tokenizer(), settings.prompt)
    limits = {"query_max_tokens": 64, "passage_max_tokens": 96}
    data_sets = [
        prepare(path, task, encoder, cache=tmp_path / "cache", **limits)
        for task, paths in (("ir", settings.data.ir), ("sts", settings.data.sts))
        for path in paths
    ]
    plan = Plan([Source(d.name, d.task, d.index) for d in data_sets], settings.data, settings.seed, 4)
    graph, objective = model.graph, settings.objective

    def of_device(params: Any, batch: MixedBatch, device: int, is_ir: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What a device's two examples amount to, computed without the others."""
        own = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(4, -1, *leaf.shape[1:])[device], batch)
        encoded = [embed_with_middle(nnx.merge(graph, params), rows) for rows in (own.queries, own.passages)]
        (first, middle_first), (second, middle_second) = jax.tree.map(unit, encoded)
        if is_ir:
            return ir_objective(first, second, own.present, settings=objective)
        # Of a pair's three texts only the first is one.
        return sts_objective(first, second[::3], (middle_first, middle_second[::3]), own.scores, settings=objective)

    compiled = jax.jit(jax.value_and_grad(of_device, has_aux=True), static_argnums=3)
    mixes = set()
    with jax.set_mesh(mesh):
        params = model.load()
        whole = jax.jit(jax.value_and_grad(partial(batch_loss, graph, settings=settings, mesh=mesh), has_aux=True))
        found = [
            (step, jax.device_get(batch), jax.device_get(whole(params, batch)))
            for step, batch in batches(plan, data_sets, row_sharding(mesh), start=0, stop=4)
        ]
    params = jax.device_get(params)
    for step, batch, ((loss, parts), gradient) in found:
        assert isinstance(batch, MixedBatch)
        expected: dict[str, list[float]] = {}
        gradients = []
        is_ir = tuple(data_sets[part.source].task == "ir" for part in step.parts)
        for device in range(4):
            (device_loss, device_parts), device_gradient = compiled(params, batch, device, is_ir[device])
            gradients.append(device_gradient)
            for name, value in {"loss": device_loss, **device_parts}.items():
                expected.setdefault(name, []).append(float(value))
        for name, value in {"loss": loss, **parts}.items():
            if name in expected:
                assert value == pytest.approx(np.mean(expected[name]), rel=1e-5, abs=1e-6), name
            else:
                assert np.isnan(value)
        for one, *others in zip(jax.tree.leaves(gradient), *map(jax.tree.leaves, gradients), strict=True):
            np.testing.assert_allclose(one, np.mean(others, axis=0), atol=2e-5 * np.abs(one).max())
        mixes.add(is_ir)
    assert len(mixes) > 1 and {True, False} == {one for mix in mixes for one in mix}


def start(settings: dict, folder: Path, devices: int, *flags: str) -> subprocess.CompletedProcess:
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(folder / "settings.yaml"), *flags]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "CODIEMB_JAX_CACHE": str(folder / "cache"),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_it_runs_through_on_four_devices(golden, tmp_path):
    settings = settings_of(
        golden, tmp_path, optimizer={"learning_rate": 1e-4, "max_steps": 12}, export=False, mesh={"fsdp": 2}
    )
    done = start(settings, tmp_path, 4)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    sts_parts = {"pearson", "rank_kl", "pro", "mid_info_nce"}
    mixes = set()
    for line in lines:
        names = line["dataset"]
        assert line["task"] == "mixed"
        assert len(names) == 4
        assert set(names) <= {"ir0", "ir1", "ir2", "sts0", "sts1"}
        has = {task: any(name.startswith(task) for name in names) for task in ("ir", "sts")}
        assert ("info_nce" in line) == has["ir"]
        assert (set(line) & sts_parts) == (sts_parts if has["sts"] else set())
        assert np.isfinite(line["loss"]) and line["grad_norm"] > 0
        mixes.add(tuple(sorted(names)))
    assert len(mixes) > 5
    # Its steps are made of what four devices hold.
    settings["mesh"] = {"fsdp": 1}
    done = start(settings, tmp_path, 2)
    assert done.returncode == 2
    assert "devices with rows of their own (mesh.data x mesh.fsdp): 4 there, 2 now" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    done = start(settings, tmp_path, 4, "--mesh.tensor", "1")
    assert done.returncode == 0, done.stderr
    assert "continuing from step 12 of 12" in done.stderr


@pytest.mark.parametrize(("task", "pool"), [("ir", {"sts_list_size": 3}), ("sts", {"ir_pool_size": 3})])
def test_one_task_alone(task, pool, golden, tmp_path):
    """Pools of the absent task divide nothing, and matter to nobody."""
    settings = settings_of(golden, tmp_path, optimizer={"max_steps": 2}, export=False)
    settings["data"].pop("sts" if task == "ir" else "ir")
    settings["objective"] = {"sts_list_size": None} | pool
    done = start(settings, tmp_path, 4)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["mixed"] * 2
    assert all(name.startswith(task) for line in lines for name in line["dataset"])
    assert all(("info_nce" in line) == (task == "ir") for line in lines)
