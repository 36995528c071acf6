"""Tests that gradients do not depend on the mesh or the number of chunks, and that chunks save memory."""

from functools import partial

import jax
import numpy as np
import pytest

from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import Settings
from codiemb_jax.data.loader import batches
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.sampler import Plan, Source
from codiemb_jax.sharding import make_mesh, row_sharding
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.training.ahead import trace_step
from codiemb_jax.training.run import batch_layout
from codiemb_jax.training.step import batch_loss
from tests.helpers import golden_settings

LIMITS = {"query_max_tokens": 64, "passage_max_tokens": 64}


def gradients(golden, cache, task, devices, chunks, packing, **mesh):
    """Returns the gradient of the first batch with respect to every weight."""
    file = golden / "data" / ("news.jsonl" if task == "ir" else "questions.jsonl")
    data = {task: [file], "packing": packing, "row_tokens": 128 if packing else None, **LIMITS}
    values = golden_settings(golden, cache, data=data, mesh=mesh, encode_chunks=chunks)
    values["model"]["compute_dtype"] = "float32"
    settings = Settings.model_validate(values)
    device_mesh = make_mesh(settings.mesh, jax.devices()[:devices])
    model = open_model(settings.model, settings.prompt, device_mesh)
    tokenizer = PromptTokenizer(model.blueprint.tokenizer(), settings.prompt)
    dataset = prepare(file, task, tokenizer, cache=cache, **LIMITS)
    layout = batch_layout(settings, device_mesh)
    plan = Plan([Source("data", task, dataset.index)], settings.data, settings.seed, layout, {task: None})
    with jax.set_mesh(device_mesh):
        _, batch = next(batches(plan, [dataset], row_sharding(device_mesh), start=0, stop=1))
        loss = partial(batch_loss, model.graph, batch=batch, task=task, settings=settings, mesh=device_mesh)
        grads, _ = jax.jit(jax.grad(lambda params: loss(params), has_aux=True))(model.load(settings.seed))
        return jax.tree.map(np.asarray, jax.device_get(grads))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def expected(golden, cache):
    """The gradients of each task on one device, with one text per row and without chunks."""
    return {task: gradients(golden, cache, task, 1, 1, packing=False) for task in ("ir", "sts")}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("task", ["ir", "sts"])
@pytest.mark.parametrize(
    ("devices", "chunks", "mesh"),
    [
        pytest.param(1, 2, {}, marks=pytest.mark.slow),
        pytest.param(1, 4, {}, marks=pytest.mark.slow),
        pytest.param(8, 1, {}, marks=pytest.mark.slow),
        pytest.param(8, 1, {"fsdp": 8}, marks=pytest.mark.slow),
        pytest.param(8, 1, {"data": 4, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param(8, 1, {"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        (8, 2, {"data": 2, "fsdp": 2, "tensor": 2}),
        pytest.param(8, 4, {"fsdp": 2, "tensor": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_mesh_or_chunks(devices, chunks, mesh, task, packing, golden, cache, expected):
    if not packing and task == "ir" and 8 % (chunks * mesh.get("data", 1) * mesh.get("fsdp", 1)):
        chunks = 1  # without packing, the eight queries of the batch must be a multiple
    found = gradients(golden, cache, task, devices, chunks, packing, **mesh)
    for (path, grad), want in zip(
        jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(expected[task]), strict=True
    ):
        np.testing.assert_allclose(
            grad, want, rtol=0, atol=1e-5 * np.abs(want).max(), err_msg=jax.tree_util.keystr(path)
        )


def test_memory_falls_with_the_number_of_chunks(golden, tmp_path):
    sizes = []
    for chunks in (1, 2, 4, 8):
        values = golden_settings(golden, tmp_path, data={"ir": ["data"]}, encode_chunks=chunks)
        settings = Settings.model_validate(values)
        mesh = make_mesh(settings.mesh, jax.devices()[:1])
        model = open_model(settings.model, settings.prompt, mesh)
        layout = batch_layout(settings, mesh)(np.full((64, 6), 128), 128, None)
        step = trace_step(settings, model.graph, model.abstract, "ir", layout, 5, dropout=False)
        sizes.append(step.lower().compile().memory_analysis().temp_size_in_bytes)
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2] > 2.5 * sizes[3]
