"""Evaluates a model on held-out data by nDCG@10 and Spearman correlation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytrec_eval

from codiemb_jax.config import EvaluationSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.text.prompts import EmptyContentError, PromptTokenizer, Tokens
from codiemb_jax.text.records import Triple, dataset_names, find_files, read_records
from codiemb_jax.training.run_folder import HeldOutMetrics

QUERIES_PER_BLOCK = 256
"""Queries that are compared with all passages at a time."""


@dataclass(frozen=True)
class HeldOutIR:
    """A retrieval file: its queries, its unique passages, and the relevant passages of each query."""

    name: str
    queries: list[Tokens]
    passages: list[Tokens]
    relevant: list[set[int]]
    """Indices in `passages`, for each query."""

    def score(self, embedder: Embedder) -> tuple[str, float]:
        """Returns the mean nDCG@10. Each query ranks all passages, and relevant ones have gain 1."""
        queries, passages = (_unit_embeddings(embedder, texts) for texts in (self.queries, self.passages))
        relevant = {str(i): {str(j): 1 for j in found} for i, found in enumerate(self.relevant)}
        ranking = {}
        for start in range(0, len(queries), QUERIES_PER_BLOCK):
            for i, row in enumerate(queries[start : start + QUERIES_PER_BLOCK] @ passages.T, start):
                # All passages that may be among the first ten, whatever breaks ties.
                best = np.flatnonzero(row >= np.partition(row, -10)[-10]) if row.size > 10 else np.arange(row.size)
                ranking[str(i)] = {str(j): float(row[j]) for j in best}
        scores = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10"}).evaluate(ranking)
        return "nDCG@10", float(np.mean([score["ndcg_cut_10"] for score in scores.values()]))


@dataclass(frozen=True)
class HeldOutSTS:
    """A similarity file: pairs of texts and their scores."""

    name: str
    first: list[Tokens]
    second: list[Tokens]
    scores: list[float]

    def score(self, embedder: Embedder) -> tuple[str, float]:
        """Returns the Spearman correlation between cosine similarities and scores."""
        from scipy.stats import spearmanr  # slow to import, and not needed to train

        similarity = np.sum(_unit_embeddings(embedder, self.first) * _unit_embeddings(embedder, self.second), axis=1)
        if not np.ptp(similarity):  # the correlation of constant values is undefined
            return "Spearman", 0.0
        return "Spearman", float(spearmanr(similarity, self.scores).statistic)


def _unit_embeddings(embedder: Embedder, texts: Sequence[Tokens]) -> np.ndarray:
    """Returns L2-normalized embeddings, even if the model does not normalize."""
    embeddings = embedder.embed_tokens(texts)
    if not np.isfinite(embeddings).all():
        raise UserError("the model's embeddings of held-out texts are NaN or infinite")
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)


HeldOut = HeldOutIR | HeldOutSTS


def read_held_out(settings: EvaluationSettings, tokenizer: PromptTokenizer, max_tokens: int) -> list[HeldOut]:
    """Reads and tokenizes all held-out files.

    Raises:
      UserError: If a file is invalid.
    """
    held_out: list[HeldOut] = []
    readers: tuple[tuple[str, list[Path], Callable[..., HeldOut]], ...] = (
        ("evaluation.ir", settings.ir, _read_ir),
        ("evaluation.sts", settings.sts, _read_sts),
    )
    for setting, paths, read in readers:
        files = find_files(paths, setting)
        held_out += [read(p, name, tokenizer, max_tokens) for p, name in zip(files, dataset_names(files), strict=True)]
    return held_out


def evaluate(embedder: Embedder, held_out: Sequence[HeldOut]) -> HeldOutMetrics:
    """Returns the metric of each held-out file: nDCG@10 in [0, 1], or Spearman correlation in [-1, 1]."""
    metrics = {}
    for file in held_out:
        metric, value = file.score(embedder)
        metrics[f"{file.name} {metric}"] = value
    return metrics


def _read_ir(path: Path, name: str, tokenizer: PromptTokenizer, max_tokens: int) -> HeldOutIR:
    indices: dict[Triple, int] = {}
    queries: list[tuple[str, Triple]] = []
    passages: list[tuple[str, Triple]] = []
    relevant: list[set[int]] = []
    for record in read_records(path, "ir"):
        queries.append((f"{path}:{record.line}: query", record.query))
        found = []
        for field in ("positives", "negatives"):
            for i, passage in enumerate(getattr(record, field)):
                passage = passage._replace(task="")  # the task instruction of a passage is not used
                if passage not in indices:
                    indices[passage] = len(passages)
                    passages.append((f"{path}:{record.line}: {field}[{i}]", passage))
                found.append(indices[passage])
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
        raise UserError(f"{path}: all pairs have the same score; rank correlation needs at least two different scores")
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
    except EmptyContentError as error:
        locations = [location for location, _ in texts]
        problems = error.problems_at(locations, "data.query_max_tokens and data.passage_max_tokens")
        raise UserError(f"texts without a content token:\n{format_problems(problems)}") from error
