"""Held-out data -> nDCG@10 and Spearman correlation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytrec_eval
from scipy.stats import spearmanr

from codiemb_jax.config import EvaluationSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.text.prompts import EmptyContent, PromptTokenizer, Tokens
from codiemb_jax.text.records import Triple, data_set_names, find_files, read_records
from codiemb_jax.training.run_folder import HeldOutMetrics


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
        if not np.ptp(similarity):  # equal similarities rank nothing
            return "Spearman", 0.0
        return "Spearman", float(spearmanr(similarity, self.scores).statistic)


def _directions(embedder: Embedder, texts: Sequence[Tokens]) -> np.ndarray:
    """Vectors of length 1, whether or not the model's own are."""
    vectors = embedder.embed_tokens(texts)
    if not np.isfinite(vectors).all():
        raise UserError("the model's embeddings of held-out texts are NaN or infinite")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


HeldOut = HeldOutIR | HeldOutSTS


def read_held_out(settings: EvaluationSettings, tokenizer: PromptTokenizer, max_tokens: int) -> list[HeldOut]:
    """Reads and tokenizes every held-out file.  UserError for whatever in them cannot be used."""
    held_out: list[HeldOut] = []
    readers: tuple[tuple[str, list[Path], Callable[..., HeldOut]], ...] = (
        ("evaluation.ir", settings.ir, _read_ir),
        ("evaluation.sts", settings.sts, _read_sts),
    )
    for setting, paths, read in readers:
        files = find_files(paths, setting)
        held_out += [read(p, name, tokenizer, max_tokens) for p, name in zip(files, data_set_names(files), strict=True)]
    return held_out


def evaluate(embedder: Embedder, held_out: Sequence[HeldOut]) -> HeldOutMetrics:
    """Every held-out file's metric, between 0 and 1 (Spearman: -1 and 1)."""
    metrics = {}
    for part in held_out:
        metric, value = part.score(embedder)
        metrics[f"{part.name} {metric}"] = value
    return metrics


def _read_ir(path: Path, name: str, tokenizer: PromptTokenizer, max_tokens: int) -> HeldOutIR:
    places: dict[Triple, int] = {}
    queries: list[tuple[str, Triple]] = []
    passages: list[tuple[str, Triple]] = []
    relevant: list[set[int]] = []
    for record in read_records(path, "ir"):
        queries.append((f"{path}:{record.line}: query", record.query))
        found = []
        for field in ("positives", "negatives"):
            for i, passage in enumerate(getattr(record, field)):
                passage = passage._replace(task="")  # not read of passages
                if passage not in places:
                    places[passage] = len(passages)
                    passages.append((f"{path}:{record.line}: {field}[{i}]", passage))
                found.append(places[passage])
        relevant.append(set(found[: len(record.positives)]))
    return HeldOutIR(
        name=name,
        queries=_tokenize(tokenizer.tokenize_queries, queries, max_tokens),
        passages=_tokenize(tokenizer.tokenize_passages, passages, max_tokens),
        relevant=relevant,
    )


def _read_sts(path: Path, name: str, tokenizer: PromptTokenizer, max_tokens: int) -> HeldOutSTS:
    records = list(read_records(path, "sts"))
    scores = [record.score for record in records if record.score is not None]
    if len(set(scores)) < 2:
        raise UserError(f"{path}: all pairs have the same score; a rank correlation needs at least two")
    first = [(f"{path}:{record.line}: query", record.query) for record in records]
    second = [(f"{path}:{record.line}: positives[0]", record.positives[0]) for record in records]
    return HeldOutSTS(
        name=name,
        first=_tokenize(tokenizer.tokenize_queries, first, max_tokens),
        second=_tokenize(tokenizer.tokenize_queries, second, max_tokens),
        scores=scores,
    )


def _tokenize(
    tokenize: Callable[[Sequence[Triple], int], list[Tokens]], texts: Sequence[tuple[str, Triple]], max_tokens: int
) -> list[Tokens]:
    try:
        return tokenize([triple for _, triple in texts], max_tokens)
    except EmptyContent as empty:
        problems = empty.at([place for place, _ in texts], "data.query_max_tokens and data.passage_max_tokens")
        raise UserError(f"texts without a content token:\n{format_problems(problems)}") from empty
