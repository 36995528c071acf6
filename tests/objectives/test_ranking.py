"""Tests Pearson, rank KL and PRO against golden values of the original, SciPy and NumPy loops, and tests edge cases."""

from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from codiemb_jax.objectives.ranking import pearson, pro, rank_kl

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
FAMILIES = {
    "pearson": pearson,
    "rank_kl": lambda similarity, scores: rank_kl(similarity, scores, 0.05),
    "pro": lambda similarity, scores: pro(similarity, scores, 0.05),
}
value_and_grad = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in FAMILIES.items()}
# The original computes the target of rank KL in float32.
TOLERANCE = {"pearson": 1e-9, "rank_kl": 1e-6, "pro": 1e-9}
CASES = sorted({key.rsplit("/", 1)[0] for key in GOLDEN.files if key.split("/")[0] in FAMILIES})

compiled_rank_kl, compiled_pro = jax.jit(rank_kl), jax.jit(pro)


def looped_rank_kl(similarity, scores, temperature):
    n = len(scores)
    descending = scipy.stats.rankdata(-scores) - 1
    target = np.array([(n - 1 - rank) / (n - 1) / temperature for rank in descending])
    target = np.exp(target - target.max())
    predicted = np.exp((similarity - similarity.max()) / temperature)
    target, predicted = target / target.sum(), predicted / predicted.sum()
    return sum(t * (np.log(t) - np.log(p)) for t, p in zip(target, predicted, strict=True)) / n


def looped_pro(similarity, scores, temperature):
    s, n = similarity / temperature, len(scores)
    losses = []
    for k in range(n):
        gaps = {j: scores[k] - scores[j] for j in range(n) if scores[k] - scores[j] > 1e-8}
        if gaps:
            own = np.exp(max(gaps.values()) * s[k])
            losses.append(-np.log(own / (own + sum(np.exp(gap * s[j]) for j, gap in gaps.items()))))
    return np.mean(losses) if losses else 0.0


def lists(*sizes):
    """Draws similarities in [-1, 1] and scores with ties, for lists of these sizes."""
    similarity = st.integers(-1000, 1000).map(lambda i: i / 1000)
    score = st.integers(0, 5).map(lambda i: i / 2)
    return st.sampled_from(sizes).flatmap(
        lambda n: st.tuples(
            st.lists(similarity, min_size=n, max_size=n).map(np.array),
            st.lists(score, min_size=n, max_size=n).map(np.array),
        )
    )


def test_number_of_golden_cases():
    assert len(CASES) == 15
    assert [sum(case.startswith(family + "/") for case in CASES) for family in FAMILIES] == [5, 5, 5]


@pytest.mark.parametrize("case", CASES)
def test_losses_match_golden_values(case):
    family = case.split("/")[0]
    value, grad = value_and_grad[family](GOLDEN[case + "/in0"], GOLDEN[case + "/y"])
    assert_allclose(value, GOLDEN[case + "/loss"], rtol=TOLERANCE[family], atol=TOLERANCE[family])
    assert_allclose(grad, GOLDEN[case + "/grad0"], rtol=TOLERANCE[family], atol=TOLERANCE[family])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lists(2, 5, 9))
def test_pearson_matches_scipy(pairs):
    similarity, scores = pairs
    value = value_and_grad["pearson"](similarity, scores)[0]
    if np.ptp(scores) == 0:
        assert value == 0
    elif np.ptp(similarity) == 0:
        assert value == 1
    else:
        assert_allclose(value, 1 - scipy.stats.pearsonr(similarity, scores).statistic, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lists(2, 5, 9), st.sampled_from([0.05, 1.0]))
def test_rank_kl_matches_loops(pairs, temperature):
    assert_allclose(compiled_rank_kl(*pairs, temperature), looped_rank_kl(*pairs, temperature), rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lists(1, 2, 5, 9), st.sampled_from([0.05, 1.0]))
def test_pro_matches_loops(pairs, temperature):
    assert_allclose(compiled_pro(*pairs, temperature), looped_pro(*pairs, temperature), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("score", [0.1, 5.0])
@pytest.mark.parametrize("n", [7, 32])
def test_equal_scores(n, score, dtype):
    similarity = np.random.default_rng(n).uniform(-1, 1, n).astype(dtype)
    scores = np.full(n, score, dtype)
    for family in ("pearson", "pro"):
        value, grad = value_and_grad[family](similarity, scores)
        assert value == 0
        assert value.dtype == grad.dtype == dtype
        assert_array_equal(grad, 0)
    value, grad = value_and_grad["rank_kl"](similarity, scores)
    softmax = np.exp(similarity / 0.05 - np.max(similarity / 0.05))
    softmax /= softmax.sum()
    rtol = 1e-10 if dtype == np.float64 else 1e-4
    assert value.dtype == grad.dtype == dtype
    assert_allclose(value, -np.mean(np.log(n * softmax)) / n, rtol=rtol)
    assert_allclose(grad, (softmax - 1 / n) / 0.05 / n, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("similarity", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("n", [7, 32])
def test_equal_similarities(n, similarity, dtype):
    scores = np.arange(n).astype(dtype)
    value, grad = value_and_grad["pearson"](np.full(n, similarity, dtype), scores)
    assert value == 1
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() <= 2
    for family in ("rank_kl", "pro"):
        value, grad = value_and_grad[family](np.full(n, similarity, dtype), scores)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_list_of_one_pair_has_zero_loss(family):
    value, grad = value_and_grad[family](np.array([0.3]), np.array([4.0]))
    assert value == 0
    assert_array_equal(grad, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_accurate_for_extreme_values(family):
    similarity = np.array([1, -1, 1, -1, 0, 1], np.float32)
    for scores in (np.array([0, 100, 0, 100, 50, 0], np.float32), np.array([1, 0, 1, 0, 0.5, 1], np.float32)):
        value, grad = value_and_grad[family](similarity, scores)
        assert value.dtype == grad.dtype == np.float32
        expected, _ = value_and_grad[family](similarity.astype(np.float64), scores.astype(np.float64))
        assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        assert np.isfinite(grad).all()


def test_pro_ignores_score_gaps_below_the_tolerance():
    similarity, scores = np.array([0.2, 0.9, -0.4]), np.array([1.0, 1.0 + 5e-9, 1.0])
    assert value_and_grad["pro"](similarity, scores)[0] == 0
    # With a gap of 0.1, only the second pair is ranked above others.
    logits = 0.1 * np.array([0.9, 0.2, -0.4]) / 0.05
    expected = np.log(np.sum(np.exp(logits))) - logits[0]
    assert_allclose(value_and_grad["pro"](similarity, scores + [0, 0.1 - 5e-9, 0])[0], expected, rtol=1e-9)
