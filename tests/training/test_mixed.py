"""Tests of `sampler: mixed`, the ablation in which each device has examples of a single dataset."""

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
from codiemb_jax.batch import Batch
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import Settings
from codiemb_jax.data.layout import PaddedLayout
from codiemb_jax.data.loader import batches
from codiemb_jax.data.mixed import MixedPlan
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.sampler import Source
from codiemb_jax.models.embed import embed_with_middle
from codiemb_jax.models.pooling import l2_normalize
from codiemb_jax.objectives.groups import Examples, Groups
from codiemb_jax.objectives.registry import OBJECTIVES
from codiemb_jax.sharding import make_mesh, row_sharding
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.training.run import batch_layout
from codiemb_jax.training.step import batch_loss

TRAIN = Path(codiemb_jax.__file__).parent / "quickstart" / "data" / "train"


def write_data(folder: Path) -> dict[str, list[str]]:
    """Writes IR files with 11 to 13 examples, a third of them without negatives, and STS files with 17 and 18."""
    paths: dict[str, list[str]] = {}
    for task, sizes in (("ir", (11, 12, 13)), ("sts", (17, 18))):
        lines = [line for path in sorted((TRAIN / task).glob("*.jsonl")) for line in path.open(encoding="utf-8")]
        if task == "ir":
            lines[::3] = [json.dumps(json.loads(line) | {"negatives": []}) + "\n" for line in lines[::3]]
        for number, size in enumerate(sizes):
            path = folder / f"{task}{number}.jsonl"
            path.write_text("".join(lines[number * 20 :][:size]), encoding="utf-8")
            paths.setdefault(task, []).append(str(path))
    return paths


def make_settings(golden: Path, folder: Path, **sections) -> dict:
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


@pytest.mark.parametrize(
    ("ir", "sts", "chunks", "packing"),
    [
        pytest.param("info_nce", "codi", 1, False, marks=pytest.mark.slow),
        pytest.param("info_nce", "codi", 1, True, marks=pytest.mark.slow),
        pytest.param("info_nce", "codi", 2, False, marks=pytest.mark.slow),
        ("info_nce", "codi", 2, True),
        pytest.param("info_nce", "info_nce", 1, False, marks=pytest.mark.slow),
        ("info_nce", "cosent", 1, False),
        ("cosent", "codi", 2, False),
        pytest.param("cosent", "cosent", 1, False, marks=pytest.mark.slow),
        pytest.param("cosent", "cosent", 1, True, marks=pytest.mark.slow),
    ],
)
def test_loss_is_mean_of_device_losses(ir, sts, chunks, packing, golden, tmp_path):
    objectives = {"ir": ir, "sts": sts, "sts_list_size": None}
    sections = make_settings(golden, tmp_path, encode_chunks=chunks, objective=objectives)
    sections["data"]["packing"] = packing
    settings = Settings.model_validate(sections)
    mesh = make_mesh(settings.mesh, jax.devices()[:4])
    model = open_model(settings.model, settings.prompt, mesh)
    tokenizer = PromptTokenizer(model.blueprint.tokenizer(), settings.prompt)
    limits = {"query_max_tokens": 64, "passage_max_tokens": 96}
    datasets = [
        prepare(path, task, tokenizer, cache=tmp_path / "cache", **limits)
        for task, paths in (("ir", settings.data.ir), ("sts", settings.data.sts))
        for path in paths
    ]
    sources = [Source(d.path.stem, d.task, d.index) for d in datasets]
    plan = MixedPlan(sources, settings.data, settings.seed, batch_layout(settings, mesh))
    # The expected losses are those of rows with one text.
    padded_plan = MixedPlan(sources, settings.data, settings.seed, PaddedLayout(4))
    graph, objective = model.graph, settings.objective

    def device_loss(params: Any, batch: Batch, device: int, is_ir: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss of the two examples of one device."""
        local = jax.tree.map(lambda leaf: jnp.asarray(leaf).reshape(4, -1, *leaf.shape[1:])[device], batch)
        embeddings = embed_with_middle(nnx.merge(graph, params), local.rows)
        # Two queries, then three passages of each.
        queries, middle_queries = (l2_normalize(vectors)[:2] for vectors in embeddings)
        passages, middle_passages = (l2_normalize(vectors)[2:].reshape(2, 3, -1) for vectors in embeddings)
        if is_ir:
            examples = Examples(queries, passages, local.passages[:, 1:] >= 0, local.scores)
            return OBJECTIVES[ir]["ir"].compute(examples, objective, Groups(None))
        # The other passages of an STS pair are padding.
        middle = (middle_queries, middle_passages[:, :1])
        examples = Examples(queries, passages[:, :1], jnp.zeros((2, 0), bool), local.scores, middle)
        return OBJECTIVES[sts]["sts"].compute(examples, objective, Groups(None))

    device_grad_fn = jax.jit(jax.value_and_grad(device_loss, has_aux=True), static_argnums=3)
    mixes, has_negatives = set(), set()
    with jax.set_mesh(mesh):
        params = model.load()
        loss_fn = partial(batch_loss, graph, task="mixed", settings=settings, mesh=mesh)
        grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        results = [
            (step, jax.device_get(padded_batch), jax.device_get(grad_fn(params, batch)))
            for (step, batch), (_, padded_batch) in zip(
                batches(plan, datasets, row_sharding(mesh), start=0, stop=4),
                batches(padded_plan, datasets, row_sharding(mesh), start=0, stop=4),
                strict=True,
            )
        ]
    params = jax.device_get(params)
    for step, batch, ((loss, parts), grads) in results:
        assert step.task == "mixed" and type(batch) is Batch
        expected: dict[str, list[float]] = {}
        all_device_grads = []
        is_ir = tuple(datasets[source].task == "ir" for source in step.sources)
        for device in range(4):
            (loss_on_device, device_parts), device_grads = device_grad_fn(params, batch, device, is_ir[device])
            all_device_grads.append(device_grads)
            if ir == sts and not is_ir[device]:
                device_parts = {f"sts_{name}": value for name, value in device_parts.items()}
            for name, value in {"loss": loss_on_device, **device_parts}.items():
                expected.setdefault(name, []).append(float(value))
        assert set(expected) <= {"loss", *parts}
        for name, value in {"loss": loss, **parts}.items():
            if name in expected:
                assert value == pytest.approx(np.mean(expected[name]), rel=1e-5, abs=1e-6), name
            else:
                assert np.isnan(value)
        for leaf, *device_leaves in zip(jax.tree.leaves(grads), *map(jax.tree.leaves, all_device_grads), strict=True):
            assert np.isfinite(leaf).all()
            np.testing.assert_allclose(leaf, np.mean(device_leaves, axis=0), atol=2e-5 * np.abs(leaf).max())
        mixes.add(is_ir)
        has_negatives |= set((batch.passages[np.repeat(is_ir, 2), 1:] >= 0).all(axis=1).tolist())
    assert has_negatives == {True, False}  # some queries have negatives, others do not
    assert len(mixes) > 1 and {True, False} == {value for mix in mixes for value in mix}


def train(settings: dict, folder: Path, devices: int, *flags: str) -> subprocess.CompletedProcess:
    """Runs the training program in a subprocess with simulated devices."""
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(folder / "settings.yaml"), *flags]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "CODIEMB_JAX_CACHE": str(folder / "cache"),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_training_on_four_devices(golden, tmp_path):
    settings = make_settings(
        golden, tmp_path, optimizer={"learning_rate": 1e-4, "max_steps": 12}, export=False, mesh={"fsdp": 2}
    )
    process = train(settings, tmp_path, 4)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))
    sts_parts = {"pearson", "rank_kl", "pro", "mid_info_nce"}
    mixes = set()
    for line in lines:
        names = line["dataset"]
        assert line["task"] == "mixed"
        assert len(names) == 4
        assert set(names) <= {"ir0", "ir1", "ir2", "sts0", "sts1"}
        has_task = {task: any(name.startswith(task) for name in names) for task in ("ir", "sts")}
        assert ("info_nce" in line) == has_task["ir"]
        assert (set(line) & sts_parts) == (sts_parts if has_task["sts"] else set())
        assert np.isfinite(line["loss"]) and line["grad_norm"] > 0
        mixes.add(tuple(sorted(names)))
    assert len(mixes) > 5
    # A mixed run cannot be continued on another number of devices.
    settings["mesh"] = {"fsdp": 1}
    process = train(settings, tmp_path, 2)
    assert process.returncode == 2
    assert "batch shards (mesh.data x mesh.fsdp): was 4, now 2" in process.stderr
    assert len(process.stderr.splitlines()) == 2
    process = train(settings, tmp_path, 4, "--mesh.tensor", "1")
    assert process.returncode == 0, process.stderr
    assert "continuing from step 12 of 12" in process.stderr


@pytest.mark.parametrize(
    ("task", "group_size"),
    [pytest.param("ir", {"sts_list_size": 3}, marks=pytest.mark.slow), ("sts", {"ir_pool_size": 3})],
)
def test_training_on_a_single_task(task, group_size, golden, tmp_path):
    """The group size of the other task is not checked."""
    settings = make_settings(golden, tmp_path, optimizer={"max_steps": 2}, export=False)
    settings["data"].pop("sts" if task == "ir" else "ir")
    settings["objective"] = {"sts_list_size": None} | group_size
    process = train(settings, tmp_path, 4)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["mixed"] * 2
    assert all(name.startswith(task) for line in lines for name in line["dataset"])
    assert all(("info_nce" in line) == (task == "ir") for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ir", "sts", "parts"),
    [
        ("info_nce", "info_nce", {"ir": "info_nce", "sts": "sts_info_nce"}),
        ("cosent", "cosent", {"ir": "cosent", "sts": "sts_cosent"}),
        ("cosent", "info_nce", {"ir": "cosent", "sts": "info_nce"}),
    ],
)
def test_training_with_baseline_objectives(ir, sts, parts, golden, tmp_path):
    optimizer = {"learning_rate": 1e-4, "max_steps": 6}
    settings = make_settings(golden, tmp_path, optimizer=optimizer, export=False)
    settings["objective"] |= {"ir": ir, "sts": sts}
    process = train(settings, tmp_path, 4)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(6))
    for line in lines:
        expected = {part for task, part in parts.items() if any(name.startswith(task) for name in line["dataset"])}
        assert set(line) & set(parts.values()) == expected
        assert all(np.isfinite(line[name]) for name in ("loss", "grad_norm", *expected))
    assert any(line["grad_norm"] > 0 for line in lines)
    assert set(parts.values()) <= {name for line in lines for name in line}
