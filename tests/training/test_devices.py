"""Tests that losses and gradients do not depend on the number of devices, the mesh, chunks or packing."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import Settings
from codiemb_jax.data.loader import batches
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.sampler import Plan, Source
from codiemb_jax.sharding import make_mesh, row_sharding
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.run import batch_layout
from codiemb_jax.training.schedule import make_schedule
from codiemb_jax.training.state import abstract_state, initial_state
from codiemb_jax.training.step import make_step

STEPS = 10


def make_settings(golden, chunks: int, group_size: int | None, packing: bool = False, **mesh: int) -> Settings:
    return Settings.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": str(golden / "youtu_tiny"), "compute_dtype": "float32"},
            "data": {
                "ir": [golden / "data" / "news.jsonl"], "sts": [golden / "data" / "questions.jsonl"],
                "ir_global_batch_size": 8, "sts_global_batch_size": 16, "positives_per_query": 1,
                "query_max_tokens": 64, "passage_max_tokens": 64, "packing": packing,
                "row_tokens": 128 if packing else None,
            },
            "objective": {"ir_pool_size": group_size, "sts_list_size": group_size},
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 2, "max_steps": STEPS},
            "encode_chunks": chunks,
            "mesh": mesh,
        }
    )  # fmt: skip


def run(settings: Settings, devices: int, cache) -> tuple[list[dict[str, float]], int]:
    """Runs training and returns the metrics and the shape of every step, and the number of compilations."""
    mesh = make_mesh(settings.mesh, jax.devices()[:devices])
    model = open_model(settings.model, settings.prompt, mesh)
    tokenizer = PromptTokenizer(model.blueprint.tokenizer(), settings.prompt)
    limits = {"query_max_tokens": 64, "passage_max_tokens": 64}
    datasets = [
        prepare(path, task, tokenizer, cache=cache, **limits)
        for task, paths in (("ir", settings.data.ir), ("sts", settings.data.sts))
        for path in paths
    ]
    sources = [Source(d.path.stem, d.task, d.index) for d in datasets]
    group_sizes = {task.name: task.group_size for task in settings.tasks}
    plan = Plan(sources, settings.data, settings.seed, batch_layout(settings, mesh), group_sizes)
    schedule = make_schedule(settings.optimizer, STEPS)
    optimizer = make_optimizer(settings.optimizer, schedule)
    lines = []
    with jax.set_mesh(mesh):
        layout = abstract_state(optimizer, model.abstract)
        state = initial_state(optimizer, model.load(settings.seed), layout)
        steps = {
            task.name: make_step(
                model.graph, optimizer, schedule, settings, mesh, layout, task.name, model.config.has_dropout
            )
            for task in settings.tasks
        }
        for step_plan, batch in batches(plan, datasets, row_sharding(mesh), start=0, stop=STEPS):
            state, metrics = steps[step_plan.task](state, np.int32(step_plan.number), batch)
            values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
            shape = (step_plan.layout.rows, step_plan.layout.row_length)
            lines.append({"task": step_plan.task, "epoch": step_plan.epoch, "shape": shape} | values)
    return lines, sum(step._cache_size() for step in steps.values())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_device(golden, cache):
    """The steps on a single device, with one text per row, by group size."""
    return {size: run(make_settings(golden, 1, size), 1, cache)[0] for size in (None, 2)}


def assert_close(actual: list[dict], expected: list[dict], rtol: float) -> None:
    """Asserts that metrics are equal up to 1e-5 at the first step and `rtol` at the others."""
    for step, (line, expected_line) in enumerate(zip(actual, expected, strict=True)):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(expected_line[name], rel=1e-5 if step == 0 else rtol), (step, name)


@pytest.mark.parametrize(
    ("devices", "chunks", "group_size", "mesh"),
    [
        pytest.param(1, 2, None, {}, marks=pytest.mark.slow),
        pytest.param(2, 1, None, {}, marks=pytest.mark.slow),
        pytest.param(2, 1, None, {"fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(2, 1, None, {"tensor": 2}, marks=pytest.mark.slow),
        pytest.param(4, 2, None, {}, marks=pytest.mark.slow),
        (4, 1, 2, {"fsdp": 4}),
        pytest.param(8, 1, None, {}, marks=pytest.mark.slow),
        pytest.param(8, 1, 2, {}, marks=pytest.mark.slow),
        pytest.param(8, 1, None, {"fsdp": 8}, marks=pytest.mark.slow),
        (8, 1, None, {"fsdp": 2, "tensor": 2}),
    ],
    ids=lambda value: json.dumps(value).replace('"', ""),
)
def test_steps_do_not_depend_on_devices_or_chunks(devices, chunks, group_size, mesh, golden, cache, one_device):
    actual, _ = run(make_settings(golden, chunks, group_size, **mesh), devices, cache)
    expected = one_device[group_size]
    assert [line["task"] for line in actual] == [line["task"] for line in expected]
    assert {line["task"] for line in actual} == {"ir", "sts"}
    assert_close(actual, expected, rtol=5e-4)


@pytest.mark.parametrize(
    ("devices", "chunks", "group_size", "mesh"),
    [
        (1, 1, None, {}),
        pytest.param(1, 4, 2, {}, marks=pytest.mark.slow),
        pytest.param(4, 1, None, {}, marks=pytest.mark.slow),
        pytest.param(4, 2, None, {"fsdp": 2}, marks=pytest.mark.slow),
        pytest.param(4, 4, 2, {}, marks=pytest.mark.slow),
        pytest.param(8, 1, None, {}, marks=pytest.mark.slow),
        (8, 2, 2, {"fsdp": 2, "tensor": 2}),
        pytest.param(8, 4, None, {"fsdp": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda value: json.dumps(value).replace('"', ""),
)
def test_steps_do_not_depend_on_packing(devices, chunks, group_size, mesh, golden, cache, one_device):
    actual, _ = run(make_settings(golden, chunks, group_size, packing=True, **mesh), devices, cache)
    expected = one_device[group_size]
    assert [line["task"] for line in actual] == [line["task"] for line in expected]
    assert {line["shape"][1] for line in actual} == {128}
    if chunks == 1:  # otherwise rows are added to fill the chunks
        shards = devices // mesh.get("tensor", 1)
        rows = {line["task"]: line["shape"][0] * shards for line in actual}
        assert rows["ir"] <= 24  # two of the 48 texts, most of which have 64 tokens, share a row
        assert rows["sts"] <= 16  # the 32 texts share rows
    assert_close(actual, expected, rtol=5e-4)


def test_smaller_groups_reduce_the_loss(one_device):
    whole, grouped = (next(line["loss"] for line in one_device[size] if line["task"] == "ir") for size in (None, 2))
    assert grouped < 0.9 * whole  # there are fewer candidates


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_once_per_task_and_shape(packing, golden, cache):
    settings = make_settings(golden, 1, None, packing=packing)
    # Small batches of texts with various lengths have several shapes per task.
    data = settings.data.model_copy(update={"ir_global_batch_size": 2, "sts_global_batch_size": 2, "row_tokens": None})
    lines, compilations = run(settings.model_copy(update={"data": data}), 1, cache)
    seen = {(line["task"], *line["shape"]) for line in lines}
    assert compilations == len(seen)
    assert len(seen) > 2
    assert len(seen) < len(lines)


@pytest.fixture(scope="module")
def bert(golden, tmp_path_factory):
    """A tiny BERT with dropout 0.1 and the tokenizer of the golden model."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=2000, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(golden / "youtu_tiny" / name, folder)
    return folder


def make_dropout_settings(golden, bert, chunks: int, packing: bool = False, **mesh: int) -> Settings:
    settings = make_settings(golden, chunks, None, packing, **mesh)
    changes = {"path": str(bert), "pooling": "cls", "projection_dim": 24}
    return settings.model_copy(update={"model": settings.model.model_copy(update=changes)})


@pytest.mark.slow
def test_dropout_and_projection_do_not_depend_on_devices_chunks_or_packing(golden, cache, bert):
    expected, _ = run(make_dropout_settings(golden, bert, 1), 1, cache)
    for devices, chunks, packing, mesh in (
        (4, 2, False, {}),
        (8, 1, False, {"fsdp": 2, "tensor": 2}),
        (1, 1, True, {}),
        (4, 2, True, {}),
        (8, 4, True, {"fsdp": 2, "tensor": 2}),
    ):
        actual, _ = run(make_dropout_settings(golden, bert, chunks, packing, **mesh), devices, cache)
        assert_close(actual, expected, rtol=1e-3)


@pytest.mark.slow
def test_dropout_differs_between_steps_and_is_deterministic(golden, cache, bert):
    def losses(dropout: float | None = None) -> list[float]:
        settings = make_dropout_settings(golden, bert, 1)
        changes = {
            "model": settings.model.model_copy(update={"dropout": dropout}),
            "data": settings.data.model_copy(update={"sts": []}),  # every step has the same batch
            "optimizer": settings.optimizer.model_copy(update={"learning_rate": 0.0}),
        }
        lines, _ = run(settings.model_copy(update=changes), 1, cache)
        return [line["loss"] for line in lines]

    with_dropout = losses()
    assert len(set(with_dropout)) == STEPS
    assert losses() == with_dropout
    without_dropout = losses(dropout=0.0)
    assert np.ptp(without_dropout) < 1e-5
    assert np.std(with_dropout) > 1e-3
