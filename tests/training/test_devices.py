"""Loss and gradient do not depend on how many devices there are, how weights are split, or on chunks."""

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
from codiemb_jax.training.schedule import learning_rate
from codiemb_jax.training.state import abstract_state, initial_state
from codiemb_jax.training.step import make_step

STEPS = 10


def settings_of(golden, chunks: int, pool: int | None, **mesh: int) -> Settings:
    return Settings.model_validate(
        {
            "output_dir": "unused",
            "model": {"path": str(golden / "youtu_tiny"), "compute_dtype": "float32"},
            "data": {
                "ir": [golden / "data" / "news.jsonl"], "sts": [golden / "data" / "questions.jsonl"],
                "ir_global_batch_size": 8, "sts_global_batch_size": 16, "positives_per_query": 1,
                "query_max_tokens": 64, "passage_max_tokens": 64,
            },
            "objective": {"ir_pool_size": pool, "sts_list_size": pool},
            "optimizer": {"learning_rate": 1e-4, "warmup_steps": 2, "max_steps": STEPS},
            "encode_chunks": chunks,
            "mesh": mesh,
        }
    )  # fmt: skip


def run(settings: Settings, devices: int, cache) -> tuple[list[dict[str, float]], int]:
    """Loss and gradient norm of every step, with its row length, and how many programs were compiled."""
    mesh = make_mesh(settings.mesh, jax.devices()[:devices])
    model = open_model(settings.model, settings.prompt, mesh)
    encoder = PromptTokenizer(model.blueprint.tokenizer(), settings.prompt)
    limits = {"query_max_tokens": 64, "passage_max_tokens": 64}
    data_sets = [
        prepare(path, task, encoder, cache=cache, **limits)
        for task, paths in (("ir", settings.data.ir), ("sts", settings.data.sts))
        for path in paths
    ]
    plan = Plan([Source(d.path.stem, d.task, d.index) for d in data_sets], settings.data, settings.seed)
    schedule = learning_rate(settings.optimizer, STEPS)
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
        for step_plan, batch in batches(plan, data_sets, row_sharding(mesh), start=0, stop=STEPS):
            state, metrics = steps[step_plan.task](state, np.int32(step_plan.number), batch)
            values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
            line = {"task": step_plan.task, "epoch": step_plan.epoch, "row_length": step_plan.row_length}
            lines.append(line | values)
    return lines, sum(step._cache_size() for step in steps.values())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def one_device(golden, cache):
    """The run on a single device, by pool size."""
    return {pool: run(settings_of(golden, 1, pool), 1, cache)[0] for pool in (None, 2)}


@pytest.mark.parametrize(
    ("devices", "chunks", "pool", "mesh"),
    [
        (1, 2, None, {}),
        (2, 1, None, {}),
        (2, 1, None, {"fsdp": 2}),
        (2, 1, None, {"tensor": 2}),
        (4, 2, None, {}),
        (4, 1, 2, {"fsdp": 4}),
        (8, 1, None, {}),
        (8, 1, 2, {}),
        (8, 1, None, {"fsdp": 8}),
        (8, 1, None, {"fsdp": 2, "tensor": 2}),
    ],
    ids=lambda value: json.dumps(value).replace('"', ""),
)
def test_any_number_of_devices_takes_the_same_steps(devices, chunks, pool, mesh, golden, cache, one_device):
    found, _ = run(settings_of(golden, chunks, pool, **mesh), devices, cache)
    expected = one_device[pool]
    assert [line["task"] for line in found] == [line["task"] for line in expected]
    assert {line["task"] for line in found} == {"ir", "sts"}
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5 if number == 0 else 5e-4), (number, name)


def test_pools_are_a_matter_of_the_settings(one_device):
    whole, pooled = (next(line["loss"] for line in one_device[pool] if line["task"] == "ir") for pool in (None, 2))
    assert pooled < 0.9 * whole  # fewer candidates, smaller loss


def test_it_compiles_once_a_task_and_shape(golden, cache):
    settings = settings_of(golden, 1, None)
    # Small batches of texts of many lengths: several shapes a task.
    data = settings.data.model_copy(update={"ir_global_batch_size": 2, "sts_global_batch_size": 4})
    lines, compiled = run(settings.model_copy(update={"data": data}), 1, cache)
    met = {(line["task"], line["row_length"]) for line in lines}
    assert compiled == len(met)
    assert len(met) > 2
    assert len(met) < len(lines)


@pytest.fixture(scope="module")
def bert(golden, tmp_path_factory):
    """A tiny BERT that drops a tenth of everything, with the tokenizer of the golden model."""
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


def with_dropout(golden, bert, chunks: int, **mesh: int) -> Settings:
    settings = settings_of(golden, chunks, None, **mesh)
    changes = {"path": str(bert), "pooling": "cls", "projection_dim": 24}
    return settings.model_copy(update={"model": settings.model.model_copy(update=changes)})


def test_dropout_and_projection_do_not_depend_on_devices_or_chunks(golden, cache, bert):
    expected, _ = run(with_dropout(golden, bert, 1), 1, cache)
    for devices, chunks, mesh in ((4, 2, {}), (8, 1, {"fsdp": 2, "tensor": 2})):
        found, _ = run(with_dropout(golden, bert, chunks, **mesh), devices, cache)
        for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            for name in ("loss", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5 if number == 0 else 1e-3), (number, name)


def test_dropout_is_another_each_step_and_the_same_for_the_same_seed(golden, cache, bert):
    def losses(dropout: float | None = None) -> list[float]:
        settings = with_dropout(golden, bert, 1)
        changes = {
            "model": settings.model.model_copy(update={"dropout": dropout}),
            "data": settings.data.model_copy(update={"sts": []}),  # one batch, the same at every step
            "optimizer": settings.optimizer.model_copy(update={"learning_rate": 0.0}),
        }
        lines, _ = run(settings.model_copy(update=changes), 1, cache)
        return [line["loss"] for line in lines]

    once = losses()
    assert len(set(once)) == STEPS
    assert losses() == once
    still = losses(dropout=0.0)
    assert np.ptp(still) < 1e-5
    assert np.std(once) > 1e-3
