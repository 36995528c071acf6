"""Tests of hard-negative mining against `mine_hard_negatives` of sentence-transformers."""

import json

import pytest
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from codiemb_jax import Embedder
from codiemb_jax.evaluation.mining import MiningSettings, ModelEncoder, mine
from tests.helpers import sentence_transformer


@pytest.mark.parametrize("filters", [{}, {"margin": 0.1}, {"relative_margin": 0.3, "max_score": 0.5}], ids=str)
def test_same_negatives_as_sentence_transformers(filters, minilm, golden, tmp_path):
    """From the first rank on, so that it makes no difference whether ranks are counted before or after filters."""
    lines = [json.loads(line) for line in (golden / "data" / "news.jsonl").read_text(encoding="utf-8").splitlines()][
        :40
    ]
    queries = [line["query"][1] + line["query"][2] for line in lines]
    pairs = [(query, line["positives"][0][2]) for query, line in zip(queries, lines, strict=True)]
    corpus = list(dict.fromkeys(triple[2] for line in lines for triple in line["positives"][:1] + line["negatives"]))
    data = tmp_path / "data.jsonl"
    records = [
        {"task_type": "ir", "query": ["", "", query], "positives": [["", "", positive]]} for query, positive in pairs
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))

    options = MiningSettings(negatives=3, range_min=0, range_max=60, **filters)
    encoder = ModelEncoder(Embedder.from_pretrained(minilm))
    mine([data], tmp_path / "corpus.jsonl", tmp_path / "mined.jsonl", options, encoder)
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [
        (query, positive, triple[2])
        for (query, positive), record in zip(pairs, mined, strict=True)
        for triple in record["negatives"]
    ]
    expected = mine_hard_negatives(
        Dataset.from_dict({"query": queries, "positive": [positive for _, positive in pairs]}),
        sentence_transformer(minilm), corpus=corpus, num_negatives=3, range_max=60,
        absolute_margin=filters.get("margin"), relative_margin=filters.get("relative_margin"),
        max_score=filters.get("max_score"), output_format="triplet", verbose=False,
    )  # fmt: skip
    assert sorted(found) == sorted(zip(expected["query"], expected["positive"], expected["negative"], strict=True))
    assert found
