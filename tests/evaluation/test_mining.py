"""Tests of hard-negative mining against a plain implementation in NumPy, with planted texts, and with invalid input."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.errors import UserError
from codiemb_jax.evaluation import mining
from codiemb_jax.evaluation.mining import MiningSettings, mine, read_corpus
from codiemb_jax.text.records import Triple, read_records


def record(query: str, positives: Sequence[str], negatives: Sequence[str] = (), **others: Any) -> dict[str, Any]:
    return {
        "task_type": "ir",
        "query": ["", "", query],
        "positives": [["", "", text] for text in positives],
        "negatives": [["", "", text] for text in negatives],
    } | others


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class FakeEncoder:
    """Has a vector for each text, and remembers which texts it embedded."""

    def __init__(self, vectors: dict[str, np.ndarray]):
        self.vectors = vectors
        self.passages: list[str] = []

    def encode_queries(self, queries: Sequence[Triple]) -> np.ndarray:
        return self._encode(["query: " + triple.text for triple in queries])

    def encode_passages(self, passages: Sequence[Triple]) -> np.ndarray:
        self.passages += [triple.instance + triple.text for triple in passages]
        return self._encode([triple.instance + triple.text for triple in passages])

    def _encode(self, texts: list[str]) -> np.ndarray:
        return np.array([self.vectors.get(text, exact_vector(text)) for text in texts], np.float32)


def exact_vector(text: str) -> np.ndarray:
    """Returns four values of ±3 and two zeros: its normalization and its cosines are exact, with many ties."""
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))
    vector = np.zeros(6)
    vector[random.choice(6, 4, replace=False)] = random.choice([-3, 3], 4)
    return vector


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def expected_negatives(
    records: Sequence[dict[str, Any]], corpus: Sequence[str] | None, options: MiningSettings
) -> tuple[list[list[str]], int, int]:
    """Returns the negatives of each record, and the numbers of all candidates and of those dropped."""
    texts = corpus
    if texts is None:
        texts = [triple[2] for record in records for name in ("positives", "negatives") for triple in record[name]]
    texts = list(dict.fromkeys(text.strip() for text in texts))
    found, candidates, dropped = [], 0, 0
    for record_ in records:
        query = record_["query"][2]
        positives = {
            triple[2].strip() for other in records if other["query"][2] == query for triple in other["positives"]
        }
        vector = exact_vector("query: " + query)
        positive = min(cosine(vector, exact_vector(text)) for text in positives)
        ranking = sorted(
            (text for text in texts if text not in positives and text != query),
            key=lambda text, vector=vector: -cosine(vector, exact_vector(text)),
        )[options.range_min : options.range_max]
        kept = {triple[2] for triple in record_["negatives"]} if options.keep_negatives else set()
        limits = [np.inf if options.max_score is None else options.max_score]
        if options.margin is not None:
            limits.append(positive - options.margin)
        if options.relative_margin is not None:
            limits.append(positive - abs(positive) * options.relative_margin)
        left = [
            text
            for text in ranking
            if text not in kept and cosine(vector, exact_vector(text)) <= min(limits)
        ]  # fmt: skip
        candidates += len(ranking)
        dropped += len(ranking) - len(left)
        found.append(left[: options.negatives])
    return found, candidates, dropped


NAMES = st.integers(0, 24).map(str)
MARGINS = st.sampled_from([None, -0.25, 0.0, 0.25, 0.5])


@settings(max_examples=80)
@given(
    records=st.lists(
        st.builds(record, NAMES, st.lists(NAMES, min_size=1, max_size=3), st.lists(NAMES, max_size=4)),
        min_size=6,
        max_size=6,
    ),
    corpus=st.none() | st.lists(NAMES.map(lambda text: text + " "), min_size=3, max_size=30),
    negatives=st.integers(1, 4),
    ranks=st.sampled_from([(0, 4), (0, 50), (2, 6), (1, 12)]),
    margins=st.tuples(MARGINS, MARGINS, st.sampled_from([None, 0.0, 0.5])),
    keep_negatives=st.booleans(),
)
def test_matches_plain_implementation(records, corpus, negatives, ranks, margins, keep_negatives):
    options = MiningSettings(
        negatives=negatives, range_min=ranks[0], range_max=ranks[1], margin=margins[0], relative_margin=margins[1],
        max_score=margins[2], keep_negatives=keep_negatives, scores=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary)
        patch.setattr(mining, "VECTORS_PER_BLOCK", 8)
        patch.setattr(mining, "PAIRS_PER_BLOCK", 3)
        files = [write_lines(folder / "b.jsonl", records[:4]), write_lines(folder / "a.jsonl", records[4:])]
        corpus_file = write_lines(folder / "c.jsonl", [{"text": text} for text in corpus]) if corpus else None
        encoder = FakeEncoder({})
        distinct = {text.strip() for text in corpus or ()} or {
            triple[2] for item in records for name in ("positives", "negatives") for triple in item[name]
        }
        if len(distinct) <= options.range_min:
            with pytest.raises(UserError, match="decrease range_min"):
                mine(files, corpus_file, folder / "output.jsonl", options, encoder)
            return
        report = mine(files, corpus_file, folder / "output.jsonl", options, encoder)
        mined = read_lines(folder / "output.jsonl")
        assert len(list(read_records(folder / "output.jsonl", "ir"))) == len(records)
    expected, candidates, dropped = expected_negatives(records, corpus, options)
    for before, after, found in zip(records, mined, expected, strict=True):
        kept = before["negatives"] if keep_negatives else []
        assert after["negatives"] == kept + [["", "", text] for text in found]
        assert {**after, "negatives": 0} == {**before, "negatives": 0} | {
            name: after[name] for name in ("positive_scores", "negative_scores")
        }
        vector = exact_vector("query: " + before["query"][2])
        for texts, scores in (("positives", "positive_scores"), ("negatives", "negative_scores")):
            assert after[scores] == [cosine(vector, exact_vector(triple[2])) for triple in after[texts]]
    assert report.queries == len(records)
    assert report.corpus == len(distinct)
    assert report.candidates == candidates
    assert sum(report.dropped.values()) == dropped
    assert report.negatives == sum(map(len, expected))
    assert report.short == sum(len(found) < negatives for found in expected)
    assert len(encoder.passages) == len(set(encoder.passages)), "a text was embedded twice"


@pytest.fixture
def planted(tmp_path) -> tuple[Path, Path, FakeEncoder]:
    """50 queries among 3,000 texts: a positive at cosine 0.9, a false negative at 0.88, three hard negatives at 0.8."""
    random = np.random.default_rng(7)

    def unit() -> np.ndarray:
        vector = random.standard_normal(64)
        return vector / np.linalg.norm(vector)

    def near(vector: np.ndarray, score: float) -> np.ndarray:
        other = unit()
        other -= (other @ vector) * vector
        return score * vector + np.sqrt(1 - score**2) * other / np.linalg.norm(other)

    vectors, records = {}, []
    for i in range(50):
        vectors[f"query: {i}"] = query = unit()
        planted_scores = {f"positive {i}": 0.9, f"false {i}": 0.88} | {f"hard {i} {j}": 0.8 - j / 100 for j in range(3)}
        vectors |= {name: 5 * near(query, score) for name, score in planted_scores.items()}
        records.append(record(str(i), [f"positive {i}"], ["an old negative"]))
    texts = [name for name in vectors if not name.startswith("query: ")]
    vectors |= {f"other {i}": unit() for i in range(2750)} | {"an old negative": unit()}
    texts += [f"other {i}" for i in range(2750)]
    random.shuffle(texts)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    return write_lines(tmp_path / "data.jsonl", records), corpus, FakeEncoder(vectors)


@pytest.mark.parametrize("filters", [{"margin": 0.05}, {"relative_margin": 0.05}, {"max_score": 0.85}], ids=str)
def test_finds_planted_negatives_and_drops_planted_false_negatives(filters, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "VECTORS_PER_BLOCK", 700)
    data, corpus, encoder = planted
    options = MiningSettings(negatives=3, range_min=0, range_max=20, scores=True, **filters)
    report = mine([data], corpus, tmp_path / "mined.jsonl", options, encoder)
    for i, mined in enumerate(read_lines(tmp_path / "mined.jsonl")):
        assert [triple[2] for triple in mined["negatives"]] == [f"hard {i} {j}" for j in range(3)]
        np.testing.assert_allclose(mined["positive_scores"], [0.9], atol=1e-5)
        np.testing.assert_allclose(mined["negative_scores"], [0.8, 0.79, 0.78], atol=1e-5)
    assert report.dropped == {next(iter(filters)): 50}
    assert (report.corpus, report.candidates, report.negatives, report.short) == (3000, 1000, 150, 0)


def test_range_min_skips_the_nearest_and_without_filters_the_false_negative_is_found(planted, tmp_path):
    data, corpus, encoder = planted
    for range_min, names in ((0, ["false {}", "hard {} 0"]), (2, ["hard {} 1", "hard {} 2"])):
        output = tmp_path / f"{range_min}.jsonl"
        mine([data], corpus, output, MiningSettings(negatives=2, range_min=range_min, range_max=9), encoder)
        for i, mined in enumerate(read_lines(output)):
            assert [triple[2] for triple in mined["negatives"]] == [name.format(i) for name in names]
            assert "positive_scores" not in mined


def test_random_negatives_depend_on_the_seed_and_are_candidates(planted, tmp_path):
    data, corpus, encoder = planted

    def run(name: str, **options: Any) -> list[list[str]]:
        chosen = MiningSettings(range_min=1, range_max=9, **options)
        mine([data], corpus, tmp_path / name, chosen, encoder)
        return [[triple[2] for triple in mined["negatives"]] for mined in read_lines(tmp_path / name)]

    everything = run("all.jsonl", negatives=8)
    first, again = (run(name, negatives=4, sampling="random", seed=3) for name in ("1.jsonl", "2.jsonl"))
    other = run("3.jsonl", negatives=4, sampling="random", seed=4)
    assert first == again != other
    counts = np.zeros(8)
    for chosen, candidates in zip(first, everything, strict=True):
        ranks = [candidates.index(text) for text in chosen]
        assert ranks == sorted(set(ranks))
        counts[ranks] += 1
    assert counts.sum() == 200
    assert counts.min() > 10  # 25 expected


def test_positives_and_the_query_are_never_negatives(tmp_path):
    texts = ["what is it?", "Title body", "Titlebody", "  one\t", "one", "One", "two", "other"]
    records = [
        record("what is it?", ["one", "one"], ["old"]) | {"positives": [["", "", " one "], ["x", "Title", "body"]]},
        record("what is it?", ["two"]),
    ]
    data = write_lines(tmp_path / "data.jsonl", records)
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"_id": "d", "text": text, "meta": [1]} for text in texts])
    mine([data], corpus, tmp_path / "o.jsonl", MiningSettings(range_min=0), FakeEncoder({}))
    for mined in read_lines(tmp_path / "o.jsonl"):
        assert {triple[2] for triple in mined["negatives"]} == {"One", "other"}


def test_titles_and_instance_instructions_are_part_of_the_text(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("q", ["p"], ["n"])])
    lines = [{"title": "A title", "text": "a text"}, {"title": None, "text": "plain"}, {"title": "only", "text": ""}]
    corpus = write_lines(tmp_path / "corpus.jsonl", lines)
    mine([data], corpus, tmp_path / "o.jsonl", MiningSettings(range_min=0), FakeEncoder({}))
    (mined,) = read_lines(tmp_path / "o.jsonl")
    assert {triple[2] for triple in mined["negatives"]} == {"A title a text", "plain", "only"}

    data = write_lines(tmp_path / "instances.jsonl", [record("q", ["p"]) | {"negatives": [["task", " in: ", "n"]]}])
    mine([data], None, tmp_path / "o2.jsonl", MiningSettings(range_min=0), FakeEncoder({}))
    (mined,) = read_lines(tmp_path / "o2.jsonl")
    assert mined["negatives"] == [["", "in", "n"]]


def test_other_keys_are_kept_and_scores_of_other_negatives_are_not(tmp_path):
    meta = {"id": 7, "name": "\ud800", "nested": [1.5, None, "文"]}
    records = [
        record("1", ["a"], ["b", "c"], positive_scores=[0.9], negative_scores=[0.1, 0.2], meta_data=meta),
        record("2", ["d"], ["e"]),
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)) + "\n\n \n", encoding="utf-8")
    for keep in (False, True):
        output = tmp_path / f"{keep}.jsonl"
        mine([data], None, output, MiningSettings(range_min=0, keep_negatives=keep), FakeEncoder({}))
        first, second = read_lines(output)
        assert first | {"negatives": 0} == records[0] | {"negatives": 0, "negative_scores": []}
        assert list(first) == list(records[0])
        assert list(second) == list(records[1])
        assert sorted(triple[2] for triple in first["negatives"]) == ["b", "c", "d", "e"]
        assert list(read_records(output, "ir"))


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_byte_order_mark_of_a_corpus_is_left_out(name, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("q", ["one"])])
    lines = ["one", "two"] if name == "c.txt" else ['{"text": "one"}', '{"text": "two"}']
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8-sig")
    mine([data], tmp_path / name, tmp_path / "o.jsonl", MiningSettings(range_min=0), FakeEncoder({}))
    (mined,) = read_lines(tmp_path / "o.jsonl")
    assert [triple[2] for triple in mined["negatives"]] == ["two"]


def test_range_max_may_be_larger_than_any_corpus(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("q", ["one"])])
    (tmp_path / "c.txt").write_text("two\nthree\n")
    options = MiningSettings(range_min=0, range_max=10**12)
    report = mine([data], tmp_path / "c.txt", tmp_path / "o.jsonl", options, FakeEncoder({}))
    assert (report.corpus, report.negatives) == (2, 2)


BAD_LINES = {
    b'{"text": 1}': "corpus.jsonl:2: text: missing or not a string",
    b'{"title": "x"}': "corpus.jsonl:2: text: missing or not a string",
    b'["text"]': "corpus.jsonl:2: text: missing or not a string",
    b'{"text": "x", "title": 3}': "corpus.jsonl:2: title: expected a string",
    b'{"text": " : "}': "corpus.jsonl:2: empty text",
    b'{"text": "\\ud800"}': "corpus.jsonl:2: text: unpaired surrogate",
    b'{"text": "\xff"}': "corpus.jsonl:2: byte 11: not valid UTF-8",
    b"text": "corpus.jsonl:2: invalid JSON",
    b"[" * 100_000: "corpus.jsonl:2: invalid JSON",
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "corpus.jsonl:2: invalid JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_invalid_corpus_raises_user_error_and_leaves_nothing(line, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("q", ["p"])])
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=BAD_LINES[line]):
        mine([data], corpus, tmp_path / "o.jsonl", MiningSettings(range_min=0), FakeEncoder({}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl", "data.jsonl"]


@settings(max_examples=200)
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()))
def test_any_corpus_is_read_or_raises_user_error(content):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("c.txt", "c.jsonl"):
            (Path(folder) / name).write_bytes(content)
            try:
                texts = list(read_corpus(Path(folder) / name))
            except UserError:
                continue
            assert texts
            assert all(text.triple.text.strip() and text.triple.text.encode() for text in texts)


def test_corpus_that_is_no_file_raises_user_error(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "other.csv").write_text("text\n")
    for name, message in {
        "pipe.txt": "is not a file",
        "folder.jsonl": "is not a file",
        "absent.txt": "cannot be read: No such file",
        "empty.txt": "contains no texts",
        "other.csv": "expected a .txt file",
    }.items():
        with pytest.raises(UserError, match=f"--corpus .*{name}: {message}"):
            list(read_corpus(tmp_path / name))


def test_ranks_that_leave_too_few_candidates_raise_user_error():
    with pytest.raises(UserError, match="range_min 50: must be less than range_max, 50"):
        MiningSettings(range_min=50)
    with pytest.raises(UserError, match="negatives 5: ranks 8 to 11 are only 4 candidates"):
        MiningSettings(negatives=5, range_min=7, range_max=11)


def test_invalid_records_and_embeddings_leave_nothing(tmp_path):
    data = write_lines(
        tmp_path / "data.jsonl", [record("q", ["p"], ["n"]), {"task_type": "ir", "query": ["", "", "q"]}]
    )
    with pytest.raises(UserError, match="data.jsonl:2: positives: missing"):
        mine([data], None, tmp_path / "o.jsonl", MiningSettings(range_min=0), FakeEncoder({}))
    write_lines(data, [record("q", ["p"], ["n"])])
    encoder = FakeEncoder({"n": np.array([np.nan] * 6)})
    with pytest.raises(UserError, match="NaN or infinite"):
        mine([data], None, tmp_path / "o.jsonl", MiningSettings(range_min=0), encoder)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_existing_output_is_not_replaced(tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("q", ["p"], ["n"])])
    output = tmp_path / "o.jsonl"

    class Slow(FakeEncoder):
        def encode_passages(self, passages: Sequence[Triple]) -> np.ndarray:
            output.write_text("of another program")
            return super().encode_passages(passages)

    for encoder in (Slow({}), FakeEncoder({})):  # the first finds it when it is done, the second at the start
        with pytest.raises(UserError, match=r"o.jsonl: already exists"):
            mine([data], None, output, MiningSettings(range_min=0), encoder)
        assert output.read_text() == "of another program"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "o.jsonl"]


@pytest.mark.parametrize("change", ["extended", "removed"])
def test_data_that_changes_meanwhile_raises_user_error(change, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", [record("q", ["p"], ["n"])])

    class Slow(FakeEncoder):
        def encode_passages(self, passages: Sequence[Triple]) -> np.ndarray:
            data.unlink()
            if change == "extended":
                write_lines(data, [record("q", ["p"], ["n"]), record("r", ["s"])])
            return super().encode_passages(passages)

    with pytest.raises(UserError, match="data.jsonl: has changed while negatives were mined"):
        mine([data], None, tmp_path / "o.jsonl", MiningSettings(range_min=0), Slow({}))
    assert not (tmp_path / "o.jsonl").exists()
    assert len(list(tmp_path.iterdir())) == (change == "extended")
