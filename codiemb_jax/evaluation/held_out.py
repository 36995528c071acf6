"""Held-out data -> nDCG@10 and Spearman correlation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
from scipy.stats import spearmanr

from codiemb_jax.config import EvaluationSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import EmptyContent, PromptTokenizer, Tokens
from codiemb_jax.text.records import Triple, data_set_names, find_files, read_records

HeldOutMetrics = dict[str, float]
"""Metrics by `FILE METRIC`."""


@dataclass(frozen=True)
class HeldOutIR:
    """Queries, all different passages of a file, and which of them answer each query."""

    name: str
    queries: list[Tokens]
    passages: list[Tokens]
    relevant: list[set[int]]
    """Places in `passages`, for each query."""

    def score(self, embedder: Embedder) -> tuple[str, float]:
        """Mean nDCG@10: each query ranks all passages; a relevant one has gain 1."""
        similarity = _directions(embedder, self.queries) @ _directions(embedder, self.passages).T
        relevant = {str(i): {str(j): 1 for j in found} for i, found in enumerate(self.relevant)}
        ranking = {str(i): {str(j): float(s) for j, s in enumerate(row)} for i, row in enumerate(similarity)}
        scores = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10"}).evaluate(ranking)
        return "nDCG@10", float(np.mean([score["ndcg_cut_10"] for score in scores.values()]))


@dataclass(frozen=True)
class HeldOutSTS:
    """Pairs of texts and their scores."""

    name: str
    first: list[Tokens]
    second: list[Tokens]
    scores: list[float]

    def score(self, embedder: Embedder) -> tuple[str, float]:
        """Spearman correlation of cosine similarity and score."""
        similarity = np.sum(_directions(embedder, self.first) * _directions(embedder, self.second), axis=1)
        correlation = float(spearmanr(similarity, self.scores).statistic)
        return "Spearman", 0.0 if np.isnan(correlation) else correlation  # NaN: all similarities are equal


def _directions(embedder: Embedder, texts: Sequence[Tokens]) -> np.ndarray:
    """Vectors of length 1, whether or not the model's own are."""
    vectors = embedder.embed_tokens(texts)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


HeldOut = HeldOutIR | HeldOutSTS


def read_held_out(settings: EvaluationSettings, tokenizer: PromptTokenizer, max_tokens: int) -> list[HeldOut]:
    """Reads and tokenises every held-out file.  UserError for whatever in them cannot be used."""
    ir, sts = find_files(settings.ir, "evaluation.ir"), find_files(settings.sts, "evaluation.sts")
    return [
        *(
            _read(_read_ir, path, name, tokenizer, max_tokens)
            for path, name in zip(ir, data_set_names(ir), strict=True)
        ),
        *(
            _read(_read_sts, path, name, tokenizer, max_tokens)
            for path, name in zip(sts, data_set_names(sts), strict=True)
        ),
    ]


def evaluate(embedder: Embedder, held_out: Sequence[HeldOut]) -> HeldOutMetrics:
    """Every held-out file's metric, between 0 and 1 (Spearman: -1 and 1)."""
    metrics = {}
    for part in held_out:
        metric, value = part.score(embedder)
        metrics[f"{part.name} {metric}"] = value
    return metrics


def _read(read: Callable[..., HeldOut], path: Path, *how: Any) -> HeldOut:
    try:
        return read(path, *how)
    except EmptyContent as error:
        raise UserError(f"{path}: {error}") from error


def _read_ir(path: Path, name: str, tokenizer: PromptTokenizer, max_tokens: int) -> HeldOutIR:
    records = list(read_records(path, "ir"))
    records = [
        record._replace(
            positives=tuple(passage._replace(task="") for passage in record.positives),  # not read of passages
            negatives=tuple(passage._replace(task="") for passage in record.negatives),
        )
        for record in records
    ]
    places: dict[Triple, int] = {}
    for record in records:
        for passage in record.positives + record.negatives:
            places.setdefault(passage, len(places))
    return HeldOutIR(
        name=name,
        queries=tokenizer.tokenize_queries([record.query for record in records], max_tokens),
        passages=tokenizer.tokenize_passages(list(places), max_tokens),
        relevant=[{places[passage] for passage in record.positives} for record in records],
    )


def _read_sts(path: Path, name: str, tokenizer: PromptTokenizer, max_tokens: int) -> HeldOutSTS:
    records = list(read_records(path, "sts"))
    scores = [record.score for record in records if record.score is not None]
    if len(set(scores)) < 2:
        raise UserError(f"{path}: all pairs have the same score; a rank correlation needs at least two")
    first = tokenizer.tokenize_queries([record.query for record in records], max_tokens)
    second = tokenizer.tokenize_queries([record.positives[0] for record in records], max_tokens)
    return HeldOutSTS(name, first, second, scores)
