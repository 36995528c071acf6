"""Tests of the conversion of tables, saved datasets and BEIR folders into training data."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.cli import main as codiemb
from codiemb_jax.errors import UserError
from codiemb_jax.text.records import read_records

ROWS = [
    {"question": "how far is the moon", "answer": "384,400 km", "wrong": "93 million miles"},
    {"question": "who wrote Emma, and when?", "answer": 'Jane Austen,\n"1815"', "wrong": "Emily Brontë"},
    {"question": "how far is the moon", "answer": "About 30 Earths", "wrong": "384,400 km"},
]
EXPECTED = [
    {
        "task_type": "ir",
        "query": ["Answer it", "", "how far is the moon"],
        "positives": [["", "", "384,400 km"], ["", "", "About 30 Earths"]],
        "negatives": [["", "", "93 million miles"]],  # the other one is relevant according to another row
    },
    {
        "task_type": "ir",
        "query": ["Answer it", "", "who wrote Emma, and when?"],
        "positives": [["", "", 'Jane Austen,\n"1815"']],
        "negatives": [["", "", "Emily Brontë"]],
    },
]
FLAGS = ("--query", "question", "--positive", "answer", "--negative", "wrong", "--instruction", "Answer it")


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a table with a byte-order mark, as Excel does."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8-sig")


def convert(source: Path, output: Path, *flags: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the lines of each file that the program writes."""
    codiemb(["convert-data", "--input", str(source), "--output", str(output), *flags])
    return {
        path.name: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(output.iterdir())
    }


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_rows_with_the_same_query_become_one_example(ending, tmp_path, capsys):
    write_table(tmp_path / f"faq.{ending}", ROWS)
    assert convert(tmp_path / f"faq.{ending}", tmp_path / "data", *FLAGS) == {"train.jsonl": EXPECTED}
    assert len(list(read_records(tmp_path / "data" / "train.jsonl", "ir"))) == 2
    out = capsys.readouterr().out
    assert out == f"read 3 rows\nwrote 2 ir examples to {tmp_path / 'data' / 'train.jsonl'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", f"faq.{ending}"]


def test_parquet_files(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "faq.parquet", row_group_size=2)
    assert convert(tmp_path / "faq.parquet", tmp_path / "data", *FLAGS) == {"train.jsonl": EXPECTED}
    content = (tmp_path / "faq.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-20])
    with pytest.raises(UserError, match="cut.parquet: not a readable Parquet file"):
        convert(tmp_path / "cut.parquet", tmp_path / "other", *FLAGS)
    with pytest.raises(UserError, match="faq.parquet: no column 'x'; its columns: question, answer, wrong"):
        convert(tmp_path / "faq.parquet", tmp_path / "other", *FLAGS, "--positive", "x")


def test_folders_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "whole", num_shards=2)
    assert convert(tmp_path / "whole", tmp_path / "a", *FLAGS) == {"train.jsonl": EXPECTED}
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[1:2]), dev=whole.select([2, 0, 1]))
    both.save_to_disk(tmp_path / "both")
    assert convert(tmp_path / "both", tmp_path / "b", *FLAGS) == {"train.jsonl": EXPECTED[1:]}
    found = convert(tmp_path / "both", tmp_path / "c", *FLAGS, "--split", "dev")["train.jsonl"]
    assert [line["query"] for line in found] == [line["query"] for line in EXPECTED]
    assert found[0]["positives"] == EXPECTED[0]["positives"][::-1]
    with pytest.raises(UserError, match="no split 'test'; give one of train, dev"):
        convert(tmp_path / "both", tmp_path / "d", *FLAGS, "--split", "test")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "..", "a/b"])
def test_saved_datasets_cannot_name_files_outside_their_folder(name, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match="_data_files: expected names of files in this folder"):
        convert(tmp_path / "saved", tmp_path / "data")
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(UserError, match="splits: expected a list of names"):
        convert(tmp_path / "saved", tmp_path / "data", "--split", name)
    assert not (tmp_path / "data").exists()


def test_cells_may_hold_several_texts_or_none(tmp_path):
    rows = [{"query": "q", "positive": ["a", "b", "a"], "n1": None, "n2": ["c", ""]}, {"query": "r", "positive": "d"}]
    write_table(tmp_path / "rows.jsonl", rows)
    found = convert(tmp_path / "rows.jsonl", tmp_path / "data", "--negative", "n1", "n2")["train.jsonl"]
    texts = [[[triple[2] for triple in line[key]] for key in ("positives", "negatives")] for line in found]
    assert texts == [[["a", "b"], ["c"]], [["d"], []]]


def test_scores_are_scaled(tmp_path):
    rows = [{"a": "x", "b": "y", "score": "2.5"}, {"a": "x", "b": "z", "score": "5"}]
    write_table(tmp_path / "pairs.csv", rows)
    flags = ("--query", "a", "--positive", "b", "--score", "score", "--max_score", "5", "--instruction", "Compare")
    found = convert(tmp_path / "pairs.csv", tmp_path / "data", *flags)
    first, second = (
        {"task_type": "sts", "query": ["Compare", "", "x"], "positives": [["Compare", "", text]]} for text in "yz"
    )
    assert found == {"train.jsonl": [first | {"positive_scores": [0.5]}, second | {"positive_scores": [1.0]}]}
    assert [record.score for record in read_records(tmp_path / "data" / "train.jsonl", "sts")] == [0.5, 1.0]


def test_beir_folders(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = [("d1", "Moon", "384,400 km"), ("d2", "", "30 Earths"), ("d3", "", "93 million miles"), ("d4", "", " ")]
    lines = [json.dumps({"_id": name, "title": title, "text": text}) for name, title, text in corpus]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    queries = [("q1", "how far is it"), ("q2", "who wrote Emma"), ("q3", "not judged")]
    (folder / "queries.jsonl").write_text("\n".join(json.dumps({"_id": q, "text": text}) for q, text in queries))
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "train.tsv").write_text(header + "q1\td1\t1\nq1\td2\t2\nq1\td3\t0\nq2\td4\t1\n")
    (folder / "qrels" / "test.tsv").write_text(header + "q2\td3\t1\n")
    found = convert(folder, tmp_path / "train", "--instruction", "Answer it")["train.jsonl"]
    assert found == [
        {
            "task_type": "ir",
            "query": ["Answer it", "", "how far is it"],
            "positives": [["", "", "Moon 384,400 km"], ["", "", "30 Earths"]],
            "negatives": [["", "", "93 million miles"]],
        }
    ]
    found = convert(folder, tmp_path / "test", "--split", "test")["train.jsonl"]
    assert [line["query"][2] for line in found] == ["who wrote Emma"]
    with pytest.raises(UserError, match="no split 'dev', found test.tsv, train.tsv"):
        convert(folder, tmp_path / "dev", "--split", "dev")
    for flag in ("query", "positive", "negative", "score"):
        with pytest.raises(UserError, match=f"--{flag}: {folder} is a BEIR folder, which has no such columns"):
            convert(folder, tmp_path / flag, f"--{flag}", "text")


def test_held_out_queries_are_a_random_share_of_all(tmp_path):
    write_table(tmp_path / "pairs.csv", [{"query": f"q{i % 40}", "positive": f"p{i}"} for i in range(80)])
    parts = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        found = convert(tmp_path / "pairs.csv", tmp_path / name, "--held_out", "0.1", "--seed", seed)
        queries = {file: [line["query"][2] for line in lines] for file, lines in found.items()}
        assert {file: len(values) for file, values in queries.items()} == {"heldout.jsonl": 4, "train.jsonl": 36}
        assert sorted(queries["heldout.jsonl"] + queries["train.jsonl"]) == sorted(f"q{i}" for i in range(40))
        assert all(len(line["positives"]) == 2 for lines in found.values() for line in lines)
        parts[name] = queries
    assert parts["a"] == parts["b"] != parts["c"]


def test_pairs_with_the_same_first_text_are_held_out_together(tmp_path):
    rows = [{"query": f"q{i % 4}", "positive": f"p{i}", "score": "0.5"} for i in range(12)]
    write_table(tmp_path / "pairs.csv", rows)
    found = convert(tmp_path / "pairs.csv", tmp_path / "data", "--score", "score", "--held_out", "0.25")
    (query,) = {line["query"][2] for line in found["heldout.jsonl"]}
    assert len(found["heldout.jsonl"]) == 3
    assert all(line["query"][2] != query for line in found["train.jsonl"])
    assert len(found["train.jsonl"]) == 9


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(max_examples=50)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_texts_are_kept_as_they_are(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"query": f"q{query}", "positive": f"p{positive}"} for query, positive in pairs]
    write_table(folder / "pairs.tsv", rows)
    codiemb(["convert-data", "--input", str(folder / "pairs.tsv"), "--output", str(folder / "data")])
    lines = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text("utf-8").split("\n")[:-1]]
    found = {(line["query"][2], positive[2]) for line in lines for positive in line["positives"]}
    assert found == {(row["query"], row["positive"]) for row in rows}


FAQ = "question,answer\na,b\n"
INVALID: dict[str, tuple[str, bytes | str, list[str], str]] = {
    "no column": ("a.csv", FAQ, [], "a.csv: no column 'query'; its columns: question, answer"),
    "repeated column": ("a.csv", "query,query,positive\na,b,c\n", [], "several columns are called query"),
    "cells": ("a.csv", "query,positive\na,b\n\nc\n", [], "a.csv:4: 1 cells, expected 2"),
    "quote": ("a.csv", 'query,positive\na,"b', [], "a.csv:2: unexpected end of data"),
    "encoding": ("a.csv", b"query,positive\na,\xff\n", [], "a.csv:2: not valid UTF-8"),
    "separator": ("a.csv", b"query,positive\na\xe2\x80\xa8b,c\nd\xff,e", [], "a.csv:3: not valid UTF-8"),
    "empty": ("a.csv", "", [], "a.csv: no column 'query'; its columns: none"),
    "no rows": ("a.csv", "query,positive\n", [], "a.csv: has no rows"),
    "empty query": ("a.csv", "query,positive\n :\t,b\n", [], "a.csv:2: query: empty"),
    "empty positive": ("a.csv", "query,positive\na,b\na, \n", [], "a.csv:3: positive: empty"),
    "two problems": ("a.csv", "query,positive\n,b\nc,\n", [], r"a.csv:2: query: empty\n  a.csv:3: positive: empty"),
    "number": ("a.jsonl", '{"query": 5, "positive": "a"}', [], "a.jsonl:1: query: expected a string, or a list"),
    "several": ("a.jsonl", '{"query": ["a", "b"], "positive": "a"}', [], "a.jsonl:1: query: several texts"),
    "json": ("a.jsonl", '{"query": "a", "positive": "b"}\n{', [], r"a.jsonl:2: invalid JSON"),
    "list": ("a.jsonl", "[]", [], "a.jsonl:1: expected one JSON object per line"),
    "surrogate": ("a.jsonl", r'{"query": "\ud800", "positive": "b"}', [], "a.jsonl:1: unpaired surrogate"),
    "score": ("a.csv", "query,positive,s\na,b,high\n", ["--score", "s"], "a.csv:2: s: 'high' is not a finite number"),
    "infinite": ("a.csv", "query,positive,s\na,b,inf\n", ["--score", "s"], "a.csv:2: s: 'inf' is not a finite number"),
    "scale": ("a.csv", "query,positive,s\na,b,4\n", ["--score", "s"], "a.csv:2: s: 4 is not between -1 and 1; set"),
    "negatives": ("a.csv", FAQ, ["--score", "s", "--negative", "n"], "pairs have one --positive column and no"),
    "ending": ("a.xlsx", "", [], "a.xlsx: expected a name that ends in one of .csv, .tsv, .jsonl, .json, .parquet"),
    "share": ("a.csv", FAQ, ["--held_out", "1.5"], "--held_out: '1.5': expected a number between 0 and 1"),
    "one query": (
        "a.csv", FAQ, ["--query", "question", "--positive", "answer", "--held_out", "0.5"],
        "1 queries cannot be split",
    ),
    "maximum": ("a.csv", FAQ, ["--max_score", "0"], "--max_score: '0': expected a positive number"),
    "exists": ("a.csv", FAQ, ["--output", "."], "give the name of a new folder"),
    "absent": ("a.csv", FAQ, ["--input", "b.csv"], "b.csv: no such file or folder"),
    "folder": ("a.csv", FAQ, ["--input", "."], "neither a BEIR folder .* nor a saved dataset"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_invalid_input_raises_user_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, content, flags, message = INVALID[name]
    Path(file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message):
        codiemb(["convert-data", "--input", file, "--output", "../data", *flags])
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert not (tmp_path.parent / "data").exists()


def test_error_exits_with_code_2_and_without_traceback(tmp_path):
    (tmp_path / "faq.csv").write_text(FAQ)
    command = [sys.executable, "-m", "codiemb_jax.convert_data", "--input", "faq.csv", "--output", "data"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"XLA_FLAGS": ""})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: faq.csv: no column 'query'; its columns: question, answer\n"
    assert [path.name for path in tmp_path.iterdir()] == ["faq.csv"]


def test_texts_that_training_strips_alike_are_the_same_text(tmp_path):
    (tmp_path / "faq.csv").write_text('query,positive,negative\nfoo,A,X\n"foo ",B,A\n"foo:",C," B"\n')
    (example,) = convert(tmp_path / "faq.csv", tmp_path / "data", "--negative", "negative")["train.jsonl"]
    assert example["query"] == ["", "", "foo"]
    assert [text for *_, text in example["positives"]] == ["A", "B", "C"]
    assert [text for *_, text in example["negatives"]] == ["X"]


def test_beir_queries_with_the_same_text_become_one_example(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "1", "text": "one"}\n{"_id": "2", "text": "two"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "a", "text": "which"}\n{"_id": "b", "text": "which "}\n')
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\na\t1\t1\nb\t1\t0\nb\t2\t0\n")
    (example,) = convert(folder, tmp_path / "data")["train.jsonl"]
    assert example["query"] == ["", "", "which"]
    assert example["positives"] == [["", "", "one"]]
    assert example["negatives"] == [["", "", "two"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--negative", "negatives"], "faq.jsonl: no column 'negatives'; its columns: query, positive, negative"),
        (["--score", ""], "--score: give the name of a column"),
        (["--negative", "negative", ""], "--negative: give the name of a column"),
        (["--max_score", "5"], "--max_score has no effect without --score"),
        (["--split", "test"], "--split has no effect for a file"),
        (["--seed", "1"], "--seed has no effect without --held_out"),
        (["--instruction", "\udcff"], "--instruction: '.udcff': is not valid UTF-8"),
        (["--input", "x" * 300], "cannot be read: File name too long"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, tmp_path):
    (tmp_path / "faq.jsonl").write_text('{"query": "a", "positive": "b", "negative": "c"}\n')
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "faq.jsonl", tmp_path / "data", *flags)
    assert not (tmp_path / "data").exists()
