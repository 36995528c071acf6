"""Tests `objective.mask_duplicates` from a data file with repeated texts to the metrics of a step."""

import itertools
import json
from unittest.mock import patch

import numpy as np
import pytest

from codiemb_jax.config import Settings
from codiemb_jax.embedder import Embedder
from codiemb_jax.objectives import contrastive
from codiemb_jax.training.step import needs_texts
from tests.helpers import golden_settings, run

# (query, positives, negatives); one positive is drawn for each query, and all negatives.
RECORDS = [
    ("reset my password", ["Use the link on the sign-in page.", "Ask the help desk."], ["We ship worldwide."]),
    ("forgot my login", ["Ask the help desk."], ["The office opens at nine."]),
    ("cannot sign in", ["Use the link on the sign-in page."], ["Ask the help desk."]),
    ("opening hours", ["The office opens at nine."], ["Paris is the capital of France."]),
    ("where do you deliver", ["We ship worldwide."], ["We ship worldwide."]),
    ("capital of France", ["Paris is the capital of France."], ["Lyon is a city in France."]),
    ("second city of France", ["Lyon is a city in France."], ["The Seine is a river."]),
    ("river in Paris", ["The Seine is a river."], ["The Rhine is a river."]),
]  # fmt: skip
TEMPERATURE = 0.05


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def expected(model, drawn, mask):
    """Returns the loss and the number of masked pairs if `drawn` are the drawn positives."""
    candidates = [*enumerate(drawn), *((None, text) for _, _, negatives in RECORDS for text in negatives)]
    queries = model.encode_query([query for query, _, _ in RECORDS], prompt="").astype(np.float64)
    passages = model.encode_document([text for _, text in candidates]).astype(np.float64)
    scores = queries @ passages.T / TEMPERATURE
    losses, masked = [], 0
    for i, (_, positives, _) in enumerate(RECORDS):
        kept = [not mask or own == i or text not in positives for own, text in candidates]
        masked += kept.count(False)
        losses.append(np.log(np.exp(scores[i][kept]).sum()) - scores[i, i])
    return np.mean(losses), masked


def test_step_masks_duplicates(golden, tmp_path):
    lines = [
        {
            "task_type": "ir",
            "query": ["", "", query],
            "positives": [["", "", text] for text in positives],
            "negatives": [["", "", text] for text in negatives],
        }
        for query, positives, negatives in RECORDS
    ]
    (tmp_path / "repeated.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"ir": [str(tmp_path / "repeated.jsonl")], "negatives_per_query": 1}

    def first_line(name):
        settings = golden_settings(
            golden, tmp_path / name, data=data, objective={"temperature": TEMPERATURE},
            optimizer={"learning_rate": 0.0, "max_steps": 1}, export=name == "dense",
        )  # fmt: skip
        return run(settings, tmp_path)[0]

    line = first_line("dense")
    model = Embedder.from_pretrained(tmp_path / "dense" / "export")
    # The plan draws one of the two positives of the first query.
    draws = list(itertools.product(*(positives for _, positives, _ in RECORDS)))
    assert len(draws) == 2
    results = [expected(model, drawn, True) for drawn in draws]
    loss, masked = min(results, key=lambda result: abs(result[0] - line["loss"]))
    assert line["loss"] == line["info_nce"] == pytest.approx(loss, rel=1e-5)
    assert line["masked"] == masked > 8
    assert isinstance(line["masked"], int)
    for drawn in draws:
        assert abs(expected(model, drawn, False)[0] - line["loss"]) > 0.01
    with patch.multiple(contrastive, DENSE_BYTES=0, dense_info_nce=None):
        ring = first_line("ring")
    for name in ("loss", "grad_norm", "masked"):
        assert ring[name] == pytest.approx(line[name], rel=1e-5)


@pytest.mark.parametrize("mask", [True, False])
def test_run_without_any_negatives_left_is_noted(mask, golden, tmp_path, capsys):
    lines = [
        {"task_type": "ir", "query": ["", "", query], "positives": [["", "", "It is a question about accounts."]]}
        for query, _, _ in RECORDS
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = golden_settings(
        golden, tmp_path / "run", data={"ir": [str(tmp_path / "labels.jsonl")], "negatives_per_query": 0},
        objective={"mask_duplicates": mask}, optimizer={"max_steps": 2}, export=False,
    )  # fmt: skip
    losses = [line["loss"] for line in run(settings, tmp_path)]
    note = "note: step 0 has a loss of 0, and 56 pairs of a query and a passage are masked, because the passage has "
    assert capsys.readouterr().err.count(note) == mask
    assert losses == pytest.approx([0, 0] if mask else [np.log(8)] * 2, abs=2e-5)


def test_texts_are_compared_only_if_needed(golden, tmp_path):
    def needed(task, **objective):
        data = {"ir": ["ir.jsonl"], "sts": ["sts.jsonl"]}
        settings = Settings.model_validate(golden_settings(golden, tmp_path, data=data, objective=objective))
        return needs_texts(settings, task)

    assert needed("ir") and needed("mixed")
    assert not needed("sts")
    assert not needed("ir", mask_duplicates=False)
    assert not needed("ir", ir="cosent")
