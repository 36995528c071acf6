"""Tests parsing and validation of data files."""

import hashlib
import json
import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codiemb_jax.errors import UserError
from codiemb_jax.text.records import Record, Triple, read_records

FEW_EXAMPLES = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def ir_line(**changes: object) -> dict[str, object]:
    line: dict[str, object] = {
        "task_type": "ir",
        "query": ["find", "", "q"],
        "positives": [["", "", "p0"], ["", "", "p1"]],
        "negatives": [["", "", "n0"]],
        "positive_scores": [],
        "negative_scores": [],
    }
    return line | changes


def sts_line(**changes: object) -> dict[str, object]:
    line: dict[str, object] = {
        "task_type": "sts",
        "query": ["embed", "", "a"],
        "positives": [["embed", "", "b"]],
        "negatives": [],
        "positive_scores": [0.25],
        "negative_scores": [],
    }
    return line | changes


def write(folder: Path, *lines: object) -> Path:
    """Writes strings and bytes as they are and everything else as JSON."""
    path = folder / "data.jsonl"
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def problems(path: Path, task: str) -> list[str]:
    """Returns the problems that read_records reports, without `FILE:`."""
    with pytest.raises(UserError) as caught:
        list(read_records(path, task))
    return [line.strip().removeprefix(f"{path}:") for line in str(caught.value).splitlines()[1:]]


def test_byte_order_mark_is_left_out(tmp_path):
    expected = list(read_records(write(tmp_path, ir_line(), ir_line()), "ir"))
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(ir_line()).encode(), ir_line())
    assert list(read_records(path, "ir")) == expected
    path = write(tmp_path, b'\xef\xbb\xbf{"task_type": "\xff"}')
    assert problems(path, "ir") == ["1: byte 19: not valid UTF-8, expected UTF-8 text"]


def test_ir_line(tmp_path):
    assert list(read_records(write(tmp_path, ir_line()), "ir")) == [
        Record(
            1,
            Triple("find", "", "q"),
            (Triple("", "", "p0"), Triple("", "", "p1")),
            (Triple("", "", "n0"),),
            None,
        )
    ]


def test_sts_line_is_reduced_to_the_pair(tmp_path):
    line = sts_line(
        positives=[["embed", "", "b"], ["embed", "", "c"]],
        positive_scores=[0.1 + 0.2, 1],
        negatives=[["embed", "", "d"]],
    )
    assert list(read_records(write(tmp_path, line), "sts")) == [
        Record(1, Triple("embed", "", "a"), (Triple("embed", "", "b"),), (), 0.1 + 0.2)
    ]


def test_tabs_newlines_spaces_and_colons_are_stripped(tmp_path):
    path = write(tmp_path, ir_line(query=["\t task: \n", ": when :\t", " \n:how: to\t: go:::"]))
    assert next(read_records(path, "ir")).query == Triple("task", "when", "how: to\t: go")


@FEW_EXAMPLES
@given(parts=st.lists(st.text(st.sampled_from("\t\n :ab\r\u3000é😀"), max_size=8), min_size=3, max_size=3))
def test_only_outer_characters_are_stripped(tmp_path, parts):
    parts = [*parts[:2], parts[2] + "x"]
    query = next(read_records(write(tmp_path, ir_line(query=parts)), "ir")).query
    for before, after in zip(parts, query, strict=True):
        start, stop = before.find(after), before.find(after) + len(after)
        assert set(before[:start] + before[stop:]) <= set("\t\n :")
        assert not after or not {after[0], after[-1]} & set("\t\n :")


def test_missing_optional_keys_and_empty_lines_are_allowed(tmp_path):
    line = {"task_type": "ir", "query": ["", "", "q"], "positives": [["", "", "p"]]}
    path = write(tmp_path, "", line, "  \t", line)
    assert [record.line for record in read_records(path, "ir")] == [2, 4]
    assert next(read_records(path, "ir")).negatives == ()


@pytest.mark.parametrize("value", [None, {"id": 3}, [1, "a"]])
def test_meta_data_is_ignored(tmp_path, value):
    (record,) = read_records(write(tmp_path, ir_line(meta_data=value)), "ir")
    assert [record] == list(read_records(write(tmp_path, ir_line()), "ir"))


def test_only_newlines_separate_lines(tmp_path):
    line = json.dumps(ir_line(query=["", "", "a\u2028b\x85c"]), ensure_ascii=False)
    assert next(read_records(write(tmp_path, line + "\r"), "ir")).query.text == "a\u2028b\x85c"


THREE_STRINGS = "a list of three strings [task instruction, instance instruction, text]"
TRIPLE = f"expected {THREE_STRINGS}"
EMPTY_TEXT = "empty text, expected a text as the third string"
FINITE = "expected a finite number between -1e15 and 1e15"
ONE_EACH = "expected one score for each, or none"
MISPLACED = (
    "task_type: '{0}' in {1} data, expected '{1}'; if all of the file is {0} data, move it from data.{1} to data.{0}"
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"task_type": "\xff"}', "byte 16: not valid UTF-8, expected UTF-8 text"),
        ("[1, 2]", "found a list of length 2, expected one JSON object per line"),
        (
            ir_line(score=[1]),
            "score: unknown key, expected one of task_type, query, positives, negatives, "
            "positive_scores, negative_scores, meta_data",
        ),
        ({"task_type": "ir", "positives": [["", "", "p"]]}, "query: missing"),
        ({"query": ["", "", "q"], "positives": [["", "", "p"]]}, "task_type: missing"),
        ({"task_type": "ir", "query": ["", "", "q"]}, "positives: missing"),
        (sts_line(), MISPLACED.format("sts", "ir")),
        (ir_line(task_type="rerank"), "task_type: \"rerank\", expected 'ir'"),
        (ir_line(task_type=None), "task_type: null, expected 'ir'"),
        (ir_line(query="q"), f'query: "q", {TRIPLE}'),
        (ir_line(query=["", "q"]), f"query: a list of length 2, {TRIPLE}"),
        (ir_line(positives=[["", "", 3]]), f"positives[0]: a list of length 3, {TRIPLE}"),
        (ir_line(positives={}), f"positives: an object, expected a list of items that are each {THREE_STRINGS}"),
        (ir_line(positives=None), f"positives: null, expected a list of items that are each {THREE_STRINGS}"),
        (ir_line(positives=[]), "positives: empty, expected at least one positive"),
        (ir_line(query=["t", "instance", " :\n"]), f"query: {EMPTY_TEXT}"),
        (ir_line(query=["t", "instance", "\u3000\xa0"]), f"query: {EMPTY_TEXT}"),
        (ir_line(negatives=[["", "", ""]]), f"negatives[0]: {EMPTY_TEXT}"),
        (
            ir_line(query=["", "", "\ud800"]),
            "query: unpaired surrogate (\\ud800 to \\udfff), expected valid Unicode",
        ),
        (ir_line(positive_scores=[1, True]), f"positive_scores[1]: true, {FINITE}"),
        (ir_line(positive_scores=["1", 2]), f'positive_scores[0]: "1", {FINITE}'),
        (ir_line(positive_scores=[1, math.nan]), f"positive_scores[1]: NaN, {FINITE}"),
        (ir_line(negative_scores=[math.inf]), f"negative_scores[0]: Infinity, {FINITE}"),
        (ir_line(negative_scores=[10**400]), f"negative_scores[0]: a huge number, {FINITE}"),
        (ir_line(positive_scores=[1]), f"positive_scores: 1 scores for 2 positives, {ONE_EACH}"),
        (ir_line(negative_scores=[1, 2]), f"negative_scores: 2 scores for 1 negatives, {ONE_EACH}"),
        (
            '{"task_type": "ir", "task_type": "ir", "query": ["", "", "q"], "positives": [["", "", "p"]]}',
            "task_type: duplicate key, expected each key once",
        ),
    ],
)
def test_invalid_ir_line_raises_user_error(tmp_path, line, expected):
    assert problems(write(tmp_path, line), "ir") == [f"1: {expected}"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (sts_line(positive_scores=[]), "positive_scores: empty, expected the score of the pair"),
        (sts_line(negatives=[3]), f"negatives[0]: 3, {TRIPLE}"),
        (ir_line(positive_scores=[1, 2]), MISPLACED.format("ir", "sts")),
    ],
)
def test_invalid_sts_line_raises_user_error(tmp_path, line, expected):
    assert problems(write(tmp_path, line), "sts") == [f"1: {expected}"]


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"a": ' + "1" * 5000 + "}", "nonsense"])
def test_invalid_json_raises_user_error(tmp_path, line):
    (problem,) = problems(write(tmp_path, ir_line(), line), "ir")
    assert problem.startswith("2: invalid JSON (") and problem.endswith("expected one JSON object per line")


def test_all_problems_of_a_line_are_reported(tmp_path):
    line = ir_line(query=["", ""], positives=[["", "", ""], 4], extra=1)
    assert [problem.split(": ")[1] for problem in problems(write(tmp_path, line), "ir")] == [
        "extra",
        "query",
        "positives[0]",
        "positives[1]",
    ]


def test_twenty_problems_and_their_number_are_reported(tmp_path):
    lines = problems(write(tmp_path, *["{}"] * 30), "ir")
    assert lines[0] == "1: task_type: missing"
    assert len(lines) == 21
    assert lines[-1].endswith("90 in total")


def test_records_before_the_first_problem_are_yielded(tmp_path):
    reader = read_records(write(tmp_path, ir_line(), "{", ir_line()), "ir")
    assert next(reader).line == 1
    with pytest.raises(UserError):
        next(reader)


def test_empty_file_raises_user_error(tmp_path):
    with pytest.raises(UserError, match=r"data\.jsonl: the file is empty"):
        list(read_records(write(tmp_path, "", " "), "ir"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\udc00"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(list(ir_line()))


@FEW_EXAMPLES
@given(
    line=st.binary(max_size=30)
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(FIELDS, JSON_VALUES, min_size=1).map(lambda changes: json.dumps(ir_line(**changes)).encode()),
    task=st.sampled_from(["ir", "sts"]),
)
def test_every_line_gives_a_record_or_raises_user_error(tmp_path, line, task):
    path = tmp_path / "data.jsonl"
    path.write_bytes(line)
    try:
        for record in read_records(path, task):
            "".join(part for triple in (record.query, *record.positives) for part in triple).encode()
            assert record.query.text and all(triple.text for triple in record.positives)
    except UserError as error:
        str(error).encode()


def test_hashes_differ_unless_all_parts_are_equal():
    triples = [
        Triple("", "", "ab"),
        Triple("", "a", "b"),
        Triple("a", "", "b"),
        Triple("a", "b", ""),
        Triple("", "", "a"),
    ]
    assert len({triple.hash() for triple in triples}) == len(triples)
    assert Triple("", "", "ab").hash() == int.from_bytes(hashlib.blake2b(b"0 0 ab", digest_size=8).digest(), "little")


NOT_LINES = {
    "array": (json.dumps([ir_line()]).encode(), "not JSON Lines; write each example as one object"),
    "indented array": (json.dumps([ir_line()], indent=2).encode(), "not JSON Lines"),
    "byte-order mark": (b"\xef\xbb\xbf[" + json.dumps(ir_line()).encode() + b"]", "not JSON Lines"),
    "indented object": (json.dumps(ir_line(), indent=2).encode(), "not JSON Lines"),
    "UTF-16": (json.dumps(ir_line()).encode("utf-16"), "UTF-16; convert it to UTF-8"),
}


@pytest.mark.parametrize("name", NOT_LINES)
def test_file_in_another_format_is_recognized(name, tmp_path):
    content, problem = NOT_LINES[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"^invalid ir data \(the file is {problem}.*\):\n  .*a.jsonl:1: "):
        list(read_records(tmp_path / "a.jsonl", "ir"))


@pytest.mark.parametrize("content", [b"{", b"{\n", b'{"a": 1}', b'{"query":\n'])
def test_invalid_lines_are_not_taken_for_another_format(content, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="^invalid ir data:\n"):
        list(read_records(tmp_path / "a.jsonl", "ir"))
