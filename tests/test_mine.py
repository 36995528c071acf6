"""Tests of the program that mines hard negatives, with the model of the quickstart."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import codiemb_jax
from codiemb_jax import Embedder
from codiemb_jax.cli import main as codiemb
from codiemb_jax.errors import UserError
from codiemb_jax.text.records import read_records
from tests.helpers import run

QUICKSTART = Path(codiemb_jax.__file__).parent / "quickstart"
DATA = QUICKSTART / "data" / "train" / "ir"


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_mine(model: Path, output: Path, *flags: str, ir: Sequence[Path] = (DATA / "support.jsonl",)) -> list[Any]:
    codiemb(["mine", "--model", str(model), "--ir", *map(str, ir), "--output", str(output), *flags])
    return read_lines(output)


def training_settings(output_dir: Path, data: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "model": {"path": str(QUICKSTART / "model")},
        "data": {
            "ir": str(data), "ir_global_batch_size": 8, "negatives_per_query": 3, "positives_per_query": 1,
            "query_max_tokens": 96, "passage_max_tokens": 128,
        },
        "optimizer": {"max_steps": 2, "learning_rate": 1e-3},
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_JAX_CACHE", str(folder / "cache"))
        run(training_settings(folder / "run", DATA), folder)
    return folder / "run"


def table(output: str) -> dict[str, int]:
    """Returns the numbers of the table that the program prints."""
    rows = [line.split("│")[1:3] for line in output.splitlines() if line.startswith("│")]
    return {name.strip(): int(number.replace(",", "")) for name, number in rows}


def unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_mined_data_keeps_its_records_and_trains(trained, tmp_path, capsys, monkeypatch):
    files = [DATA / "support.jsonl", DATA / "encyclopedia.jsonl"]  # not in alphabetical order
    flags = ("--range_min", "3", "--range_max", "40", "--negatives", "3", "--relative_margin", "0.02")
    mined = run_mine(trained, tmp_path / "mined.jsonl", *flags, ir=files)
    before = [line for file in files for line in read_lines(file)]
    assert [line | {"negatives": 0} for line in mined] == [line | {"negatives": 0} for line in before]
    records = list(read_records(tmp_path / "mined.jsonl", "ir"))
    numbers = table(capsys.readouterr().out)
    assert numbers["queries"] == len(before) == len(records)
    assert numbers["candidates"] == 37 * len(before)
    assert numbers["negatives"] == sum(len(record.negatives) for record in records) > 0
    assert numbers["queries with fewer than 3 negatives"] == sum(len(record.negatives) < 3 for record in records)
    for record in records:
        texts = [passage.text for passage in record.negatives]
        assert len(set(texts)) == len(texts) <= 3
        assert not {passage.text for passage in record.positives} & set(texts)

    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    lines = run(training_settings(tmp_path / "run", tmp_path / "mined.jsonl"), tmp_path)
    assert len(lines) == 2
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("model", ["checkpoints/2", "export"])
@pytest.mark.parametrize("instruction", [None, "Given a complaint, find the article", ""])
def test_queries_have_their_instructions(instruction, model, trained, tmp_path):
    checkpoint = trained / model
    flags = () if instruction is None else ("--instruction", instruction)
    mined = run_mine(checkpoint, tmp_path / "o.jsonl", "--scores", "--batch_size", "8", *flags, ir=[DATA])
    assert len({line["query"][0] for line in mined}) > 1
    embedder = Embedder.from_pretrained(checkpoint)
    for line in mined[::20]:
        task, instance, text = line["query"]
        query = unit(embedder.encode_query([instance + text], instruction=task if instruction is None else instruction))
        for name in ("positive", "negative"):
            texts = embedder.encode_document(["".join(triple[1:]) for triple in line[f"{name}s"]])
            np.testing.assert_allclose(line[f"{name}_scores"], (unit(texts) @ query.T)[:, 0], atol=2e-5)


def test_ranks_of_an_export_match_numpy(trained, tmp_path):
    corpus = tmp_path / "corpus.txt"
    texts = ["".join(triple[1:]) for line in read_lines(DATA / "encyclopedia.jsonl") for triple in line["negatives"]]
    corpus.write_text("\n".join(texts), encoding="utf-8")
    flags = ("--corpus", str(corpus), "--range_min", "5", "--range_max", "9")
    mined = run_mine(trained / "export", tmp_path / "o.jsonl", *flags)
    embedder, texts = Embedder.from_pretrained(trained / "export"), list(dict.fromkeys(texts))
    (task,) = {line["query"][0] for line in mined}
    queries = embedder.encode_query(["".join(line["query"][1:]) for line in mined], instruction=task)
    scores = unit(queries) @ unit(embedder.encode_document(texts)).T
    for line, row in zip(mined, scores, strict=True):
        found = [row[texts.index(triple[2])] for triple in line["negatives"]]
        np.testing.assert_allclose(found, np.sort(row)[::-1][5:9], atol=1e-5)


def test_instruction_that_leaves_no_room_raises_user_error(trained, tmp_path):
    with pytest.raises(UserError, match="tokens per text leave no room next to the prompt; give a shorter prompt"):
        run_mine(trained / "export", tmp_path / "o.jsonl", "--instruction", "word " * 3000)
    assert not list(tmp_path.iterdir())


def test_instruction_for_a_model_without_placeholder_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="--instruction: this model's prompts have no placeholder"):
        run_mine(QUICKSTART / "model", tmp_path / "o.jsonl", "--instruction", "Find it")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--range_min", "50"], "range_min 50: must be less than range_max, 50"),
        (["--negatives", "41"], "negatives 41: ranks 11 to 50 are only 40 candidates"),
        (["--negatives", "0"], "--negatives: '0': expected an integer from 1"),
        (["--range_min", "-1"], "--range_min: '-1': expected an integer from 0|expected one argument"),
        (["--margin", "nan"], "--margin: 'nan': expected a finite number"),
        (["--max_score", "1e999"], "--max_score: '1e999': expected a finite number"),
        (["--sampling", "best"], "invalid choice: 'best'"),
        (["--seed", "1"], "--seed has no effect without --sampling random"),
        (["--instruction", "\udcff"], "--instruction: '.udcff': is not valid UTF-8"),
        (["--range", "3"], "unrecognized arguments: --range 3"),
        (["--corpus", "absent.txt"], "--corpus absent.txt: cannot be read"),
        (["--corpus", "\udcff.txt"], "--corpus .*: the name is not valid UTF-8"),
        (["--ir", "absent.jsonl"], "--ir:\n  absent.jsonl: no such file"),
        (["--ir", str(DATA), str(DATA / "support.jsonl")], "the same file is listed 2 times"),
        (["--ir", str(DATA.parent / "sts")], "task_type: 'sts' in ir data"),
        (["--output", "absent/o.jsonl"], "--output absent/o.jsonl: there is no folder absent"),
        (["--output", "o.txt"], "--output o.txt: expected a name that ends in .jsonl"),
        (["--output", "o" * 300 + ".jsonl"], "--output o+\\.\\.\\.: cannot be written: File name too long"),
        (["--output", "."], "--output .: expected a name"),
        (["--model", "absent"], "absent is neither a folder nor a hub id"),
        (["--range_min", "300", "--range_max", "400"], "range_min 300: the corpus has only [0-9]+ different texts"),
    ],
    ids=str,
)
def test_invalid_arguments_raise_user_error_and_leave_nothing(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", str(QUICKSTART / "model"), "--ir", str(DATA / "support.jsonl"), "--output", "o.jsonl"]
    with pytest.raises(UserError, match=message):
        codiemb(["mine", *arguments, *flags])
    assert not list(tmp_path.iterdir())


def test_existing_output_exits_with_code_2_at_once(tmp_path):
    for name in ("file.jsonl", "link.jsonl"):
        output = tmp_path / name
        output.write_text("precious") if name == "file.jsonl" else output.symlink_to("absent")
        command = [sys.executable, "-m", "codiemb_jax.mine", "--model", "absent", "--ir", "absent", "--output", output]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
        assert done.returncode == 2
        assert done.stderr == f"error: --output {output}: already exists; give a new file\n"
    assert (tmp_path / "file.jsonl").read_text() == "precious"
