"""sampler: mixed, the ablation in which each device has a data set, and a task, of its own."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

import codiemb_jax
from codiemb_jax.batch import MixedBatch
from codiemb_jax.config import Settings
from codiemb_jax.data.loader import batches
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.prompts import PromptEncoder
from codiemb_jax.data.sampler import Plan, Source
from codiemb_jax.models.embed import embed_with_middle
from codiemb_jax.models.pooling import unit
from codiemb_jax.objectives.tasks import ir_objective, sts_objective
from codiemb_jax.training.mesh import by_row, make_mesh
from codiemb_jax.training.model import open_model
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
    encoder = PromptEncoder(model.blueprint.tokenizer(), settings.prompt)
    limits = {"query_max_tokens": 64, "passage_max_tokens": 96}
    data_sets = [
        prepare(path, task, encoder, cache=tmp_path / "cache", **limits)
        for task, paths in (("ir", settings.data.ir), ("sts", settings.data.sts))
        for path in paths
    ]
    plan = Plan([Source(d.name, d.task, d.index) for d in data_sets], settings.data, settings.seed, 4)
    tasks = set()
    with jax.set_mesh(mesh):
        params = model.load()
        loss_of = jax.jit(partial(batch_loss, model.graph, settings=settings, mesh=mesh))
        alone = jax.jit(lambda rows: jax.tree.map(unit, embed_with_middle(nnx.merge(model.graph, params), rows)))
        for step, batch in batches(plan, data_sets, by_row(mesh), start=0, stop=4):
            assert isinstance(batch, MixedBatch)
            loss, parts = loss_of(params, batch)
            first, middle_first = alone(batch.queries)
            second, middle_second = alone(batch.passages)
            expected: dict[str, list[float]] = {}
            for device, part in enumerate(step.parts):
                task = data_sets[part.source].task
                own = slice(2 * device, 2 * device + 2)
                assert np.asarray(batch.is_ir)[own].tolist() == [task == "ir"] * 2
                if task == "ir":
                    vectors = (first[own], second[6 * device : 6 * device + 6], batch.present[own])
                    device_loss, device_parts = ir_objective(*vectors, settings=settings.objective)
                else:
                    texts = slice(6 * device, 6 * device + 6, 3)
                    middle = (middle_first[own], middle_second[texts])
                    scores = data_sets[part.source].scores(part.examples)
                    vectors = (first[own], second[texts], middle, scores)
                    device_loss, device_parts = sts_objective(*vectors, settings=settings.objective)
                for name, value in {"loss": device_loss, **device_parts}.items():
                    expected.setdefault(name, []).append(float(value))
                tasks.add(task)
            for name, value in {"loss": loss, **parts}.items():
                if name in expected:
                    assert float(value) == pytest.approx(np.mean(expected[name]), rel=1e-5, abs=1e-6), name
                else:
                    assert np.isnan(value)
    assert tasks == {"ir", "sts"}


def test_it_runs_through_on_four_devices(golden, tmp_path):
    settings = settings_of(
        golden, tmp_path, optimizer={"learning_rate": 1e-4, "max_steps": 12}, export=False, mesh={"fsdp": 2}
    )
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(tmp_path / "settings.yaml")]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "CODIEMB_JAX_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
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
