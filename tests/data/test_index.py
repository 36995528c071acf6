"""Tests the index: that it is written in pieces, mapped into memory, and that damaged and hostile files are noticed."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.config import DataSettings, PromptSettings
from codiemb_jax.data.column import ColumnWriter
from codiemb_jax.data.index import DTYPES, INDEX, MANIFEST, Index, IndexWriter, Totals, is_complete
from codiemb_jax.data.layout import PaddedLayout
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.sampler import Plan, Source
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import PromptTokenizer
from tests.helpers import in_memory

LIMITS = (40, 30)


def make_piece(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    positives, negatives = rng.integers(1, 4, count), rng.integers(0, 3, count)
    passages = int((positives + negatives).sum())
    return {
        "score": rng.uniform(-3, 3, count),
        "query_tokens": rng.integers(1, LIMITS[0] + 1, count),
        "positives": positives,
        "negatives": negatives,
        "passage_offsets": np.cumsum(positives + negatives),
        "passage_tokens": rng.integers(1, LIMITS[1] + 1, passages),
        "passage_hashes": rng.integers(0, 2**64, passages, np.uint64),
    }


def write(folder: Path, pieces: list[dict[str, np.ndarray]]) -> Path:
    with IndexWriter(folder, *LIMITS) as writer:
        for piece in pieces:
            writer.append(piece)
        assert not is_complete(folder)
        writer.finish()
    assert is_complete(folder)
    return folder


def open_index(folder: Path) -> Index:
    return Index.open(folder, Totals.read(folder))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_pieces_are_joined(tmp_path_factory, counts, seed):
    rng = np.random.default_rng(seed)
    pieces = [make_piece(rng, count) for count in counts]
    folder = write(tmp_path_factory.mktemp("index") / "data", pieces)
    index, totals = in_memory(open_index(folder)), Totals.read(folder)
    for name, dtype in DTYPES.items():
        value = getattr(index, name)
        assert value.dtype == dtype
        assert np.array_equal(value, np.load(folder / INDEX / f"{name}.npy", allow_pickle=False))
        if name != "passage_offsets":
            assert np.array_equal(value, np.concatenate([piece[name] for piece in pieces]))
    assert len(index) == sum(counts)
    ends = np.cumsum(np.concatenate([piece["positives"] + piece["negatives"] for piece in pieces]))
    assert index.passage_offsets.tolist() == [0, *ends.tolist()]
    queries, passages = index.query_tokens.tolist(), index.passage_tokens.tolist()
    assert totals == Totals(
        examples=len(queries),
        passages=len(passages),
        tokens=sum(queries + passages),
        longest=max(queries + passages),
        with_negatives=sum(n > 0 for n in index.negatives.tolist()),
        full=queries.count(LIMITS[0]) + passages.count(LIMITS[1]),
        min_score=min(index.score.tolist()),
        max_score=max(index.score.tolist()),
    )


@pytest.mark.parametrize("name", DTYPES)
def test_flipped_bit_is_noticed_where_it_is_read_and_nowhere_else(name, tmp_path):
    folder = write(tmp_path / "data", [make_piece(np.random.default_rng(0), 500) for _ in range(6)])
    path = folder / INDEX / f"{name}.npy"
    expected = np.load(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last value
    path.write_bytes(content)
    if name == "passage_offsets":
        with pytest.raises(UserError, match="passage_offsets.npy: block 5 does not match its checksum"):
            open_index(folder)
        return
    column = getattr(open_index(folder), name)
    beginning = np.arange(1000).reshape(10, 100)
    np.testing.assert_array_equal(column[beginning], expected[beginning])
    for indices in ([0, column.size - 1], [[-1 + column.size]]):
        with pytest.raises(ValueError, match=f"{name}.npy: block .* does not match its checksum"):
            column[indices]
    np.testing.assert_array_equal(column[beginning], expected[beginning])


@pytest.mark.parametrize("name", ["passage_hashes", "positives", "passage_tokens"])
def test_flipped_bit_of_a_planned_example_is_a_user_error(name, tmp_path):
    folder = write(tmp_path / "data", [make_piece(np.random.default_rng(0), 9)])
    path = folder / INDEX / f"{name}.npy"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    settings = DataSettings(ir=["a"], ir_global_batch_size=8, query_max_tokens=40, passage_max_tokens=30)
    groups = {"ir": None, "sts": None}
    plan = Plan([Source("a", "ir", open_index(folder))], settings, 0, PaddedLayout(), groups, compare_texts=True)
    with pytest.raises(UserError, match=f"{folder}: the prepared dataset is damaged .*checksum.*; delete the folder"):
        plan.step(0)


def test_counts_and_lengths_of_examples(tmp_path):
    index = open_index(write(tmp_path / "data", [make_piece(np.random.default_rng(0), 5)]))
    positives, negatives = index.counts(np.array([4, 0, 4]))
    assert positives.tolist() == [index.positives[i] for i in (4, 0, 4)]
    assert negatives.tolist() == [index.negatives[i] for i in (4, 0, 4)]
    lengths = index.lengths(np.array([4, 0]), np.array([[0, -1], [-1, 0]]), 40)
    passages = index.passage_tokens[index.passage_offsets[[4, 0]]]
    assert lengths.tolist() == [[index.query_tokens[4], passages[0], 0], [index.query_tokens[0], 0, passages[1]]]


def write_array(folder: Path, name: str, array: np.ndarray) -> None:
    """Replaces a column by a valid one of any dtype and shape."""
    path = folder / INDEX / f"{name}.npy"
    path.unlink()
    with ColumnWriter(path, array.dtype) as column:
        column.write(array.ravel())
    np.save(path, array)


def change_totals(folder: Path, **changes) -> None:
    path = folder / INDEX / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def object_array(folder: Path) -> None:
    np.save(folder / INDEX / "score.npy", np.array([print] * 9, object), allow_pickle=True)


DAMAGES = {
    "missing": lambda folder: (folder / INDEX / "score.npy").unlink(),
    "empty": lambda folder: (folder / INDEX / "positives.npy").write_bytes(b""),
    "truncated": lambda folder: (folder / INDEX / "passage_hashes.npy").write_bytes(
        (folder / INDEX / "passage_hashes.npy").read_bytes()[:-1]
    ),
    "too long": lambda folder: (folder / INDEX / "score.npy").write_bytes(
        (folder / INDEX / "score.npy").read_bytes() + b"0"
    ),
    "dtype": lambda folder: write_array(folder, "query_tokens", np.ones(9, np.int64)),
    "byte order": lambda folder: write_array(folder, "query_tokens", np.ones(9, ">i4")),
    "shape": lambda folder: write_array(folder, "query_tokens", np.ones((9, 1), np.int32)),
    "size": lambda folder: write_array(folder, "query_tokens", np.ones(8, np.int32)),
    "pickle": object_array,
    "first offset": lambda folder: write_array(folder, "passage_offsets", np.arange(-1, 9)),
    "last offset": lambda folder: write_array(folder, "passage_offsets", np.arange(10) * 100),
    "manifest without totals": lambda folder: (folder / INDEX / MANIFEST).write_text("{}"),
    "manifest is a list": lambda folder: (folder / INDEX / MANIFEST).write_text("[]"),
    "manifest is empty": lambda folder: (folder / INDEX / MANIFEST).write_text(""),
    "number of examples": lambda folder: change_totals(folder, examples=10),
    "negative number": lambda folder: change_totals(folder, examples=-1),
    "huge number": lambda folder: change_totals(folder, passages=10**30),
    "boolean": lambda folder: change_totals(folder, with_negatives=True),
    "text": lambda folder: change_totals(folder, min_score="0"),
    "unknown total": lambda folder: change_totals(folder, other=0),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_index_is_noticed_when_it_is_opened(name, tmp_path):
    folder = write(tmp_path / "data", [make_piece(np.random.default_rng(0), 9)])
    DAMAGES[name](folder)
    with pytest.raises(UserError, match=f"{folder}: the prepared dataset is damaged .*; delete the folder"):
        open_index(folder)


HOSTILE = {
    "negative offset": ("passage_offsets", -7),
    "offset after the end": ("passage_offsets", 2**62),
    "no positives": ("positives", 0),
    "many positives": ("positives", 2**31 - 1),
    "negative negatives": ("negatives", -1),
    "empty query": ("query_tokens", 0),
    "long query": ("query_tokens", 2**31 - 1),
    "negative length": ("passage_tokens", -5),
    "long passage": ("passage_tokens", 41),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_values_are_noticed_when_they_are_used(name, tmp_path):
    field, value = HOSTILE[name]
    folder = write(tmp_path / "data", [make_piece(np.random.default_rng(0), 9)])
    array = np.load(folder / INDEX / f"{field}.npy")
    array[1:-1] = value
    write_array(folder, field, array)
    settings = DataSettings(ir=["a"], ir_global_batch_size=8, query_max_tokens=40, passage_max_tokens=30)
    plan = Plan([Source("a", "ir", open_index(folder))], settings, 0, PaddedLayout(), {"ir": None, "sts": None})
    with pytest.raises(UserError, match=f"{folder}: the prepared dataset is damaged .*; delete the folder"):
        plan.step(0)


@pytest.mark.parametrize("damage", ["template", "name", "link"])
def test_records_outside_of_the_dataset_are_not_read(damage, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"task_type": "ir", "query": ["", "", "q"], "positives": [["", "", "p"]]}\n')
    prepared = prepare(
        path, "ir", PromptTokenizer(tokenizer, PromptSettings()), cache=tmp_path / "cache",
        query_max_tokens=40, passage_max_tokens=24,
    )  # fmt: skip
    (info,) = prepared.folder.rglob("dataset_info.json")
    (records,) = prepared.folder.rglob("*.array_record*")
    records.rename(tmp_path / records.name)
    outside = Path(*[".."] * 6)
    if damage == "link":
        records.symlink_to(tmp_path / records.name)
    else:
        content = json.loads(info.read_text())
        template = content["splits"][0]["filepathTemplate"]
        content |= {"name": f"{outside}/tokenized_texts"} if damage == "name" else {}
        content["splits"][0]["filepathTemplate"] = f"{outside}/{template}" if damage == "template" else template
        info.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged .*(unknown names|not a file).*; delete the folder"):
        prepared.read(np.array([0]))


def test_lack_of_file_handles_is_no_damage(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", [make_piece(np.random.default_rng(0), 9)])

    def fail(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(np, "load", fail)
    with pytest.raises(UserError, match=f"{folder}: the prepared dataset cannot be read: Too many open files"):
        open_index(folder)


def test_classes_named_in_features_are_not_imported(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"task_type": "ir", "query": ["", "", "q"], "positives": [["", "", "p"]]}\n')
    prepared = prepare(
        path, "ir", PromptTokenizer(tokenizer, PromptSettings()), cache=tmp_path / "cache",
        query_max_tokens=40, passage_max_tokens=24,
    )  # fmt: skip
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    [features] = prepared.folder.rglob("features.json")
    features.write_text(features.read_text().replace("tensorflow_datasets.core.features.tensor_feature", "evil"))
    assert "evil.Tensor" in features.read_text()
    with pytest.raises(UserError, match="damaged .*unknown features"):
        prepared.read(np.array([0]))
    assert not (tmp_path / "imported").exists()
