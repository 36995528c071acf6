"""The mixed-batch ablation: every pair of objectives, against each device's own task computed alone."""

from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.groups import Examples, Groups
from codiemb_jax.objectives.mixed import mixed
from codiemb_jax.objectives.registry import OBJECTIVES
from tests.objectives.layouts import AXES, DIM, NEGATIVES, POSITIVES, assert_same, vectors

DEVICES, EACH = 8, 3
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
    """Queries, passages and both of the middle layer; then `present` and scores.  `equal`: all vectors are the same."""
    rng = np.random.default_rng(2)
    count, texts = DEVICES * EACH, POSITIVES + NEGATIVES
    inputs = [vectors(rng, *shape, DIM) for shape in ((count,), (count, texts)) * 2]
    if equal:
        inputs = [np.broadcast_to(inputs[0][0], x.shape).copy() for x in inputs]
    is_ir = np.repeat([task == "ir" for task in tasks], EACH)
    present = (rng.random((count, NEGATIVES)) < 0.7) & is_ir[:, None]
    return inputs, present, np.where(is_ir, np.nan, rng.integers(0, 4, count) / 2)


@cache
def on_mesh(names, sizes):
    """Vectors, `present` and scores -> (loss, parts), and the gradients by the vectors, on eight devices.

    names, sizes: the objective and the size of the groups of each task.
    """
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    objectives = {task: OBJECTIVES[name][task] for task, name in names}
    of_devices = jax.shard_map(
        lambda examples: mixed(examples, SETTINGS, objectives, dict(sizes), AXES),
        mesh=mesh,
        in_specs=PartitionSpec(AXES),
        out_specs=PartitionSpec(),
        check_vma=True,
    )

    def loss(queries, passages, middle_queries, middle_passages, present, scores):
        return of_devices(Examples(queries, passages, present, scores, (middle_queries, middle_passages)))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


@cache
def alone(task, name, size):
    """The same of one device, without a mesh."""

    def loss(queries, passages, middle_queries, middle_passages, present, scores):
        middle = (middle_queries, middle_passages)
        examples = Examples(queries, passages, present, scores, middle)
        return OBJECTIVES[name][task].compute(examples, SETTINGS, Groups(size))

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


def one_by_one(tasks, names, sizes, inputs, present, scores):
    """What `on_mesh` should give, from each device's own examples and texts; parts by (task, name)."""
    losses, parts = [], {}
    gradients = [np.zeros_like(x) for x in inputs]
    for device, task in enumerate(tasks):
        own = slice(device * EACH, (device + 1) * EACH)
        texts = slice(None) if task == "ir" else slice(1)  # of a pair's texts only the first is one
        places = (own, (own, texts)) * 2
        of_device = [x[place] for x, place in zip(inputs, places, strict=True)]
        slots = present[own] if task == "ir" else np.zeros((EACH, 0), bool)
        (loss, own_parts), own_gradients = alone(task, names[task], sizes[task])(*of_device, slots, scores[own])
        losses.append(loss)
        for name, part in own_parts.items():
            parts.setdefault((task, name), []).append(part)
        for gradient, place, own_gradient in zip(gradients, places, own_gradients, strict=True):
            gradient[place] += own_gradient / len(tasks)
    return (np.mean(losses), {name: np.mean(values) for name, values in parts.items()}), tuple(gradients)


WHOLE, PARTLY = (("ir", None), ("sts", None)), (("ir", 1), ("sts", 3))


@pytest.mark.parametrize("sizes", [WHOLE, PARTLY])
@pytest.mark.parametrize(("ir", "sts"), PARTS)
def test_the_loss_is_the_mean_of_each_device_alone(ir, sts, sizes):
    inputs, present, scores = make_batch(TASKS)
    names = (("ir", ir), ("sts", sts))
    (loss, parts), gradients = on_mesh(names, sizes)(*inputs, present, scores)
    (expected, own_parts), expected_gradients = one_by_one(TASKS, dict(names), dict(sizes), inputs, present, scores)
    assert set(parts) == PARTS[ir, sts]
    by_name = {
        f"{task}_{name}" if task == "sts" and ("ir", name) in own_parts else name: part
        for (task, name), part in own_parts.items()
    }
    assert_same((loss, parts, gradients), (expected, by_name, expected_gradients))
    # What a pair or a query does not have, and the middle layer of a query, has no part in it.
    is_ir = np.repeat([task == "ir" for task in TASKS], EACH)
    for gradient in gradients[1::2]:
        assert (gradient[~is_ir, 1:] == 0).all()
        assert (gradient[:, POSITIVES:][~present] == 0).all()
    assert all((gradient[is_ir] == 0).all() for gradient in gradients[2:])
    for gradient in gradients[:2]:
        assert np.abs(gradient[is_ir]).max() > 1e-4 and np.abs(gradient[~is_ir]).max() > 1e-4


@pytest.mark.parametrize(("ir", "sts"), PARTS)
def test_nothing_is_gathered(ir, sts):
    inputs, present, scores = make_batch(TASKS)
    traced = on_mesh((("ir", ir), ("sts", sts)), WHOLE).trace(*inputs, present, scores)
    assert "all_gather" not in str(traced.jaxpr)


@pytest.mark.parametrize("task", ["ir", "sts"])
@pytest.mark.parametrize(("ir", "sts"), PARTS)
def test_a_step_in_which_all_devices_have_the_same_task(ir, sts, task):
    """The parts of the other task are NaN; without data of the other task there are none."""
    names = {"ir": ir, "sts": sts}
    inputs, present, scores = make_batch([task] * DEVICES)
    expected = one_by_one([task] * DEVICES, names, {"ir": None, "sts": None}, inputs, present, scores)
    (loss, own_parts), expected_gradients = expected
    own_parts = {name: part for (_, name), part in own_parts.items()}
    found = on_mesh(tuple(names.items()), WHOLE)(*inputs, present, scores)
    (both_loss, both_parts), gradients = found
    assert set(both_parts) == PARTS[ir, sts]
    held = {name.removeprefix("sts_"): part for name, part in both_parts.items() if not np.isnan(part)}
    assert_same((both_loss, held, gradients), (loss, own_parts, expected_gradients))
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert_same(
        on_mesh(((task, names[task]),), ((task, None),))(*inputs, present, scores),
        ((loss, own_parts), expected_gradients),
    )


@pytest.mark.parametrize("tasks", [TASKS, ["ir"] * DEVICES, ["sts"] * DEVICES], ids=["both", "ir", "sts"])
@pytest.mark.parametrize(("ir", "sts"), PARTS)
def test_gradients_are_finite_whatever_the_vectors(ir, sts, tasks):
    compute = on_mesh((("ir", ir), ("sts", sts)), WHOLE)
    for equal in (False, True):
        inputs, present, scores = make_batch(tasks, equal=equal)
        for slots in (present, np.zeros_like(present)):
            for labels in (scores, np.where(np.isnan(scores), np.nan, 1.0), np.where(np.isnan(scores), np.nan, 1e15)):
                (loss, _), gradients = compute(*inputs, slots, labels)
                assert np.isfinite(loss)
                assert all(np.isfinite(gradient).all() for gradient in gradients)
