"""Tests both forms of InfoNCE over pools against NumPy in float64, and the ring against the dense form in float32."""

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

from codiemb_jax.batch import PassageTexts
from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives import contrastive, ring
from codiemb_jax.objectives.contrastive import dense_info_nce, info_nce_ir
from codiemb_jax.objectives.groups import Groups
from codiemb_jax.objectives.ring import ring_info_nce
from tests.objectives.layouts import AXES, B, ir_batch, ir_examples, vectors

DIM = 8
MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}
"""Sizes of the data and fsdp axes, by number of devices."""


def numpy_info_nce(queries, passages, present, texts, size, temperature):
    """Returns the mean loss, its gradients with respect to queries and passages, and the number of masked pairs."""
    queries, passages = queries.astype(np.float64), passages.astype(np.float64)
    b, count, _ = passages.shape
    positives = count - present.shape[1]
    scores = np.einsum("qd,epd->qep", queries, passages) / temperature
    loss, masked, to_scores = 0.0, 0, np.zeros_like(scores)
    for i in range(b):
        in_pool = np.repeat((np.arange(b) // size == i // size)[:, None], count, axis=1)
        in_pool[:, positives:] &= present
        if texts is not None:
            is_same = np.isin(texts.passages, [text for text in texts.positives[i] if text >= 0])
            is_same[i, :positives] = False
            masked += (in_pool & is_same).sum()
            in_pool &= ~is_same
        for k in range(positives):
            is_candidate = in_pool.copy()
            is_candidate[:, [j for j in range(positives) if j != k]] = False
            candidates = scores[i][is_candidate]
            log_sum = candidates.max() + np.log(np.exp(candidates - candidates.max()).sum())
            loss += (log_sum - scores[i, i, k]) / (b * positives)
            to_scores[i][is_candidate] += np.exp(candidates - log_sum) / (b * positives)
            to_scores[i, i, k] -= 1 / (b * positives)
    to_scores /= temperature
    to_queries, to_passages = (
        np.einsum("qep,epd->qd", to_scores, passages),
        np.einsum("qep,qd->epd", to_scores, queries),
    )
    return (loss, masked), (to_queries, to_passages)


@cache
def compiled(compute, devices, size, temperature, tiles=None):
    """Returns a function from queries, passages, `present` and texts to (mean loss, masked pairs) and gradients.

    Args:
      compute: `dense_info_nce` or `ring_info_nce`.
      devices: Number of devices; None for no mesh.
      size: Examples per pool.
      temperature: The softmax temperature.
      tiles: Queries and passages per tile.
    """

    def mean_loss(queries, passages, present, texts):
        groups = Groups(size, AXES if devices else ())
        examples = ir_examples(queries, passages, present)._replace(texts=texts)
        losses, masked = compute(examples, temperature, groups)
        return groups.mean(jnp.mean(losses)), 0 if texts is None else groups.sum(jnp.sum(masked))

    if devices:
        mesh = jax.make_mesh(MESHES[devices], AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:devices])
        mean_loss = jax.shard_map(mean_loss, mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec())
    function = jax.jit(jax.value_and_grad(mean_loss, (0, 1), has_aux=True))

    def call(*arguments):
        queries, passages = tiles or (ring.TILE_QUERIES, ring.TILE_PASSAGES)
        with patch.object(ring, "TILE_QUERIES", queries), patch.object(ring, "TILE_PASSAGES", passages):
            return function(*arguments)

    return call


def make_batch(rng, b, positives, negatives, density=0.7, num_texts=None, dtype=np.float64):
    """Returns queries, passages, `present` and texts, or None for texts without `num_texts`, the number of texts."""
    passages = vectors(rng, b, positives + negatives, DIM).astype(dtype)
    queries, present = vectors(rng, b, DIM).astype(dtype), rng.random((b, negatives)) < density
    if not num_texts:
        return queries, passages, present, None
    texts = rng.integers(0, num_texts, (b, positives + negatives)).astype(np.int32)
    drawn, others = texts[:, :positives], rng.integers(0, num_texts, (b, 2))
    others[rng.random((b, 2)) < 0.5] = -2
    texts[:, positives:][~present] = -1
    return queries, passages, present, PassageTexts(texts, np.concatenate([drawn, others], axis=1).astype(np.int32))


def assert_same_loss(actual, expected, tolerance):
    """Compares losses, numbers of masked pairs, and gradients relative to their largest entry."""
    (loss, masked), gradients = actual
    (expected_loss, expected_masked), expected_gradients = expected
    assert masked == expected_masked
    assert_allclose(loss, expected_loss, rtol=tolerance, atol=tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
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


FORMS = pytest.mark.parametrize("compute", [ring_info_nce, dense_info_nce])


def assert_matches_numpy(compute, shape, has_texts, seed):
    devices, per_device, size, positives, negatives, tiles = shape
    b = per_device * (devices or 1)
    function = compiled(compute, devices, size, 0.05, tiles)
    rng = np.random.default_rng(seed)
    for density, num_texts in ((0.0, 1), (0.7, 5), (1.0, 100)):
        batch = make_batch(rng, b, positives, negatives, density, num_texts if has_texts else None)
        assert_same_loss(function(*batch), numpy_info_nce(*batch, size or b, 0.05), 1e-11)


@settings(max_examples=8)
@given(shape=shapes(), has_texts=st.sampled_from([True, True, False]), seed=st.integers(0, 10**6))
def test_ring_matches_numpy(shape, has_texts, seed):
    assert_matches_numpy(ring_info_nce, shape, has_texts, seed)


@settings(max_examples=5)
@given(shape=shapes(), has_texts=st.sampled_from([True, True, False]), seed=st.integers(0, 10**6))
def test_dense_form_matches_numpy(shape, has_texts, seed):
    assert_matches_numpy(dense_info_nce, shape, has_texts, seed)


# Pools of all devices, of some of them, across the boundaries of devices, and within devices.
@pytest.mark.parametrize(("devices", "size"), [(1, None), (2, None), (4, 24), (8, None), (8, 16), (8, 3)])
def test_ring_matches_dense_form_in_float32(devices, size):
    batch = make_batch(np.random.default_rng(0), 48, 2, 3, num_texts=100, dtype=np.float32)
    actual = compiled(ring_info_nce, devices, size, 0.1, (4, 12))(*batch)
    dense = compiled(dense_info_nce, devices, size, 0.1)(*batch)
    assert actual[0][0].dtype == actual[1][0].dtype == actual[1][1].dtype == np.float32
    assert actual[0][1] > 0
    assert_same_loss(actual, dense, 1e-6)
    assert_same_loss(actual, numpy_info_nce(*batch, size or 48, 0.1), 1e-6)


def test_scores_far_apart_do_not_overflow():
    queries = np.tile(np.eye(DIM, dtype=np.float32)[0], (8, 1))
    passages = np.where(np.arange(8) % 2, 1, -1)[:, None, None].astype(np.float32) * queries[0].reshape(1, 1, -1)
    batch = queries, np.repeat(passages, 2, axis=1), np.ones((8, 1), bool), None
    actual = compiled(ring_info_nce, 4, None, 0.01, (1, 1))(*batch)  # scores of 100 and -100
    assert_same_loss(actual, numpy_info_nce(*batch, 8, 0.01), 1e-5)  # float32 numbers near 100 are 8e-6 apart
    assert actual[0][0] > 100


@FORMS
def test_absent_and_masked_passages_have_no_gradient(compute):
    """All passages of example 3 have the text of a positive of each query."""
    queries, passages, present, _ = make_batch(np.random.default_rng(1), 16, 1, 3, density=0.5)
    texts = np.arange(64, dtype=np.int32).reshape(16, 4)
    texts[3] = 1000
    texts[:, 1:][~present] = -1
    positives = np.stack([texts[:, 0], np.full(16, 1000)], axis=1).astype(np.int32)
    batch = queries, passages, present, PassageTexts(texts, positives)
    (_, masked), (_, gradient) = compiled(compute, 4, 8, 0.05, (2, 7))(*batch)
    assert masked == 8 * present[3].sum() + 7  # the positive is not masked for its own query
    assert_array_equal(gradient[:, 1:][~present], 0)
    assert_array_equal(gradient[3, 1:], 0)
    others = np.arange(16) != 3
    assert (np.abs(gradient[:, 1:][others][present[others]]).max(axis=-1) > 0).all()
    assert np.abs(gradient[3, 0]).max() > 0


@pytest.mark.parametrize(("size", "hops"), [(None, 8), (12, 4), (4, 8), (3, None), (1, None)])
def test_queries_visit_only_devices_of_their_pool(size, hops):
    """Pools of 4 examples lie across the boundaries of devices with 3."""
    batch = make_batch(np.random.default_rng(2), 24, 1, 1)
    mesh = jax.make_mesh(MESHES[8], AXES, axis_types=(AxisType.Auto,) * 2)
    groups = Groups(size, AXES)

    def losses(queries, passages, present):
        return ring_info_nce(ir_examples(queries, passages, present), 0.05, groups)[0]

    sharded = jax.shard_map(losses, mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec(AXES))
    jaxpr = str(jax.jit(sharded).trace(*batch[:3]).jaxpr)
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
