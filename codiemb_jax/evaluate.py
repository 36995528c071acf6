"""Held-out data -> nDCG@10 and Spearman correlation."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
from scipy.stats import spearmanr

from codiemb_jax.config import EvaluationSettings
from codiemb_jax.data.prompts import EmptyContent, PromptEncoder, Tokens
from codiemb_jax.data.records import Triple, find_files, read_records
from codiemb_jax.encode import Embedder
from codiemb_jax.errors import UserError

Figures = dict[str, float]
"""A figure by `FILE METRIC`."""


@dataclass(frozen=True)
class HeldOutIR:
    """Queries, all different passages of a file, and which of them answer each query."""

    name: str
    queries: list[Tokens]
    passages: list[Tokens]
    relevant: list[set[int]]
    """Places in `passages`, for each query."""

    def figure(self, embedder: Embedder) -> tuple[str, float]:
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

    def figure(self, embedder: Embedder) -> tuple[str, float]:
        """Spearman correlation of cosine similarity and score."""
        similarity = np.sum(_directions(embedder, self.first) * _directions(embedder, self.second), axis=1)
        return "Spearman", float(spearmanr(similarity, self.scores).statistic)


def _directions(embedder: Embedder, texts: Sequence[Tokens]) -> np.ndarray:
    """Vectors of length 1, whether or not the model's own are."""
    vectors = embedder.encode(texts)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


HeldOut = HeldOutIR | HeldOutSTS


def read_held_out(settings: EvaluationSettings, encoder: PromptEncoder, max_tokens: int) -> list[HeldOut]:
    """Reads and tokenises every held-out file.  UserError for whatever in them cannot be used."""
    for name, paths in (("ir", settings.ir), ("sts", settings.sts)):
        stems = Counter(path.stem for path in find_files(paths, f"evaluation.{name}"))
        if twice := [stem for stem, count in stems.items() if count > 1]:
            raise UserError(f"evaluation.{name}: two files are called {twice[0]}; figures go by that name, rename one")
    return [
        *(_read(path, _read_ir, encoder, max_tokens) for path in find_files(settings.ir, "evaluation.ir")),
        *(_read(path, _read_sts, encoder, max_tokens) for path in find_files(settings.sts, "evaluation.sts")),
    ]


def evaluate(embedder: Embedder, held_out: Sequence[HeldOut]) -> Figures:
    """Every held-out file's figure, between 0 and 1 (Spearman: -1 and 1)."""
    figures = {}
    for part in held_out:
        metric, figure = part.figure(embedder)
        figures[f"{part.name} {metric}"] = figure
    return figures


def _read(path: Path, read: Callable[[Path, PromptEncoder, int], HeldOut], *how: Any) -> HeldOut:
    try:
        return read(path, *how)
    except EmptyContent as error:
        raise UserError(f"{path}: {error}") from error


def _read_ir(path: Path, encoder: PromptEncoder, max_tokens: int) -> HeldOutIR:
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
        name=path.stem,
        queries=encoder.encode_queries([record.query for record in records], max_tokens),
        passages=encoder.encode_passages(list(places), max_tokens),
        relevant=[{places[passage] for passage in record.positives} for record in records],
    )


def _read_sts(path: Path, encoder: PromptEncoder, max_tokens: int) -> HeldOutSTS:
    records = list(read_records(path, "sts"))
    scores = [record.score for record in records if record.score is not None]
    if len(set(scores)) < 2:
        raise UserError(f"{path}: all pairs have the same score; a rank correlation needs at least two")
    first = encoder.encode_queries([record.query for record in records], max_tokens)
    second = encoder.encode_queries([record.positives[0] for record in records], max_tokens)
    return HeldOutSTS(path.stem, first, second, scores)
