"""Metrics of rankings, computed by trec_eval, and of similarities."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytrec_eval

CUT = 1000
"""Number of nearest documents of a query that are ranked, as in BEIR and MTEB."""
CORRELATIONS = ("Spearman", "Pearson")
QUERIES_PER_BLOCK = 256
"""Rankings that are given to trec_eval at a time."""
MEASURES = {
    "nDCG@10": "ndcg_cut_10",
    "MRR@10": "recip_rank",
    "Recall@10": "recall_10",
    "Recall@100": "recall_100",
    "MAP": "map_cut_1000",
}
"""trec_eval's name of each metric. Its reciprocal rank has no cut."""
REQUESTED = {"ndcg_cut.10", "recip_rank", "recall.10,100", f"map_cut.{CUT}"}


def retrieval_metrics(
    relevant: Sequence[Mapping[str, int]], scores: np.ndarray, indices: np.ndarray, names: Sequence[str]
) -> dict[str, float]:
    """Returns the mean of each metric in `MEASURES` over queries.

    Of documents with equal scores, the one whose name comes last in the alphabet is ranked first, as in trec_eval.

    Args:
      relevant: For each query, the gain of each judged document by name. Those with a gain above 0 are relevant; only
        nDCG depends on how large it is.
      scores: Scores of the nearest documents of each query, [queries, k].
      indices: Indices of these documents in `names`, int [queries, k]; negative ones are left out.
      names: Unique names of the documents.
    """
    values: dict[str, list[float]] = {metric: [] for metric in MEASURES}
    for start in range(0, len(relevant), QUERIES_PER_BLOCK):
        block = range(start, min(start + QUERIES_PER_BLOCK, len(relevant)))
        # trec_eval crashes if some gains are below -1 and others are not negative.
        judged = {str(i): {name: max(gain, 0) for name, gain in relevant[i].items()} for i in block}
        ranking = {
            str(i): {
                names[j]: score for j, score in zip(indices[i].tolist(), scores[i].tolist(), strict=True) if j >= 0
            }
            for i in block
        }
        for found in pytrec_eval.RelevanceEvaluator(judged, REQUESTED).evaluate(ranking).values():
            for metric, measure in MEASURES.items():
                values[metric].append(found[measure])
    # The reciprocal rank is that of the first relevant document, which counts only if it is among the first ten.
    values["MRR@10"] = [value if value > 1 / 10.5 else 0.0 for value in values["MRR@10"]]
    return {metric: float(np.mean(of_queries)) for metric, of_queries in values.items()}


def similarity_metrics(similarity: np.ndarray, scores: Sequence[float]) -> dict[str, float]:
    """Returns the correlations of similarities with scores; 0 if all similarities are equal.

    Args:
      similarity: Similarity of each pair, [pairs].
      scores: Score of each pair, not all equal.
    """
    from scipy.stats import pearsonr, spearmanr  # slow to import, and not needed to train

    if not np.ptp(similarity):  # the correlation of constant values is undefined
        return dict.fromkeys(CORRELATIONS, 0.0)
    results = spearmanr(similarity, scores), pearsonr(similarity, scores)
    return {name: float(result.statistic) for name, result in zip(CORRELATIONS, results, strict=True)}
