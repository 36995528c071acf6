"""Tests of the program that evaluates models, with the model and the data of the quickstart."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)

import codiemb_jax
from codiemb_jax.checkpoints.export import write_export
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.checkpoints.orbax import save_model
from codiemb_jax.cli import main as codiemb
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.evaluation.mteb_tasks import run_mteb
from codiemb_jax.sharding import make_mesh
from codiemb_jax.text.records import Triple, read_records
from tests.evaluation.local_mteb import LocalRetrieval, LocalSTS, pairs
from tests.evaluation.test_beir import make_data, write
from tests.helpers import sentence_transformer

QUICKSTART = Path(codiemb_jax.__file__).parent / "quickstart"
IR = QUICKSTART / "data" / "heldout" / "ir" / "heldout.jsonl"
STS = QUICKSTART / "data" / "heldout" / "sts" / "heldout.jsonl"
PROMPT = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
LIMIT = 48
"""Shorter than some passages with their prompt."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with the same model as a checkpoint, an export, and a folder of another project."""
    folder = tmp_path_factory.mktemp("models")
    model = open_model(ModelSettings(path=str(QUICKSTART / "model")), PROMPT, make_mesh(MeshSettings()), LIMIT)
    save_model(folder / "checkpoint", model.stream(), model.stream_passthrough(), model.blueprint)
    for name in ("export", "other"):
        write_export(folder / name, model.load(), {}, model.blueprint, stock=True)
    path = folder / "other" / "config_sentence_transformers.json"
    config = json.loads(path.read_text())
    del config["query_template"], config["begin"]
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def registered(monkeypatch):
    """Makes mteb know the local tasks."""
    registry = importlib.import_module("mteb.get_tasks")._TASKS_REGISTRY
    for task in (LocalRetrieval, LocalSTS):
        monkeypatch.setitem(registry, task.metadata.name, task)


@pytest.fixture
def beir(tmp_path) -> Path:
    return write(tmp_path / "parts", make_data())


def evaluate(model: Path, output: Path, *flags: str | Path) -> dict[str, dict[str, float]]:
    codiemb(["evaluate", "--model", str(model), "--output", str(output), *map(str, flags)])
    written = json.loads(output.read_text())
    assert written.keys() == {"model", "results"}
    assert written["model"] == str(model)
    return written["results"]


def assert_equal(found: dict[str, dict[str, float]], expected: dict[str, dict[str, float]]) -> None:
    assert found.keys() == expected.keys()
    for name, metrics in expected.items():
        assert found[name] == pytest.approx(metrics, abs=1e-6)


def test_export_has_the_results_of_its_checkpoint(models, beir, tmp_path, capsys):
    data = ("--ir", IR, "--sts", STS, "--beir", beir)
    expected = evaluate(models / "checkpoint", tmp_path / "checkpoint.json", *data)
    assert expected.keys() == {"heldout", "parts"}
    metrics = ["nDCG@10", "MRR@10", "Recall@10", "Recall@100", "MAP"]
    assert list(expected["heldout"]) == [*metrics, "Spearman", "Pearson"]
    assert list(expected["parts"]) == metrics
    output = capsys.readouterr()
    header, *rows = [line.split() for line in output.out.splitlines() if "." in line or "nDCG" in line]
    assert header == ["data", *metrics, "Spearman", "Pearson"]
    assert rows == [[name, *(f"{value:.4f}" for value in values.values())] for name, values in expected.items()]
    assert "note" not in output.err
    assert_equal(evaluate(models / "export", tmp_path / "export.json", *data), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "export.json", "parts"]


def test_query_prompt_reproduces_that_of_the_model(models, beir, tmp_path, capsys):
    data = ("--ir", IR, "--sts", STS)
    expected = evaluate(models / "export", tmp_path / "expected.json", *data)
    without = evaluate(models / "other", tmp_path / "without.json", *data)
    assert without != expected
    note = "note: the instructions in the data are not used, because this model's prompts have no placeholder for them"
    assert capsys.readouterr().err.count(note) == 1
    prompt = ("--query_prompt", "<s>Instruction: {instruction} Query: ")
    assert_equal(evaluate(models / "other", tmp_path / "other.json", *data, *prompt), expected)
    assert "note" not in capsys.readouterr().err
    flags = ("--beir", beir, *prompt, "--instruction", PROMPT.default_instruction)
    assert_equal(
        evaluate(models / "other", tmp_path / "a.json", *flags),
        evaluate(models / "export", tmp_path / "b.json", "--beir", beir),
    )


def content(triple: Triple) -> str:
    return triple.instance + triple.text


def test_retrieval_matches_sentence_transformers(models, tmp_path):
    records = list(read_records(IR, "ir"))
    passages = list(dict.fromkeys(content(p) for r in records for p in (*r.positives, *r.negatives)))
    evaluator = InformationRetrievalEvaluator(
        {str(i): content(record.query) for i, record in enumerate(records)},
        {f"p{i}": text for i, text in enumerate(passages)},
        {str(i): {f"p{passages.index(content(p))}" for p in record.positives} for i, record in enumerate(records)},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        precision_recall_at_k=[10, 100],
        map_at_k=[1000],
        write_csv=False,
        query_prompt="<s>Instruction: Find the answer Query: ",
        corpus_prompt="<s>Passage: ",
    )
    expected = evaluator(sentence_transformer(models / "export"))
    found = evaluate(models / "export", tmp_path / "o.json", "--ir", IR, "--instruction", "Find the answer")["heldout"]
    names = ("ndcg@10", "mrr@10", "recall@10", "recall@100", "map@1000")
    assert list(found.values()) == pytest.approx([expected[f"cosine_{name}"] for name in names], abs=1e-6)
    assert 0.1 < found["nDCG@10"] < 1


def test_similarity_matches_sentence_transformers(models, tmp_path):
    records = list(read_records(STS, "sts"))
    evaluator = EmbeddingSimilarityEvaluator(
        [content(record.query) for record in records],
        [content(record.positives[0]) for record in records],
        [record.score for record in records],
        main_similarity="cosine",
        write_csv=False,
    )
    reference = sentence_transformer(models / "export")
    reference.prompts["pair"] = "<s>Instruction: Find the same Query: "
    reference.default_prompt_name = "pair"  # the evaluator has no argument for it
    expected = evaluator(reference)
    found = evaluate(models / "export", tmp_path / "o.json", "--sts", STS, "--instruction", "Find the same")["heldout"]
    assert found == {
        "Spearman": pytest.approx(expected["spearman_cosine"], abs=1e-6),
        "Pearson": pytest.approx(expected["pearson_cosine"], abs=1e-6),
    }


def test_tasks_of_mteb_are_evaluated_in_the_same_run(models, registered, tmp_path, capsys):
    flags = ("--mteb", "LocalSTS", "LocalRetrieval", "--mteb_results", tmp_path / "mteb", "--sts", STS)
    codiemb(["evaluate", "--model", str(models / "export"), "--output", str(tmp_path / "o.json"), *map(str, flags)])
    written = json.loads((tmp_path / "o.json").read_text())
    embedder = Embedder.from_pretrained(models / "export")
    expected = {score.task: score.value for score in run_mteb(embedder, ["LocalSTS", "LocalRetrieval"]).scores}
    assert written["mteb"]["tasks"] == pytest.approx(expected, abs=1e-6)
    assert written["mteb"]["means"] == pytest.approx(
        {
            "Retr.": 100 * expected["LocalRetrieval"],
            "STS": 100 * expected["LocalSTS"],
            "Mean(Task)": 50 * sum(expected.values()),
            "Mean(Type)": 50 * sum(expected.values()),
        },
        abs=1e-4,
    )
    assert_equal(written["results"], evaluate(models / "export", tmp_path / "sts.json", "--sts", STS))
    assert f"{written['mteb']['means']['Mean(Task)']:.2f}" in capsys.readouterr().out
    assert len(list((tmp_path / "mteb").rglob("LocalSTS.json"))) == 1


def test_instruction_and_query_prompt_reach_the_tasks_of_mteb(models, registered, tmp_path):
    prompt, instruction = "<s>Task: {instruction}\nQuery: ", "Find similar sentences"
    flags = ["--mteb", "LocalSTS", "--query_prompt", prompt, "--instruction", instruction]
    codiemb(["evaluate", "--model", str(models / "export"), "--output", str(tmp_path / "o.json"), *flags])
    first, second, scores = pairs(80, 4)
    embedder = Embedder.from_pretrained(models / "export")
    whole = prompt.replace("{instruction}", instruction)
    cosines = (embedder.encode(first, prompt=whole) * embedder.encode(second, prompt=whole)).sum(axis=1)
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["mteb"]["tasks"] == {"LocalSTS": pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-6)}
    assert written["results"] == {}


def test_truncated_texts_are_counted(models, tmp_path, capsys):
    long = {"task_type": "ir", "query": ["", "", "short"], "positives": [["", "", "water " * 200]]}
    (tmp_path / "data.jsonl").write_text(json.dumps(long | {"negatives": [["", "", "salt " * 200], ["", "", "x"]]}))
    evaluate(models / "export", tmp_path / "o.json", "--ir", tmp_path / "data.jsonl", "--max_tokens", "40")
    assert "warning: 2 texts have more than 40 tokens and were truncated" in capsys.readouterr().err


def test_batch_size_has_no_effect(models, beir, tmp_path):
    data = ("--ir", IR, "--beir", beir)
    found = evaluate(models / "export", tmp_path / "a.json", *data, "--batch_size", "8")
    assert_equal(found, evaluate(models / "export", tmp_path / "b.json", *data))


def test_several_files_are_named_by_their_paths(models, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_bytes(IR.read_bytes())
    flags = ("--ir", tmp_path / "a", "--ir", tmp_path / "b" / "data.jsonl")
    found = evaluate(models / "export", tmp_path / "o.json", *flags)
    assert list(found) == [str(tmp_path / name / "data.jsonl") for name in ("a", "b")]


def test_default_model_is_the_export_of_a_run(models, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "export").symlink_to(models / "export")
    expected = evaluate(models / "export", tmp_path / "a.json", "--sts", STS)
    assert evaluate(tmp_path / "run", tmp_path / "b.json", "--sts", STS) == expected


INVALID: dict[str, tuple[list[Any], str]] = {
    "no data": ([], "no data; give --ir, --sts, --beir or --mteb"),
    "mteb task": (["--mteb", "STSb"], "STSb: mteb has no such task; did you mean STSB"),
    "mteb limit": (["--mteb", "STSB", "--max_tokens", "40"], "--max_tokens does not apply to --mteb"),
    "mteb folder": (["--ir", IR, "--mteb_results", "r"], "--mteb_results has no effect without --mteb"),
    "mteb prompt": (["--mteb", "STSB", "--query_prompt", "<s>"], "must contain the placeholder {instruction}"),
    "ending": (["--ir", IR, "--output", "o.txt"], r"--output o\.txt: expected a name that ends in \.json"),
    "exists": (["--ir", IR, "--output", "old.json"], r"--output old\.json: already exists; give a new file"),
    "no folder": (["--ir", IR, "--output", "a/o.json"], "--output a/o.json: there is no folder a; create it first"),
    "name": (["--ir", IR, "--output", f"{'a' * 300}.json"], "--output a.*: cannot be written: File name too long"),
    "no writing": (["--ir", IR, "--output", "/proc/o.json"], "/proc/o.json: (cannot be written|there is no)"),
    "absent": (["--ir", "absent.jsonl"], r"--ir:\n  absent\.jsonl: no such file or folder"),
    "task": (["--sts", IR], "task_type: 'ir' in sts data"),
    "same file": (["--ir", IR, IR], "the same file is listed 2 times"),
    "too many tokens": (["--ir", IR, "--max_tokens", "49"], "--max_tokens 49: the model's maximum is 48"),
    "too few tokens": (["--ir", IR, "--max_tokens", "4"], "no room for the text, expected --max_tokens|leave no room"),
    "number": (["--ir", IR, "--batch_size", "0"], "--batch_size: '0': expected an integer from 1"),
    "begin": (["--ir", IR, "--query_prompt", "Query: "], "query prompt 'Query: ': must start with '<s>'"),
    "unused": (["--ir", IR, "--query_prompt", "<s>", "--instruction", "x"], "the query prompt has no placeholder"),
    "bytes": (["--ir", IR, "--instruction", "\udcff"], "--instruction: '.udcff': is not valid UTF-8"),
    "remote": (["--ir", "s3://bucket/data"], "this address is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("model", ["export", "checkpoint"])
@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_raise_user_error(name, model, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.json").write_text("{}")
    flags, message = INVALID[name]
    with pytest.raises(UserError, match=message):
        codiemb(["evaluate", "--model", str(models / model), *map(str, flags)])
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert Path("old.json").read_text() == "{}"


def test_invalid_weights_raise_user_error(tmp_path):
    model = open_model(ModelSettings(path=str(QUICKSTART / "model")), PROMPT, make_mesh(MeshSettings()), LIMIT)
    params = model.load()
    params["embedding"] = params["embedding"] * np.nan
    write_export(tmp_path / "export", params, {}, model.blueprint, stock=True)
    with pytest.raises(UserError, match="embeddings of held-out texts are NaN or infinite"):
        evaluate(tmp_path / "export", tmp_path / "o.json", "--ir", IR)
    assert not (tmp_path / "o.json").exists()


def test_error_exits_with_code_2_and_without_traceback(tmp_path):
    command = [sys.executable, "-m", "codiemb_jax.evaluate", "--model", "absent", "--ir", str(IR)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"XLA_FLAGS": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent is neither a folder nor a hub id (owner/name)\n"
