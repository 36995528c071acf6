"""Held-out data -> nDCG@10 and Spearman correlation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytrec_eval
from scipy.stats import spearmanr

from codiemb_jax.config import EvaluationSettings
from codiemb_jax.data.records import Triple, find_files, read_records
from codiemb_jax.encode import Embedder

HeldOut = dict[str, float]
"""Figure by `FILE METRIC`."""


def evaluate(embedder: Embedder, settings: EvaluationSettings) -> HeldOut:
    """Every held-out file's figure, between 0 and 1 (Spearman: -1 and 1)."""
    figures = {}
    for path in find_files(settings.ir, "evaluation.ir"):
        figures[f"{path.stem} nDCG@10"] = ndcg_at_10(embedder, path)
    for path in find_files(settings.sts, "evaluation.sts"):
        figures[f"{path.stem} Spearman"] = spearman(embedder, path)
    return figures


def ndcg_at_10(embedder: Embedder, path: Path) -> float:
    """Mean nDCG@10: each query ranks all different passages of the file; its positives are relevant (gain 1)."""
    records = list(read_records(path, "ir"))
    passages: dict[Triple, str] = {}
    for record in records:
        for passage in record.positives + record.negatives:
            passages.setdefault(passage, f"d{len(passages)}")
    similarity = embedder.encode_queries(r.query for r in records) @ embedder.encode_passages(passages).T
    relevant = {f"q{i}": {passages[p]: 1 for p in record.positives} for i, record in enumerate(records)}
    ranking = {f"q{i}": dict(zip(passages.values(), map(float, row), strict=True)) for i, row in enumerate(similarity)}
    scores = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10"}).evaluate(ranking)
    return float(np.mean([score["ndcg_cut_10"] for score in scores.values()]))


def spearman(embedder: Embedder, path: Path) -> float:
    """Spearman correlation of cosine similarity and score over the pairs of a file."""
    records = list(read_records(path, "sts"))
    first = embedder.encode_queries(record.query for record in records)
    second = embedder.encode_queries(record.positives[0] for record in records)
    scores: Sequence[float] = [record.score for record in records if record.score is not None]
    return float(spearmanr(np.sum(first * second, axis=1), scores).statistic)
