"""Test batches, and helpers that compare objectives with and without a mesh."""

from functools import cache

import jax
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from numpy.testing import assert_allclose

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.groups import Examples, Groups
from codiemb_jax.objectives.registry import Compute

AXES = ("data", "fsdp")
B, DIM, POSITIVES, NEGATIVES = 24, 8, 2, 3
# (mesh shape, group size): groups are smaller than, equal to or larger than a shard, or cross its boundaries.
LAYOUTS = [
    ((1, 1), 8),
    ((2, 1), 8),
    ((2, 2), 3),
    ((1, 4), 8),
    ((4, 2), 2),
    ((4, 2), 3),
    ((4, 2), 8),
    ((4, 2), None),
]


def vectors(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@cache
def ir_batch():
    """Returns queries, passages and `present`."""
    rng = np.random.default_rng(0)
    passages = vectors(rng, B * (POSITIVES + NEGATIVES), DIM).reshape(B, POSITIVES + NEGATIVES, DIM)
    return vectors(rng, B, DIM), passages, rng.random((B, NEGATIVES)) < 0.8


@cache
def sts_batch():
    """Returns first and second texts, first and second texts of the middle layer, and scores."""
    rng = np.random.default_rng(1)
    return *(vectors(rng, B, DIM) for _ in range(4)), rng.integers(0, 5, B) / 4


def ir_examples(queries, passages, present) -> Examples:
    return Examples(queries, passages, present, np.full(len(queries), np.nan, queries.dtype))


def sts_examples(first, second, middle_first, middle_second, scores) -> Examples:
    """Returns examples of pairs, without a middle layer if `middle_first` is None."""
    middle = None if middle_first is None else (middle_first, middle_second[:, None])
    return Examples(first, second[:, None], np.zeros((len(first), 0), bool), scores, middle)


def values_and_grads(loss, inputs):
    """Returns ((loss, parts), gradients with respect to the inputs)."""
    return jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True))(*inputs)


def ir_loss(compute):
    """Returns a function from queries and passages to (loss, parts)."""
    return lambda queries, passages: compute(ir_examples(queries, passages, ir_batch()[2]))


def sts_loss(compute):
    """Returns a function from first and second texts, of the final and the middle layer, to (loss, parts)."""
    return lambda *texts: compute(sts_examples(*texts, sts_batch()[4]))


def without_mesh(objective: Compute, settings: ObjectiveSettings, size: int | None):
    """Returns the objective without a mesh."""
    return lambda examples: objective(examples, settings, Groups(size))


def on_mesh(objective: Compute, settings: ObjectiveSettings, size: int | None, shape: tuple[int, int]):
    """Returns the objective on a (data, fsdp) mesh, over which the examples are sharded."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    return jax.shard_map(
        lambda examples: objective(examples, settings, Groups(size, AXES)),
        mesh=mesh,
        in_specs=PartitionSpec(AXES),
        out_specs=PartitionSpec(),
        check_vma=True,
    )


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def assert_same_on_mesh(loss, inputs, shape, size, expected):
    """Asserts that value and gradients equal those without a mesh, and that only groups across devices are gathered."""
    traced = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True)).trace(*inputs)
    assert_same(traced.lower().compile()(*inputs), expected)
    shard = B // (shape[0] * shape[1])
    assert ("all_gather" in str(traced.jaxpr)) == (shard % (size or B) != 0)
