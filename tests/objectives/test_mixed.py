"""Tests the mixed-batch objective against the objectives of single devices, for every pair of objectives."""

from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from codiemb_jax.batch import PassageTexts
from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.groups import Examples, Groups
from codiemb_jax.objectives.mixed import mixed
from codiemb_jax.objectives.registry import OBJECTIVES
from tests.objectives.layouts import AXES, DIM, NEGATIVES, POSITIVES, assert_same, vectors

DEVICES, EXAMPLES_PER_DEVICE = 8, 3
TASKS = ["ir", "sts", "sts", "ir", "ir", "sts", "ir", "sts"]
SETTINGS = ObjectiveSettings(temperature=0.1, mid_info_nce_threshold=0.5)
PARTS = {
    ("info_nce", "codi"): {"info_nce", "pearson", "rank_kl", "pro", "mid_info_nce"},
    ("info_nce", "info_nce"): {"info_nce", "sts_info_nce"},
    ("info_nce", "cosent"): {"info_nce", "cosent"},
    ("cosent", "codi"): {"cosent", "pearson", "rank_kl", "pro", "mid_info_nce"},
    ("cosent", "info_nce"): {"cosent", "info_nce"},
    ("cosent", "cosent"): {"cosent", "sts_cosent"},
}


def make_batch(tasks, *, equal=False):
    """Returns embeddings (final queries, passages; middle queries, passages), `present` and scores."""
    rng = np.random.default_rng(2)
    count, texts = DEVICES * EXAMPLES_PER_DEVICE, POSITIVES + NEGATIVES
    inputs = [vectors(rng, *shape, DIM) for shape in ((count,), (count, texts)) * 2]
    if equal:
        inputs = [np.broadcast_to(inputs[0][0], x.shape).copy() for x in inputs]
    is_ir = np.repeat([task == "ir" for task in tasks], EXAMPLES_PER_DEVICE)
    present = (rng.random((count, NEGATIVES)) < 0.7) & is_ir[:, None]
    return inputs, present, np.where(is_ir, np.nan, rng.integers(0, 4, count) / 2)


@cache
def on_mesh(names, sizes):
    """Returns a function from a batch to (loss, parts) and gradients of the embeddings, on eight devices.

    Args:
      names: The objective of each task.
      sizes: The group size of each task.
    """
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    objectives = {task: OBJECTIVES[name][task] for task, name in names}
    sharded = jax.shard_map(
        lambda examples: mixed(examples, SETTINGS, objectives, dict(sizes), AXES),
        mesh=mesh,
        in_specs=PartitionSpec(AXES),
        out_specs=PartitionSpec(),
        check_vma=True,
    )

    def loss(queries, passages, middle_queries, middle_passages, present, scores):
        return sharded(Examples(queries, passages, present, scores, (middle_queries, middle_passages)))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


@cache
def on_device(task, name, size):
    """Returns the same function for the examples of one device, without a mesh."""

    def loss(queries, passages, middle_queries, middle_passages, present, scores):
        middle = (middle_queries, middle_passages)
        examples = Examples(queries, passages, present, scores, middle)
        return OBJECTIVES[name][task].compute(examples, SETTINGS, Groups(size))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


def device_by_device(tasks, names, sizes, inputs, present, scores):
    """Returns the expected result of `on_mesh`, computed for one device at a time, with parts by (task, name)."""
    losses, parts = [], {}
    gradients = [np.zeros_like(x) for x in inputs]
    for device, task in enumerate(tasks):
        rows = slice(device * EXAMPLES_PER_DEVICE, (device + 1) * EXAMPLES_PER_DEVICE)
        texts = slice(None) if task == "ir" else slice(1)  # all but the first passage of a pair are padding
        indices = (rows, (rows, texts)) * 2
        device_inputs = [x[index] for x, index in zip(inputs, indices, strict=True)]
        device_present = present[rows] if task == "ir" else np.zeros((EXAMPLES_PER_DEVICE, 0), bool)
        compute = on_device(task, names[task], sizes[task])
        (loss, device_parts), device_gradients = compute(*device_inputs, device_present, scores[rows])
        losses.append(loss)
        for name, part in device_parts.items():
            parts.setdefault((task, name), []).append(part)
        for gradient, index, device_gradient in zip(gradients, indices, device_gradients, strict=True):
            gradient[index] += device_gradient / len(tasks)
    return (np.mean(losses), {name: np.mean(values) for name, values in parts.items()}), tuple(gradients)


ALL, GROUPS = (("ir", None), ("sts", None)), (("ir", 1), ("sts", 3))


@pytest.mark.parametrize("sizes", [ALL, GROUPS])
@pytest.mark.parametrize(("ir", "sts"), PARTS)
def test_loss_is_the_mean_over_devices(ir, sts, sizes):
    inputs, present, scores = make_batch(TASKS)
    names = (("ir", ir), ("sts", sts))
    (loss, parts), gradients = on_mesh(names, sizes)(*inputs, present, scores)
    expected = device_by_device(TASKS, dict(names), dict(sizes), inputs, present, scores)
    (expected_loss, task_parts), expected_gradients = expected
    assert set(parts) == PARTS[ir, sts]
    expected_parts = {
        f"{task}_{name}" if task == "sts" and ("ir", name) in task_parts else name: part
        for (task, name), part in task_parts.items()
    }
    assert_same((loss, parts, gradients), (expected_loss, expected_parts, expected_gradients))
    # Padding and the middle layer of IR examples have no gradient.
    is_ir = np.repeat([task == "ir" for task in TASKS], EXAMPLES_PER_DEVICE)
    for gradient in gradients[1::2]:
        assert (gradient[~is_ir, 1:] == 0).all()
        assert (gradient[:, POSITIVES:][~present] == 0).all()
    assert all((gradient[is_ir] == 0).all() for gradient in gradients[2:])
    for gradient in gradients[:2]:
        assert np.abs(gradient[is_ir]).max() > 1e-4 and np.abs(gradient[~is_ir]).max() > 1e-4


@pytest.mark.parametrize(("ir", "sts"), PARTS)
def test_mixed_batches_gather_nothing(ir, sts):
    inputs, present, scores = make_batch(TASKS)
    traced = on_mesh((("ir", ir), ("sts", sts)), ALL).trace(*inputs, present, scores)
    assert "all_gather" not in str(traced.jaxpr)


@pytest.mark.parametrize("task", ["ir", "sts"])
@pytest.mark.parametrize(("ir", "sts"), PARTS)
def test_all_devices_with_the_same_task(ir, sts, task):
    """Parts of the other task are NaN, or missing if there is no data for it."""
    names = {"ir": ir, "sts": sts}
    inputs, present, scores = make_batch([task] * DEVICES)
    expected = device_by_device([task] * DEVICES, names, {"ir": None, "sts": None}, inputs, present, scores)
    (expected_loss, task_parts), expected_gradients = expected
    expected_parts = {name: part for (_, name), part in task_parts.items()}
    (loss, parts), gradients = on_mesh(tuple(names.items()), ALL)(*inputs, present, scores)
    assert set(parts) == PARTS[ir, sts]
    finite = {name.removeprefix("sts_"): part for name, part in parts.items() if not np.isnan(part)}
    assert_same((loss, finite, gradients), (expected_loss, expected_parts, expected_gradients))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert_same(
        on_mesh(((task, names[task]),), ((task, None),))(*inputs, present, scores),
        ((expected_loss, expected_parts), expected_gradients),
    )


@pytest.mark.parametrize("tasks", [TASKS, ["ir"] * DEVICES, ["sts"] * DEVICES], ids=["both", "ir", "sts"])
@pytest.mark.parametrize(("ir", "sts"), PARTS)
def test_gradients_are_finite_in_edge_cases(ir, sts, tasks):
    compute = on_mesh((("ir", ir), ("sts", sts)), ALL)
    for equal in (False, True):
        inputs, present, scores = make_batch(tasks, equal=equal)
        for mask in (present, np.zeros_like(present)):
            for labels in (scores, np.where(np.isnan(scores), np.nan, 1.0), np.where(np.isnan(scores), np.nan, 1e15)):
                (loss, _), gradients = compute(*inputs, mask, labels)
                assert np.isfinite(loss)
                assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_duplicates_are_masked_and_counted_on_ir_devices():
    inputs, present, scores = make_batch(TASKS)
    rng = np.random.default_rng(3)
    texts = rng.integers(0, 6, inputs[1].shape[:2]).astype(np.int32)
    texts[:, POSITIVES:][~present] = -1
    texts = PassageTexts(texts, texts[:, :POSITIVES])
    examples = Examples(*inputs[:2], present, scores, tuple(inputs[2:]), texts)
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    objectives = {"ir": OBJECTIVES["info_nce"]["ir"], "sts": OBJECTIVES["codi"]["sts"]}
    sizes = {"ir": None, "sts": None}
    sharded = jax.shard_map(
        lambda examples: mixed(examples, SETTINGS, objectives, sizes, AXES),
        mesh=mesh,
        in_specs=PartitionSpec(AXES),
        out_specs=PartitionSpec(),
    )
    _, parts = jax.jit(sharded)(examples)
    by_device = [
        jax.tree.map(lambda x, d=device: x[d * EXAMPLES_PER_DEVICE : (d + 1) * EXAMPLES_PER_DEVICE], examples)
        for device, task in enumerate(TASKS)
        if task == "ir"
    ]
    masked = 0
    for own in by_device:
        for i in range(EXAMPLES_PER_DEVICE):
            same = np.isin(own.texts.passages, own.texts.positives[i])
            same[i, :POSITIVES] = False
            masked += same.sum()
    assert parts["masked"] == masked > 10
    assert np.issubdtype(parts["masked"].dtype, np.integer)
    compute = jax.jit(lambda examples: objectives["ir"].compute(examples, SETTINGS, Groups(None))[0])
    assert_same(parts["info_nce"], np.mean([compute(own) for own in by_device]))
