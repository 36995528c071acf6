"""Tests of exact nearest-neighbor search against NumPy in float64."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.evaluation import search as module
from codiemb_jax.evaluation.search import TopK, search


def expected(queries, vectors, k, excluded=()):
    """Returns scores and indices by a stable sort, padded with -inf and -1."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    for row, column in excluded:
        scores[row, column] = -np.inf
    indices = np.argsort(-scores, axis=1, kind="stable")
    scores = np.take_along_axis(scores, indices, axis=1)
    indices[np.isneginf(scores)] = -1
    padding = ((0, 0), (0, max(k - len(vectors), 0)))
    scores = np.pad(scores, padding, constant_values=-np.inf)
    return scores[:, :k], np.pad(indices, padding, constant_values=-1)[:, :k]


@pytest.mark.parametrize(("count", "k"), [(5000, 10), (300, 300), (7, 20), (1, 1)])
def test_matches_numpy(count, k, monkeypatch):
    assert jax.local_device_count() == 8
    monkeypatch.setattr(module, "QUERIES_PER_BLOCK", 16)
    random = np.random.default_rng(count)
    queries = random.standard_normal((37, 24)).astype(np.float32)
    vectors = random.standard_normal((count, 24)).astype(np.float32)
    scores, indices = search(queries, (vectors[i : i + 1000] for i in range(0, count, 1000)), k)
    expected_scores, expected_indices = expected(queries, vectors, k)
    np.testing.assert_array_equal(indices, expected_indices)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


@settings(max_examples=60)
@given(data=st.data())
def test_ties_are_broken_by_position_and_excluded_pairs_are_not_found(data):
    """Small integers, whose products are exact, so that there are many ties."""
    number = st.integers(-1, 1)
    count = data.draw(st.integers(1, 20))
    queries = np.array(data.draw(st.lists(st.tuples(number, number), min_size=5, max_size=5)), np.float32)
    vectors = np.array(data.draw(st.lists(st.tuples(number, number), min_size=count, max_size=count)), np.float32)
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, count - 1)), max_size=30))
    size, k = data.draw(st.sampled_from([4, 8, 32])), data.draw(st.sampled_from([1, 3, 10]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "QUERIES_PER_BLOCK", 2)
        top = TopK(queries, k)
        for start in range(0, count, size):
            inside = sorted((row, column - start) for row, column in pairs if start <= column < start + size)
            rows, columns = np.array(inside, np.int64).reshape(-1, 2).T
            top.add(vectors[start : start + size], (rows, columns))
        scores, indices = top.result()
    expected_scores, expected_indices = expected(queries, vectors, k, pairs)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(indices, expected_indices)
