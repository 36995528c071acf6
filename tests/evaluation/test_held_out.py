"""Encoding and held-out figures against plain computations."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import EvaluationSettings, MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.evaluation.held_out import evaluate, read_held_out
from codiemb_jax.models.embed import embed
from codiemb_jax.models.pooling import unit
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
def encoder(model):
    return PromptTokenizer(model.blueprint.tokenizer(), PROMPT)


@pytest.fixture(scope="module")
def embedder(model):
    return Embedder(model.graph, None, model.blueprint, model.mesh).with_params(model.load())


def alone(model, text) -> np.ndarray:
    """The vector of one tokenized text, in a row of its own length."""
    count = text.ids.size
    pooled = (np.arange(count) >= text.content)[None]
    rows = TokenRows(text.ids[None], np.arange(count)[None], np.ones((1, count), int), pooled)
    return np.asarray(unit(embed(nnx.merge(model.graph, model.load()), rows)))[0]


def test_a_vector_does_not_depend_on_its_company(model, encoder, embedder):
    texts = [f"text number {i} " + "goes on " * (i % 17) for i in range(41)]  # more than one batch, several lengths
    vectors = embedder.encode_document(texts)
    tokens = encoder.tokenize_passages([Triple("", "", text.strip()) for text in texts], LIMIT)
    for i in (0, 16, 40):
        np.testing.assert_allclose(vectors[i], alone(model, tokens[i]), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_queries_carry_the_instruction(model, encoder, embedder):
    for instruction, expected in ((None, "Find it"), ("Sort it", "Sort it"), ("", "")):
        (tokens,) = encoder.tokenize_queries([Triple(expected, "", "a red bicycle")], LIMIT)
        vector = embedder.encode_query([" a red bicycle\n"], instruction=instruction)[0]
        np.testing.assert_allclose(vector, alone(model, tokens), atol=2e-6)


def ndcg_at_10(similarity: np.ndarray, relevant: list[set[int]]) -> float:
    """From the formula: gains discounted by log2 of the rank, over those of the best ranking."""
    found = []
    for row, good in zip(similarity, relevant, strict=True):
        ranking = np.argsort(-row, kind="stable")[:10]
        gain = sum(1 / math.log2(rank + 2) for rank, place in enumerate(ranking) if place in good)
        found.append(gain / sum(1 / math.log2(rank + 2) for rank in range(min(len(good), 10))))
    return float(np.mean(found))


def test_ndcg_is_that_of_the_formula(golden, encoder, embedder):
    path = golden / "data" / "news.jsonl"
    (held_out,) = read_held_out(EvaluationSettings(ir=[path]), encoder, LIMIT)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    passages = list(dict.fromkeys(p[2].strip("\t\n :") for r in records for p in r["positives"] + r["negatives"]))
    relevant = [{passages.index(p[2].strip("\t\n :")) for p in record["positives"]} for record in records]
    queries = np.concatenate([embedder.encode_query([r["query"][2]], instruction=r["query"][0]) for r in records])
    expected = ndcg_at_10(queries @ embedder.encode_document(passages).T, relevant)
    assert 0.1 < expected < 1
    assert evaluate(embedder, [held_out]) == {"news nDCG@10": pytest.approx(expected, abs=1e-6)}


def test_spearman_is_the_correlation_of_ranks(golden, encoder, embedder):
    path = golden / "data" / "questions.jsonl"
    (held_out,) = read_held_out(EvaluationSettings(sts=[path]), encoder, LIMIT)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [embedder.encode_query([r["query"][2], r["positives"][0][2]], instruction=r["query"][0]) for r in records]
    similarity = np.array([first @ second for first, second in pairs])
    scores = np.array([record["positive_scores"][0] for record in records])

    def ranks(values: np.ndarray) -> np.ndarray:  # ties share the mean of their ranks
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    expected = np.corrcoef(ranks(similarity), ranks(scores))[0, 1]
    assert evaluate(embedder, [held_out]) == {"questions Spearman": pytest.approx(expected, abs=1e-6)}


@pytest.mark.parametrize(
    ("text", "score", "message"), [("ok", [1.0], "same score"), ("", [0.5], r"held.jsonl:2: positives\[0\]")]
)
def test_held_out_data_that_cannot_be_used_is_told(text, score, message, encoder, tmp_path: Path):
    path = tmp_path / "held.jsonl"
    pair = {"task_type": "sts", "query": ["", "", "a text"], "positive_scores": [1.0]}
    lines = [pair | {"positives": [["", "", "ok"]]}, pair | {"positives": [["", "", text]], "positive_scores": score}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=message):
        read_held_out(EvaluationSettings(sts=[path]), encoder, LIMIT)
