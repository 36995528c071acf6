"""Tests of embeddings and held-out metrics against direct computations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import EvaluationSettings, MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.evaluation.held_out import HeldOutIR, evaluate, read_held_out
from codiemb_jax.models.embed import embed
from codiemb_jax.models.pooling import l2_normalize
from codiemb_jax.sharding import make_mesh
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import Triple

LIMIT = 128
PROMPT = PromptSettings(default_instruction="Find it")


@pytest.fixture(scope="module")
def model(golden):
    settings = ModelSettings(path=str(golden / "youtu_tiny"), compute_dtype="float32")
    mesh = make_mesh(MeshSettings(fsdp=2))
    return open_model(settings, PROMPT, mesh, LIMIT)


@pytest.fixture(scope="module")
def tokenizer(model):
    return PromptTokenizer(model.blueprint.tokenizer(), PROMPT)


@pytest.fixture(scope="module")
def embedder(model):
    return Embedder(model.graph, None, model.blueprint, model.mesh).with_params(model.load())


def embed_single(model, text) -> np.ndarray:
    """Embeds one tokenized text without padding."""
    count = text.ids.size
    pooling_mask = (np.arange(count) >= text.content_start)[None]
    rows = TokenRows(text.ids[None], np.arange(count)[None], np.ones((1, count), int), pooling_mask)
    return np.asarray(l2_normalize(embed(nnx.merge(model.graph, model.load()), rows)))[0]


def test_embedding_does_not_depend_on_other_texts(model, tokenizer, embedder):
    texts = [f"text number {i} " + "goes on " * (i % 17) for i in range(41)]  # two batches, several lengths
    embeddings = embedder.encode_document(texts)
    tokens = tokenizer.tokenize_passages([Triple("", "", text.strip()) for text in texts], LIMIT)
    for i in (0, 16, 40):
        np.testing.assert_allclose(embeddings[i], embed_single(model, tokens[i]), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_queries_contain_the_instruction(model, tokenizer, embedder):
    for instruction, expected in ((None, "Find it"), ("Sort it", "Sort it"), ("", "")):
        (tokens,) = tokenizer.tokenize_queries([Triple(expected, "", "a red bicycle")], LIMIT)
        embedding = embedder.encode_query([" a red bicycle\n"], instruction=instruction)[0]
        np.testing.assert_allclose(embedding, embed_single(model, tokens), atol=2e-6)


def ndcg_at_10(similarity: np.ndarray, relevant: list[set[int]]) -> float:
    """Computes the mean ratio of the DCG to that of an ideal ranking."""
    scores = []
    for row, passages in zip(similarity, relevant, strict=True):
        ranking = np.argsort(-row, kind="stable")[:10]
        dcg = sum(1 / math.log2(rank + 2) for rank, passage in enumerate(ranking) if passage in passages)
        scores.append(dcg / sum(1 / math.log2(rank + 2) for rank in range(min(len(passages), 10))))
    return float(np.mean(scores))


def test_ndcg_matches_formula(golden, tokenizer, embedder):
    path = golden / "data" / "news.jsonl"
    (held_out,) = read_held_out(EvaluationSettings(ir=[path]), tokenizer, LIMIT)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    passages = list(dict.fromkeys(p[2].strip("\t\n :") for r in records for p in r["positives"] + r["negatives"]))
    relevant = [{passages.index(p[2].strip("\t\n :")) for p in record["positives"]} for record in records]
    queries = np.concatenate([embedder.encode_query([r["query"][2]], instruction=r["query"][0]) for r in records])
    expected = ndcg_at_10(queries @ embedder.encode_document(passages).T, relevant)
    assert 0.1 < expected < 1
    assert evaluate(embedder, [held_out]) == {"news nDCG@10": pytest.approx(expected, abs=1e-6)}


def test_spearman_matches_correlation_of_ranks(golden, tokenizer, embedder):
    path = golden / "data" / "questions.jsonl"
    (held_out,) = read_held_out(EvaluationSettings(sts=[path]), tokenizer, LIMIT)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [embedder.encode_query([r["query"][2], r["positives"][0][2]], instruction=r["query"][0]) for r in records]
    similarity = np.array([first @ second for first, second in pairs])
    scores = np.array([record["positive_scores"][0] for record in records])

    def ranks(values: np.ndarray) -> np.ndarray:  # ties get their mean rank
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    expected = np.corrcoef(ranks(similarity), ranks(scores))[0, 1]
    assert evaluate(embedder, [held_out]) == {"questions Spearman": pytest.approx(expected, abs=1e-6)}


@pytest.mark.parametrize(
    ("text", "score", "message"), [("ok", [1.0], "same score"), ("", [0.5], r"held.jsonl:2: positives\[0\]")]
)
def test_invalid_held_out_data_raise_user_error(text, score, message, tokenizer, tmp_path: Path):
    path = tmp_path / "held.jsonl"
    pair = {"task_type": "sts", "query": ["", "", "a text"], "positive_scores": [1.0]}
    lines = [pair | {"positives": [["", "", "ok"]]}, pair | {"positives": [["", "", text]], "positive_scores": score}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        read_held_out(EvaluationSettings(sts=[path]), tokenizer, LIMIT)


@pytest.mark.parametrize("passages", [3, 10, 11, 200])
def test_only_the_best_passages_are_ranked_with_the_same_result(passages):
    """Many similarities are equal; trec_eval breaks ties by name."""
    random = np.random.default_rng(passages)
    angles = random.integers(0, 5, passages) / 5
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    queries = vectors[random.integers(0, passages, 600)]
    relevant = [set(random.choice(passages, random.integers(1, 4), replace=False).tolist()) for _ in queries]

    class Fixed:
        def embed_tokens(self, texts):
            return np.stack(texts)

    _, found = HeldOutIR("data", list(queries), list(vectors), relevant).score(Fixed())
    ranking = {str(i): {str(j): float(s) for j, s in enumerate(row)} for i, row in enumerate(queries @ vectors.T)}
    judged = {str(i): {str(j): 1 for j in found} for i, found in enumerate(relevant)}
    scores = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10"}).evaluate(ranking)
    assert found == pytest.approx(np.mean([score["ndcg_cut_10"] for score in scores.values()]), abs=1e-12)
