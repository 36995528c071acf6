"""Tests of embeddings and held-out metrics against direct computations."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import EvaluationSettings, MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.evaluation.held_out import HeldOutIR, HeldOutTexts, evaluate, held_out_digest, read_held_out
from codiemb_jax.models.embed import embed
from codiemb_jax.models.pooling import l2_normalize
from codiemb_jax.sharding import make_mesh
from codiemb_jax.text.prompts import PromptTokenizer, Tokens
from codiemb_jax.text.records import Triple
from tests.evaluation.test_metrics import mean_reference

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


def test_retrieval_metrics_match_formulas(golden, tokenizer, embedder):
    path = golden / "data" / "news.jsonl"
    (held_out,) = read_held_out(EvaluationSettings(ir=[path]), tokenizer, LIMIT)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    passages = list(dict.fromkeys(p[2].strip("\t\n :") for r in records for p in r["positives"] + r["negatives"]))
    relevant = [{str(passages.index(p[2].strip("\t\n :"))): 1 for p in record["positives"]} for record in records]
    queries = np.concatenate([embedder.encode_query([r["query"][2]], instruction=r["query"][0]) for r in records])
    similarity = queries.astype(np.float64) @ embedder.encode_document(passages).astype(np.float64).T
    expected = mean_reference([{str(i): value for i, value in enumerate(row)} for row in similarity], relevant)
    assert 0.1 < expected["nDCG@10"] < 1
    found = evaluate(embedder, [held_out])
    assert list(found) == ["news nDCG@10", "news MRR@10", "news Recall@10", "news Recall@100", "news MAP"]
    assert found == pytest.approx({f"news {metric}": value for metric, value in expected.items()}, abs=1e-6)


def test_correlations_match_numpy(golden, tokenizer, embedder):
    path = golden / "data" / "questions.jsonl"
    (held_out,) = read_held_out(EvaluationSettings(sts=[path]), tokenizer, LIMIT)
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [embedder.encode_query([r["query"][2], r["positives"][0][2]], instruction=r["query"][0]) for r in records]
    similarity = np.array([first @ second for first, second in pairs])
    scores = np.array([record["positive_scores"][0] for record in records])

    def ranks(values: np.ndarray) -> np.ndarray:  # ties get their mean rank
        return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])

    assert evaluate(embedder, [held_out]) == {
        "questions Spearman": pytest.approx(np.corrcoef(ranks(similarity), ranks(scores))[0, 1], abs=1e-6),
        "questions Pearson": pytest.approx(np.corrcoef(similarity, scores)[0, 1], abs=1e-6),
    }


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


def test_digest_changes_with_the_data_and_only_then(golden, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    ir, sts, beir = tmp_path / "ir.jsonl", tmp_path / "sts.jsonl", tmp_path / "beir"
    shutil.copy(golden / "data" / "news.jsonl", ir)
    shutil.copy(golden / "data" / "questions.jsonl", sts)
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text('{"_id": "a", "text": "a cat"}\n{"_id": "b", "text": "a dog"}\n')
    (beir / "queries.jsonl").write_text('{"_id": "q", "text": "which cat"}\n')
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")

    def digest() -> str:
        settings = EvaluationSettings(ir=[ir], sts=[sts], beir=[beir])
        return held_out_digest(read_held_out(settings, tokenizer, LIMIT))

    original = digest()
    ir.touch()
    assert digest() == original
    records = [json.loads(line) for line in ir.read_text(encoding="utf-8").splitlines()]
    positive, pair = records[0]["positives"][0][2], json.loads(sts.read_text(encoding="utf-8").splitlines()[0])
    changes = [
        (ir, positive, positive + " more"),
        (ir, records[0]["query"][2], records[0]["query"][2] + " more"),
        (sts, pair["positives"][0][2], pair["positives"][0][2] + " more"),
        (sts, f'"positive_scores": {json.dumps(pair["positive_scores"])}', '"positive_scores": [0.123]'),
        (beir / "corpus.jsonl", "a dog", "a wolf"),
        (beir / "queries.jsonl", "which cat", "what cat"),
        (beir / "qrels" / "test.tsv", "q\ta\t1", "q\ta\t2"),
    ]
    seen = {original}
    for path, old, new in changes:
        content = path.read_text(encoding="utf-8")
        assert old in content
        path.write_text(content.replace(old, new, 1), encoding="utf-8")
        seen.add(digest())
        path.write_text(content, encoding="utf-8")
    assert len(seen) == 1 + len(changes)
    assert digest() == original


@pytest.mark.parametrize("passages", [3, 10, 11, 200, 1300])
def test_only_the_best_passages_are_ranked_with_the_same_result(passages):
    """Many similarities are equal, also at the last rank that counts; trec_eval breaks ties by name."""
    random = np.random.default_rng(passages)
    # Unit vectors whose inner products are exact in any order of summation.
    choices = np.concatenate([np.eye(4), np.array([[1, 1, 1, 1], [1, -1, 1, -1], [-1, -1, 1, 1]]) / 2])
    vectors = choices[random.integers(0, len(choices), passages)].astype(np.float32)
    queries = vectors[random.integers(0, passages, 600 if passages < 1000 else 50)]
    relevant = [set(random.choice(passages, random.integers(1, 4), replace=False).tolist()) for _ in queries]

    class Fixed:
        def embed_tokens(self, texts, *_):
            return np.stack(texts)

    found = HeldOutIR("data", list(queries), list(vectors), relevant).score(Fixed())
    scores = [{str(j): float(score) for j, score in enumerate(row)} for row in queries @ vectors.T]
    expected = mean_reference(scores, [{str(j): 1 for j in found} for found in relevant])
    assert found == pytest.approx(expected, abs=1e-12)


class Characters:
    """A tokenizer of one token per character, without instructions, that notices no empty content."""

    prompts = {"query": "find: ", "document": ""}
    default_prompt_name = None
    takes_instructions = False

    def tokenize(self, texts, prompt, max_tokens):
        return [Tokens(np.array([ord(c) for c in (prompt + text)[:max_tokens]], np.int32), 0) for text in texts]


def read(tokens) -> str:
    return "".join(map(chr, tokens.ids))


def test_models_without_placeholder_get_their_query_prompt():
    texts = HeldOutTexts(Characters(), 100)
    queries = [Triple("Sort it", "code: ", "x"), Triple("", "", "y")]
    assert list(map(read, texts.queries(queries, ["a:1", "a:2"]))) == ["find: code: x", "find: y"]
    assert texts.unused_instructions
    assert list(map(read, texts.plain_queries(["z"], ["a:1"]))) == ["find: z"]
    with pytest.raises(UserError, match="instruction 'Find': this model's prompts have no placeholder"):
        HeldOutTexts(Characters(), 100, instruction="Find")


def test_query_prompt_replaces_that_of_the_model(tokenizer):
    queries = [Triple("Sort it", "", "x"), Triple("", "", "y")]
    texts = HeldOutTexts(Characters(), 100, query_prompt="Task: {instruction}; ")
    assert list(map(read, texts.queries(queries, ["a:1", "a:2"]))) == ["Task: Sort it; x", "y"]
    assert not texts.unused_instructions
    with pytest.raises(UserError, match="queries of BEIR folders have no instruction to insert"):
        texts.plain_queries(["z"], ["a:1"])
    texts = HeldOutTexts(Characters(), 100, query_prompt="Task: {instruction}; ", instruction="Find")
    assert list(map(read, texts.queries(queries, ["a:1", "a:2"]))) == ["Task: Find; x", "Task: Find; y"]
    assert list(map(read, texts.plain_queries(["z"], ["a:1"]))) == ["Task: Find; z"]
    texts = HeldOutTexts(Characters(), 100, query_prompt="")
    assert list(map(read, texts.queries(queries, ["a:1", "a:2"]))) == ["x", "y"]
    with pytest.raises(UserError, match="instruction 'Find': the query prompt has no placeholder"):
        HeldOutTexts(tokenizer, 100, query_prompt="Task: ", instruction="Find")


def test_query_prompt_without_the_special_tokens_of_the_model_raises_user_error(model):
    tokenizer = PromptTokenizer(model.blueprint.tokenizer(), PromptSettings(begin="<|begin_of_text|>"))
    with pytest.raises(UserError, match=r"must start with '<\|begin_of_text\|>'"):
        HeldOutTexts(tokenizer, 100, query_prompt="Task: ")


def test_truncated_texts_are_counted_once():
    texts = HeldOutTexts(Characters(), 10, count_truncated=True)
    texts.plain_queries(["1234", "12345", "1"], [""] * 3)
    assert texts.truncated == 1
    texts.passages([Triple("", "", "0" * n) for n in (9, 10, 11, 12)], [""] * 4)
    assert texts.truncated == 3


def test_prompt_that_fills_the_limit_raises_user_error(tokenizer):
    with pytest.raises(UserError, match="6 tokens per text leave no room next to the prompt; increase --max_tokens"):
        HeldOutTexts(Characters(), 6, limit_setting="--max_tokens").plain_queries(["a", "b"], ["x:1", "x:2"])
    with pytest.raises(UserError, match="x:2: the prompt leaves no room for the text, expected --max_tokens >= "):
        HeldOutTexts(tokenizer, 6, limit_setting="--max_tokens").queries(
            [Triple("", "", "a"), Triple("Find all of it", "", "b")], ["x:1", "x:2"]
        )


def test_documents_without_tokens_are_left_out(tokenizer):
    kept, tokens = HeldOutTexts(tokenizer, 100).documents(["a", "", " : ", "b"])
    assert kept == [0, 3]
    assert [found.ids.size for found in tokens] == [1, 1]
