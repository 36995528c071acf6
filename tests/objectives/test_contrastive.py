"""Tests InfoNCE against golden values of the original and NumPy loops, and tests edge cases."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from codiemb_jax.objectives.contrastive import in_batch_info_nce, info_nce

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
IR = sorted({key.rsplit("/", 1)[0] for key in GOLDEN.files if key.startswith("ir_all/")})
STS = sorted({key.rsplit("/", 1)[0] for key in GOLDEN.files if key.startswith("sts_nce/")})

compiled_info_nce = jax.jit(info_nce)
compiled_in_batch = jax.jit(jax.value_and_grad(in_batch_info_nce, (0, 1)))


def log_sum_exp(terms):
    return max(terms) + np.log(sum(np.exp(term - max(terms)) for term in terms))


def looped_info_nce(queries, positives, negatives, own_example, in_pool, present, temperature):
    losses = []
    for i, query in enumerate(queries):
        pool = [e for e in range(len(positives)) if in_pool[i, e]]
        pool_negatives = [query @ negatives[e, j] for e in pool for j in range(negatives.shape[1]) if present[e, j]]
        per_k = []
        for k in range(positives.shape[1]):
            candidates = np.array([query @ positives[e, k] for e in pool] + pool_negatives)
            positive = query @ positives[own_example[i], k]
            per_k.append(log_sum_exp(candidates / temperature) - positive / temperature)
        losses.append(np.mean(per_k))
    return np.array(losses)


def looped_in_batch(first, second, scores, temperature, threshold):
    losses = []
    for i, score in enumerate(scores):
        if score >= threshold:
            row = np.array([first[i] @ other for other in second]) / temperature
            losses.append(log_sum_exp(row) - row[i])
    return np.mean(losses) if losses else 0.0


def vectors(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_number_of_golden_cases():
    assert len(IR) == 4
    assert len(STS) == 5


@pytest.mark.parametrize("case", IR)
def test_info_nce_matches_golden_values(case):
    match = re.fullmatch(r"ir_all/P(\d+)N(\d+)B(\d+)D(\d+)T([\d.]+)", case)
    assert match
    positives, negatives, b, dim = (int(group) for group in match.groups()[:4])

    def loss(queries, passages):
        by_example = passages.reshape(b, positives + negatives, dim)
        masks = jnp.ones((b, b), bool), jnp.ones((b, negatives), bool)
        split = by_example[:, :positives], by_example[:, positives:]
        return info_nce(queries, *split, jnp.arange(b), *masks, float(match[5])).mean()

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(GOLDEN[case + "/in0"], GOLDEN[case + "/in1"])
    assert_allclose(value, GOLDEN[case + "/loss"], rtol=1e-9, atol=1e-9)
    assert_allclose(grads[0], GOLDEN[case + "/grad0"], rtol=1e-9, atol=1e-9)
    assert_allclose(grads[1], GOLDEN[case + "/grad1"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", STS)
def test_in_batch_info_nce_matches_golden_values(case):
    value, grads = compiled_in_batch(GOLDEN[case + "/in0"], GOLDEN[case + "/in1"], GOLDEN[case + "/y"], 0.02, 1.0)
    assert_allclose(value, GOLDEN[case + "/loss"], rtol=1e-9, atol=1e-9)
    assert_allclose(grads[0], GOLDEN[case + "/grad0"], rtol=1e-9, atol=1e-9)
    assert_allclose(grads[1], GOLDEN[case + "/grad1"], rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(3, 5, 2, 3), (4, 4, 1, 0), (2, 6, 3, 1)]),
    temperature=st.sampled_from([0.01, 0.05, 1.0]),
    density=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_info_nce_matches_loops(shape, temperature, density, seed):
    rng = np.random.default_rng(seed)
    b, examples, positives, negatives = shape
    own_example = rng.integers(0, examples, b)
    arguments = (
        vectors(rng, b, 4),
        vectors(rng, examples, positives, 4),
        vectors(rng, examples, negatives, 4),
        own_example,
        (rng.random((b, examples)) < density) | (np.arange(examples) == own_example[:, None]),
        rng.random((examples, negatives)) < density,
        temperature,
    )
    assert_allclose(compiled_info_nce(*arguments), looped_info_nce(*arguments), rtol=1e-11, atol=1e-11)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    scores=st.sampled_from([1, 2, 7]).flatmap(
        lambda n: st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=n, max_size=n)
    ),
    temperature=st.sampled_from([0.02, 0.5]),
    seed=st.integers(0, 10**6),
)
def test_in_batch_info_nce_matches_loops(scores, temperature, seed):
    rng = np.random.default_rng(seed)
    first, second = vectors(rng, 2, len(scores), 4)
    arguments = first, second, np.array(scores), temperature, 1.0
    assert_allclose(compiled_in_batch(*arguments)[0], looped_in_batch(*arguments), rtol=1e-11, atol=1e-11)


def test_absent_negatives_are_not_candidates():
    rng = np.random.default_rng(0)
    queries, positives, negatives = vectors(rng, 4, 8), vectors(rng, 4, 2, 8), vectors(rng, 4, 3, 8)
    own_example, in_pool = np.arange(4), np.ones((4, 4), bool)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def loss(queries, positives, negatives, present):
        return info_nce(queries, positives, negatives, own_example, in_pool, present, 0.05).sum()

    # Masking negative 1 of every example must be the same as removing it.
    kept = np.array([0, 2])
    masked = loss(queries, positives, negatives, np.tile([True, False, True], (4, 1)))
    removed = loss(queries, positives, negatives[:, kept], np.ones((4, 2), bool))
    assert_allclose(masked[0], removed[0], rtol=1e-13)
    assert_allclose(masked[1][0], removed[1][0], rtol=1e-12, atol=1e-13)
    assert_allclose(masked[1][1], removed[1][1], rtol=1e-12, atol=1e-13)
    assert_allclose(masked[1][2][:, kept], removed[1][2], rtol=1e-12, atol=1e-13)
    assert_array_equal(masked[1][2][:, 1], 0)
    assert masked[0] < loss(queries, positives, negatives, np.ones((4, 3), bool))[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_negatives", [0, 3])
def test_pool_without_negatives(num_negatives, dtype):
    rng = np.random.default_rng(1)
    queries, positives = vectors(rng, 3, 8).astype(dtype), vectors(rng, 3, 2, 8).astype(dtype)
    negatives = vectors(rng, 3, num_negatives, 8).astype(dtype)
    arguments = np.arange(3), np.ones((3, 3), bool), np.zeros((3, num_negatives), bool), 0.02
    loss = jax.jit(jax.value_and_grad(lambda *x: info_nce(*x, *arguments).sum(), (0, 1, 2)))
    value, grads = loss(queries, positives, negatives)
    assert value.dtype == dtype
    expected = looped_info_nce(queries, positives, negatives, *arguments).sum()
    assert_allclose(value, expected, rtol=1e-12 if dtype == np.float64 else 1e-5)
    assert all(np.isfinite(grad).all() for grad in grads)
    assert np.abs(grads[0]).max() > 0.1
    assert_array_equal(grads[2], 0)


def test_no_intermediate_nan_without_negatives():
    x = vectors(np.random.default_rng(1), 2, 1, 4)
    arguments = np.arange(2), np.ones((2, 2), bool), np.zeros((2, 1), bool), 0.02
    with jax.debug_nans(True):  # checks every operation, because nothing is jitted
        grad = jax.grad(lambda negatives: info_nce(x[:, 0], x, negatives, *arguments).sum())(x)
    assert_array_equal(grad, 0)


def test_pool_with_one_query_has_zero_loss():
    rng = np.random.default_rng(2)
    queries, positives = vectors(rng, 2, 4), vectors(rng, 2, 1, 4)
    arguments = np.zeros((2, 0, 4)), np.arange(2), np.eye(2, dtype=bool), np.zeros((2, 0), bool), 0.02
    loss = jax.jit(jax.value_and_grad(lambda *x: info_nce(*x, *arguments).sum(), (0, 1)))
    value, grads = loss(queries, positives)
    assert_allclose(value, 0, atol=1e-13)
    assert_allclose(grads[0], 0, atol=1e-12)
    assert_allclose(grads[1], 0, atol=1e-12)


def test_in_batch_info_nce_without_positive_pairs_is_zero():
    first, second = vectors(np.random.default_rng(3), 2, 5, 4)
    value, grads = compiled_in_batch(first, second, np.full(5, 0.9), 0.02, 1.0)
    assert value == 0
    assert_array_equal(grads[0], 0)
    assert_array_equal(grads[1], 0)


def test_in_batch_info_nce_threshold_is_inclusive():
    first, second = vectors(np.random.default_rng(4), 2, 4, 4)
    scores = np.array([0.5, 0.4999, 0.2, 0.9])
    row = first @ second.T / 0.1
    expected = np.mean([log_sum_exp(row[i]) - row[i, i] for i in (0, 3)])
    assert_allclose(compiled_in_batch(first, second, scores, 0.1, 0.5)[0], expected, rtol=1e-12)


def test_float32_inputs_give_float32_outputs():
    first, second = vectors(np.random.default_rng(5), 2, 4, 4).astype(np.float32)
    value, grads = compiled_in_batch(first, second, np.ones(4, np.float32), 0.02, 1.0)
    assert value.dtype == grads[0].dtype == grads[1].dtype == np.float32
    exact, _ = compiled_in_batch(first.astype(float), second.astype(float), np.ones(4), 0.02, 1.0)
    assert_allclose(value, exact, rtol=1e-5)
