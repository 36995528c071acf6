"""Tests InfoNCE around a ring of devices against NumPy in float64, and against the dense form."""

from functools import cache
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives import contrastive, ring
from codiemb_jax.objectives.contrastive import dense_info_nce, info_nce_ir
from codiemb_jax.objectives.groups import Groups
from codiemb_jax.objectives.ring import ring_info_nce
from tests.objectives.layouts import AXES, B, ir_batch, ir_examples, vectors

DIM = 8
MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}
"""Sizes of the data and fsdp axes, by number of devices."""


def numpy_info_nce(queries, passages, present, size, temperature):
    """Returns the mean loss and its gradients with respect to queries and passages."""
    queries, passages = queries.astype(np.float64), passages.astype(np.float64)
    b, texts, _ = passages.shape
    positives = texts - present.shape[1]
    scores = np.einsum("qd,epd->qep", queries, passages) / temperature
    loss, to_scores = 0.0, np.zeros_like(scores)
    for i in range(b):
        in_pool = np.arange(b) // size == i // size
        for k in range(positives):
            is_candidate = np.zeros((b, texts), bool)
            is_candidate[in_pool, k] = True
            is_candidate[in_pool, positives:] = present[in_pool]
            candidates = scores[i][is_candidate]
            log_sum = candidates.max() + np.log(np.exp(candidates - candidates.max()).sum())
            loss += (log_sum - scores[i, i, k]) / (b * positives)
            to_scores[i][is_candidate] += np.exp(candidates - log_sum) / (b * positives)
            to_scores[i, i, k] -= 1 / (b * positives)
    to_scores /= temperature
    return loss, (np.einsum("qep,epd->qd", to_scores, passages), np.einsum("qep,qd->epd", to_scores, queries))


@cache
def compiled(compute, devices, size, temperature, tiles=None):
    """Returns a function from queries, passages and `present` to the mean loss and its gradients.

    Args:
      compute: `dense_info_nce` or `ring_info_nce`.
      devices: Number of devices; None for no mesh.
      size: Examples per pool.
      temperature: The softmax temperature.
      tiles: Queries and passages per tile.
    """

    def mean_loss(queries, passages, present):
        groups = Groups(size, AXES if devices else ())
        return groups.mean(jnp.mean(compute(ir_examples(queries, passages, present), temperature, groups)))

    if devices:
        mesh = jax.make_mesh(MESHES[devices], AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])
        mean_loss = jax.shard_map(mean_loss, mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec())
    function = jax.jit(jax.value_and_grad(mean_loss, (0, 1)))

    def call(*arguments):
        queries, passages = tiles or (ring.TILE_QUERIES, ring.TILE_PASSAGES)
        with patch.object(ring, "TILE_QUERIES", queries), patch.object(ring, "TILE_PASSAGES", passages):
            return function(*arguments)

    return call


def make_batch(rng, b, positives, negatives, density=0.7, dtype=np.float64):
    passages = vectors(rng, b, positives + negatives, DIM).astype(dtype)
    return vectors(rng, b, DIM).astype(dtype), passages, rng.random((b, negatives)) < density


def assert_same_loss(actual, expected, tolerance):
    """Compares losses, and gradients relative to their largest entry."""
    assert_allclose(actual[0], expected[0], rtol=tolerance, atol=tolerance)
    for gradient, expected_gradient in zip(actual[1], expected[1], strict=True):
        largest = max(np.abs(expected_gradient).max(), 1e-3)
        assert_allclose(gradient, expected_gradient, rtol=0, atol=tolerance * largest)


@st.composite
def shapes(draw):
    """Draws devices, examples per device, examples per pool (None: all), positives, negatives, and sizes of tiles."""
    devices = draw(st.sampled_from([None, 1, 2, 4, 8]))
    per_device = draw(st.integers(1, 6))
    b = per_device * (devices or 1)
    sizes = [None, *(size for size in range(1, b + 1) if b % size == 0)]
    tiles = draw(st.sampled_from([(1, 1), (2, 7), (4, 12), (512, 4096)]))
    return devices, per_device, draw(st.sampled_from(sizes)), draw(st.integers(1, 3)), draw(st.integers(0, 3)), tiles


@settings(max_examples=15)
@given(shape=shapes(), density=st.sampled_from([0.0, 0.7, 1.0]), seed=st.integers(0, 10**6))
def test_ring_matches_numpy(shape, density, seed):
    devices, per_device, size, positives, negatives, tiles = shape
    b = per_device * (devices or 1)
    batch = make_batch(np.random.default_rng(seed), b, positives, negatives, density)
    actual = compiled(ring_info_nce, devices, size, 0.05, tiles)(*batch)
    assert_same_loss(actual, numpy_info_nce(*batch, size or b, 0.05), 1e-11)


# Pools of all devices, of some of them, across the boundaries of devices, and within devices.
@pytest.mark.parametrize(("devices", "size"), [(1, None), (2, None), (4, 12), (8, None), (8, 12), (8, 16), (8, 3)])
def test_ring_matches_dense_form_in_float32(devices, size):
    batch = make_batch(np.random.default_rng(0), 48, 2, 3, dtype=np.float32)
    actual = compiled(ring_info_nce, devices, size, 0.1, (4, 12))(*batch)
    dense = compiled(dense_info_nce, devices, size, 0.1)(*batch)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(actual))
    assert_same_loss(actual, dense, 1e-6)
    assert_same_loss(actual, numpy_info_nce(*batch, size or 48, 0.1), 1e-6)


def test_scores_far_apart_do_not_overflow():
    queries = np.tile(np.eye(DIM, dtype=np.float32)[0], (8, 1))
    passages = np.repeat(np.where(np.arange(8) % 2, 1, -1)[:, None, None] * queries[0], 2, axis=1).astype(np.float32)
    batch = queries, passages, np.ones((8, 1), bool)
    actual = compiled(ring_info_nce, 4, None, 0.01, (1, 1))(*batch)  # scores of 100 and -100
    assert_same_loss(actual, numpy_info_nce(*batch, 8, 0.01), 1e-5)  # float32 numbers near 100 are 8e-6 apart
    assert actual[0] > 100


def test_absent_negatives_have_no_gradient():
    batch = make_batch(np.random.default_rng(1), 16, 1, 3, density=0.5)
    _, (_, gradient) = compiled(ring_info_nce, 4, 8, 0.05, (2, 7))(*batch)
    assert_array_equal(gradient[:, 1:][~batch[2]], 0)
    assert (np.abs(gradient[:, 1:][batch[2]]).max(axis=-1) > 0).all()


@pytest.mark.parametrize(("size", "hops"), [(None, 8), (12, 4), (4, 8), (3, None), (1, None)])
def test_queries_visit_only_devices_of_their_pool(size, hops):
    """Pools of 4 examples lie across the boundaries of devices with 3."""
    batch = make_batch(np.random.default_rng(2), 24, 1, 1)
    mesh = jax.make_mesh(MESHES[8], AXES, axis_types=(AxisType.Auto,) * 2)
    groups = Groups(size, AXES)

    def losses(queries, passages, present):
        return ring_info_nce(ir_examples(queries, passages, present), 0.05, groups)

    sharded = jax.shard_map(losses, mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec(AXES))
    jaxpr = str(jax.jit(sharded).trace(*batch).jaxpr)
    assert "all_gather" not in jaxpr
    assert ("ppermute" in jaxpr) == (hops is not None)
    if hops:
        assert f"length={hops}" in jaxpr


def test_objective_uses_the_ring_for_large_pools():
    queries, passages, present = ir_batch()
    objective = ObjectiveSettings(temperature=0.05)

    def compute(dense_bytes):
        with patch.object(contrastive, "DENSE_BYTES", dense_bytes):
            function = jax.jit(lambda examples: info_nce_ir(examples, objective, Groups(8))[0])
            examples = ir_examples(queries, passages, present)
            return function(examples), "custom_vjp" in str(function.trace(examples).jaxpr)

    size = B * passages.shape[0] * passages.shape[1] * 8
    dense, is_ring = compute(size)
    assert not is_ring
    loss, is_ring = compute(size - 1)
    assert is_ring
    assert_allclose(loss, dense, rtol=1e-12)
