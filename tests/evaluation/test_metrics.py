"""Tests of metrics against their formulas."""

import math
from collections.abc import Mapping, Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from codiemb_jax.evaluation import metrics
from codiemb_jax.evaluation.metrics import MEASURES, retrieval_metrics, similarity_metrics


def reference(ranking: Sequence[str], gains: Mapping[str, int]) -> dict[str, float]:
    """Computes the metrics of one query by their definitions.

    Args:
      ranking: All documents, the nearest first.
      gains: The gain of each judged document.
    """
    relevant = {name for name, gain in gains.items() if gain > 0}

    def dcg(values: Sequence[float]) -> float:
        return sum(max(value, 0) / math.log2(rank + 1) for rank, value in enumerate(values[:10], 1))

    hits = [name in relevant for name in ranking[:1000]]
    precisions = [sum(hits[:rank]) / rank for rank, hit in enumerate(hits, 1) if hit]
    ideal = dcg(sorted(gains.values(), reverse=True))
    return {
        "nDCG@10": dcg([gains.get(name, 0) for name in ranking]) / ideal if ideal else 0.0,
        "MRR@10": next((1 / rank for rank, hit in enumerate(hits[:10], 1) if hit), 0.0),
        "Recall@10": sum(hits[:10]) / len(relevant) if relevant else 0.0,
        "Recall@100": sum(hits[:100]) / len(relevant) if relevant else 0.0,
        "MAP": sum(precisions) / len(relevant) if relevant else 0.0,
    }


def mean_reference(scores: Sequence[Mapping[str, float]], relevant: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Computes the mean metrics. Of equal scores, the last name in the alphabet comes first.

    Args:
      scores: Scores of all documents for each query.
      relevant: Gains of the judged documents of each query.
    """
    rankings = [sorted(of_query, key=lambda name: (of_query[name], name), reverse=True) for of_query in scores]
    values = [reference(ranking, gains) for ranking, gains in zip(rankings, relevant, strict=True)]
    return {metric: float(np.mean([value[metric] for value in values])) for metric in MEASURES}


@given(seed=st.integers(0, 2**32 - 1), documents=st.sampled_from([1, 2, 9, 10, 11, 12, 40, 130]))
def test_retrieval_metrics_match_formulas(seed, documents):
    rng = np.random.default_rng(seed)
    names = [f"{number:x}é" for number in rng.permutation(documents)]
    levels = int(rng.integers(1, 2 * documents + 1))  # few levels: many ties
    scores = rng.integers(0, levels, (3, documents)) / np.float32(levels)
    judged = [rng.choice(names, int(rng.integers(1, documents + 1)), replace=False) for _ in scores]
    relevant = [{str(name): int(rng.integers(-1, 4)) for name in found} for found in judged]
    order = np.argsort(-scores, axis=1)
    found = retrieval_metrics(relevant, np.take_along_axis(scores, order, axis=1), order, names)
    by_name = [dict(zip(names, map(float, row), strict=True)) for row in scores]
    assert found == pytest.approx(mean_reference(by_name, relevant), abs=1e-12)


def test_queries_in_several_calls_of_trec_eval(monkeypatch):
    rng = np.random.default_rng(5)
    scores = -np.sort(-rng.random((11, 6)), axis=1)
    order = np.stack([rng.permutation(6) for _ in scores])
    relevant = [{str(i): int(rng.integers(3)) for i in range(6)} for _ in scores]
    expected = retrieval_metrics(relevant, scores, order, list("012345"))
    monkeypatch.setattr(metrics, "QUERIES_PER_BLOCK", 4)
    assert retrieval_metrics(relevant, scores, order, list("012345")) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1.0), (10, 0.1), (11, 0.0)])
def test_reciprocal_rank_ends_at_ten(rank, expected):
    order = np.arange(20)[None]
    scores = np.linspace(1, 0, 20)[None]
    found = retrieval_metrics([{f"{rank - 1:02}": 1}], scores, order, [f"{i:02}" for i in range(20)])
    assert found["MRR@10"] == expected
    assert found["MAP"] == pytest.approx(1 / rank, abs=1e-12)


@pytest.mark.parametrize("gain", [-2, -1000])
def test_negative_gains_count_as_not_relevant(gain):
    """Spam has gain -2 in some collections of TREC, and trec_eval crashes on such gains among others."""
    rng = np.random.default_rng(8)
    order = np.stack([rng.permutation(6) for _ in range(600)])
    scores = np.tile(np.linspace(1, 0, 6), (600, 1))
    relevant = [{str(i): int(rng.choice([gain, -1, 0, 1, 2])) for i in range(query % 6 + 1)} for query in range(600)]
    relevant[0] = {"0": gain}
    clipped = [{name: max(value, 0) for name, value in gains.items()} for gains in relevant]
    by_name = [
        dict(zip(map(str, row), map(float, values), strict=True)) for row, values in zip(order, scores, strict=True)
    ]
    found = retrieval_metrics(relevant, scores, order, list("012345"))
    assert found == pytest.approx(mean_reference(by_name, clipped), abs=1e-12)


def test_negative_indices_are_left_out():
    found = retrieval_metrics([{"a": 1, "b": 1}], np.array([[0.5, -np.inf]]), np.array([[0, -1]]), ["a", "b"])
    assert found["Recall@100"] == 0.5


@given(seed=st.integers(0, 2**32 - 1))
def test_correlations_match_numpy(seed):
    rng = np.random.default_rng(seed)
    similarity, scores = rng.random(30).astype(np.float32), rng.integers(0, 6, 30) / 5
    similarity[::7] = similarity[0]

    def ranks(values: np.ndarray) -> np.ndarray:  # ties get their mean rank
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    found = similarity_metrics(similarity, scores.tolist())
    assert found["Spearman"] == pytest.approx(np.corrcoef(ranks(similarity), ranks(scores))[0, 1], abs=1e-9)
    assert found["Pearson"] == pytest.approx(np.corrcoef(similarity.astype(np.float64), scores)[0, 1], abs=1e-9)


def test_constant_similarity_has_no_correlation():
    assert similarity_metrics(np.full(3, 0.5, np.float32), [0.0, 0.5, 1.0]) == {"Spearman": 0.0, "Pearson": 0.0}
