"""Objectives on simulated meshes: a batch, the layouts of its groups on devices, and what must not depend on them."""

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
# (mesh, size of a group): smaller than a shard, equal to it, larger, and lying across its borders.
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
    """queries, passages, present."""
    rng = np.random.default_rng(0)
    passages = vectors(rng, B * (POSITIVES + NEGATIVES), DIM).reshape(B, POSITIVES + NEGATIVES, DIM)
    return vectors(rng, B, DIM), passages, rng.random((B, NEGATIVES)) < 0.8


@cache
def sts_batch():
    """first, second, first of the middle, second of the middle, scores."""
    rng = np.random.default_rng(1)
    return *(vectors(rng, B, DIM) for _ in range(4)), rng.integers(0, 5, B) / 4


def ir_examples(queries, passages, present) -> Examples:
    return Examples(queries, passages, present, np.full(len(queries), np.nan, queries.dtype))


def sts_examples(first, second, middle_first, middle_second, scores) -> Examples:
    """Pairs; `middle_first` None: without a middle layer."""
    middle = None if middle_first is None else (middle_first, middle_second[:, None])
    return Examples(first, second[:, None], np.zeros((len(first), 0), bool), scores, middle)


def values_and_grads(loss, inputs):
    """((loss, parts), gradients of the inputs)."""
    return jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True))(*inputs)


def ir_loss(compute):
    """Queries and passages -> loss and parts of the batch."""
    return lambda queries, passages: compute(ir_examples(queries, passages, ir_batch()[2]))


def sts_loss(compute):
    """First and second texts, then both of the middle layer -> loss and parts of the batch."""
    return lambda *texts: compute(sts_examples(*texts, sts_batch()[4]))


def on_one(objective: Compute, settings: ObjectiveSettings, size: int | None):
    """The objective without a mesh."""
    return lambda examples: objective(examples, settings, Groups(size))


def per_device(objective: Compute, settings: ObjectiveSettings, size: int | None, shape: tuple[int, int]):
    """The objective on a (data, fsdp) mesh, the examples cut along their leading axis."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    return jax.shard_map(
        lambda examples: objective(examples, settings, Groups(size, AXES)),
        mesh=mesh,
        in_specs=PartitionSpec(AXES),
        out_specs=PartitionSpec(),
        check_vma=True,
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def assert_same_on_devices(loss, inputs, shape, size, expected):
    """Value and gradients are those of no mesh, and only what does not lie on one device is gathered."""
    traced = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True)).trace(*inputs)
    assert_same(traced.lower().compile()(*inputs), expected)
    shard = B // (shape[0] * shape[1])
    assert ("all_gather" in str(traced.jaxpr)) == (shard % (size or B) != 0)
