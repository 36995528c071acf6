import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from codiemb_jax.config import PromptSettings
from codiemb_jax.data import prepare as module
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.store import Index, PreparedDataSet, cache_folder
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import data_set_names, read_records

PROMPT = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
NO_TOKEN = "the tokenizer makes no token of the text, expected a text it knows"
LIMITS = {"query_max_tokens": 40, "passage_max_tokens": 24}
WORDS = ["quick", "brown", "fox", "lazy", "dog", "river", "为什么", "我的", "committee", "weeks", "😀"]


def write_ir(path: Path, count: int = 300) -> Path:
    """`count` lines with 1-3 positives and 0-4 negatives each, and a blank line here and there."""
    letters = random.Random(7)

    def triples(count: int) -> list[list[str]]:
        return [["", "", " ".join(letters.choices(WORDS, k=letters.randint(1, 12)))] for _ in range(count)]

    lines = []
    for number in range(count):
        query = [letters.choice(["", "find it"]), "", f"{number} {triples(1)[0][2]}"]
        positives, negatives = triples(letters.randint(1, 3)), triples(letters.randint(0, 4))
        record = {"task_type": "ir", "query": query, "positives": positives, "negatives": negatives}
        lines.append(json.dumps(record) + letters.choice(["", "\n"]))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_sts(path: Path, scores: list[float]) -> Path:
    lines = [
        {
            "task_type": "sts",
            "query": ["embed", "", f"first {number}"],
            "positives": [["embed", "", f"second {number}"], ["embed", "", "never read"]],
            "negatives": [["embed", "", "never read"]],
            "positive_scores": [score, 0],
        }
        for number, score in enumerate(scores)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def encoder(tokenizer) -> PromptTokenizer:
    return PromptTokenizer(tokenizer, PROMPT)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def assert_same_tokens(got, expected) -> None:
    assert [(t.ids.tolist(), t.content) for t in got] == [(t.ids.tolist(), t.content) for t in expected]
    assert {t.ids.dtype for t in got} == {np.dtype(np.int32)}


@pytest.mark.parametrize("part_tokens", [2**26, 5000])
def test_ir_is_stored_as_encoded_in_file_order(tmp_path, encoder, cache, monkeypatch, part_tokens):
    monkeypatch.setattr(module, "PART_TOKENS", part_tokens)
    path = write_ir(tmp_path / "some data.jsonl")
    data = prepare(path, "ir", encoder, cache=cache, **LIMITS)
    assert (data_set_names([data.path]), data.path, data.task, len(data)) == (["some data"], path, "ir", 300)
    index = data.index
    assert not np.array_equal(index.position, np.arange(300))  # else this test would show nothing
    assert sorted(index.position) == list(range(300))
    assert len(list(data.folder.glob("0*"))) == (1 if part_tokens > 5000 else 6)
    texts = data.read(np.arange(300))
    for number, record in enumerate(read_records(path, "ir")):
        expected = encoder.tokenize_queries([record.query], 40)
        expected += encoder.tokenize_passages([*record.positives, *record.negatives], 24)
        assert_same_tokens(texts[number], expected)
        assert index.query_tokens[number] == expected[0].ids.size
        assert index.positives[number] == len(record.positives)
        assert index.negatives[number] == len(record.negatives)
        own = slice(index.passage_offsets[number], index.passage_offsets[number + 1])
        assert index.passage_tokens[own].tolist() == [tokens.ids.size for tokens in expected[1:]]
    assert index.passage_offsets[-1] == index.passage_tokens.size
    assert [value.dtype.name for value in vars(index).values()] == [
        "int64", "float64", "int32", "int32", "int32", "int64", "int32",
    ]  # fmt: skip


def test_examples_are_read_in_the_order_asked_for(tmp_path, encoder, cache):
    data = prepare(write_ir(tmp_path / "a.jsonl", 60), "ir", encoder, cache=cache, **LIMITS)
    everything = data.read(np.arange(60))
    for example, texts in zip([7, 3, 7, 59], data.read(np.array([7, 3, 7, 59])), strict=True):
        assert_same_tokens(texts, everything[example])
    assert data.read(np.array([], np.int64)) == []


def test_sts_stores_the_pair_as_queries_and_its_score(tmp_path, encoder, cache):
    scores = [0.1 + 0.2, -3.0, 1e15, 5, 0.25]
    data = prepare(write_sts(tmp_path / "a.jsonl", scores), "sts", encoder, cache=cache, **LIMITS)
    assert data.index.score.tolist() == scores
    assert data.scores(np.array([4, 0])).tolist() == [0.25, np.float32(0.1 + 0.2)]
    assert data.scores(np.array([4])).dtype == np.float32
    assert data.index.positives.tolist() == [1] * 5 and data.index.negatives.tolist() == [0] * 5
    for texts, record in zip(data.read(np.arange(5)), read_records(data.path, "sts"), strict=True):
        assert_same_tokens(texts, encoder.tokenize_queries([record.query, *record.positives], 40))


def test_a_prepared_file_is_not_tokenised_again(tmp_path, encoder, cache, monkeypatch):
    path = write_ir(tmp_path / "a.jsonl")
    first = prepare(path, "ir", encoder, cache=cache, **LIMITS)

    def fail(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(PromptTokenizer, "_tokenize", fail)
    second = prepare(path, "ir", encoder, cache=cache, **LIMITS)
    assert second.folder == first.folder
    assert_same_tokens(second.read(np.array([5]))[0], first.read(np.array([5]))[0])
    for name, value in vars(first.index).items():
        assert np.array_equal(value, getattr(second.index, name))


def test_what_the_tokens_depend_on_makes_a_new_data_set(tmp_path, tokenizer, make_tokenizer, cache):
    path = write_ir(tmp_path / "a.jsonl", 3)

    def folder(tokenizer=tokenizer, prompt=PROMPT, **limits):
        return prepare(path, "ir", PromptTokenizer(tokenizer, prompt), cache=cache, **(LIMITS | limits)).folder

    folders = [
        folder(),
        folder(tokenizer=make_tokenizer(390)),
        folder(prompt=PROMPT.model_copy(update={"passage": ""})),
        folder(query_max_tokens=41),
        folder(passage_max_tokens=25),
    ]
    path.write_text(path.read_text().replace("0 ", "9 ", 1))
    folders.append(folder())
    assert len(set(folders)) == 6
    assert sorted(cache.iterdir()) == sorted(folders)


def test_bad_lines_leave_nothing_behind(tmp_path, encoder, cache):
    path = write_ir(tmp_path / "a.jsonl")
    with path.open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: invalid JSON"):
        prepare(path, "ir", encoder, cache=cache, **LIMITS)
    assert list(cache.iterdir()) == []


def test_a_crash_leaves_nothing_behind(tmp_path, encoder, cache, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        prepare(write_ir(tmp_path / "a.jsonl"), "ir", encoder, cache=cache, **LIMITS)
    assert list(cache.iterdir()) == []


def test_texts_without_content_are_listed_by_line_and_field(tmp_path, letter_tokenizer, cache):
    prompt = PromptSettings(query="aa{instruction}aa", passage="b", end="</s>")
    encoder = PromptTokenizer(letter_tokenizer, prompt)
    lines = [
        {"query": ["", "", "a"], "positives": [["", "", "b"]]},
        {"query": ["bb", "", "a"], "positives": [["", "", "b"], ["", "", "?"]], "negatives": [["", "", "!"]]},
        {"query": ["", "", "x"], "positives": [["", "", "b"]]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"task_type": "ir", **line}) for line in lines))
    with pytest.raises(UserError) as caught:
        prepare(path, "ir", encoder, query_max_tokens=7, passage_max_tokens=3, cache=cache)
    assert str(caught.value).splitlines() == [
        "texts without a content token:",
        f"  {path}:3: query: the prompt leaves the text no room, expected data.query_max_tokens >= 8",
        f"  {path}:5: query: {NO_TOKEN}",
        f"  {path}:3: positives[1]: {NO_TOKEN}",
        f"  {path}:3: negatives[0]: {NO_TOKEN}",
    ]
    assert list(cache.iterdir()) == []


def test_twenty_texts_without_content_and_their_number(tmp_path, letter_tokenizer, cache):
    path = write_sts(tmp_path / "a.jsonl", [1.0] * 300)  # "first" and "second" have no letter a or b
    with pytest.raises(UserError) as caught:
        prepare(path, "sts", PromptTokenizer(letter_tokenizer, PromptSettings()), cache=cache, **LIMITS)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[2] == f"  {path}:1: positives[0]: {NO_TOKEN}"
    assert lines[-1].endswith("600 in all")


def test_leftovers_of_killed_processes_are_removed(tmp_path, encoder, cache):
    path = write_ir(tmp_path / "a.jsonl", 3)
    folder = prepare(path, "ir", encoder, cache=cache, **LIMITS).folder
    (folder / "index.npz").unlink()  # now it is half-written
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = module.socket.gethostname().replace(".", "-")
    names = {
        process: cache / f".{folder.name}.{host}.{process}.abc" for process in (dead.pid, os.getpid(), os.getppid())
    }
    elsewhere = cache / f".{folder.name}.another-host.{dead.pid}.abc"
    for leftover in (*names.values(), elsewhere):
        (leftover / "made").mkdir(parents=True)
    data = prepare(path, "ir", encoder, cache=cache, **LIMITS)
    assert len(data.read(np.arange(3))) == 3
    assert sorted(cache.iterdir()) == sorted([folder, names[os.getppid()], elsewhere])


def test_it_pickles_as_paths(tmp_path, encoder, cache):
    data = prepare(write_ir(tmp_path / "a.jsonl"), "ir", encoder, cache=cache, **LIMITS)
    expected = data.read(np.arange(9))
    pickled = pickle.dumps(data)  # after it was opened
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert isinstance(again, PreparedDataSet) and again.path == data.path and again.task == "ir"
    for texts, other in zip(again.read(np.arange(9)), expected, strict=True):
        assert_same_tokens(texts, other)


def prepare_together(tokenizer: Path, path: Path, cache: Path, barrier, results) -> None:
    """One of two processes; both have found no data set before either begins to write."""
    write = module._Preparation.write

    def write_at_once(self, folder):
        barrier.wait(timeout=120)
        write(self, folder)

    module._Preparation.write = write_at_once
    encoder = PromptTokenizer(PreTrainedTokenizerFast.from_pretrained(tokenizer), PROMPT)
    data = prepare(path, "ir", encoder, cache=cache, **LIMITS)
    results.put((data.folder.name, [[t.ids.tolist() for t in texts] for texts in data.read(np.arange(60))]))


def test_two_processes_at_once(tmp_path, tokenizer, encoder, cache):
    path = write_ir(tmp_path / "a.jsonl", 60)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    arguments = (tmp_path / "tokenizer", path, cache, barrier, results)
    processes = [spawn.Process(target=prepare_together, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    one, other = results.get(timeout=120), results.get(timeout=120)
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert one == other
    data = prepare(path, "ir", encoder, cache=cache, **LIMITS)
    assert list(cache.iterdir()) == [data.folder]
    assert one == (data.folder.name, [[t.ids.tolist() for t in texts] for texts in data.read(np.arange(60))])


def test_nothing_is_printed(tmp_path, encoder, cache, capfd):
    prepare(write_ir(tmp_path / "a.jsonl"), "ir", encoder, cache=cache, **LIMITS)
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_written(tmp_path, encoder):
    (tmp_path / "file").write_text("")
    path = write_ir(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match="set CODIEMB_JAX_CACHE to another folder"):
        prepare(path, "ir", encoder, cache=tmp_path / "file" / "cache", **LIMITS)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("CODIEMB_JAX_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "codiemb_jax"


def test_neither_tensorflow_nor_pytorch_is_imported(tmp_path):
    code = (
        "import sys, codiemb_jax.data.prepare\n"
        "assert not {'tensorflow', 'torch', 'jax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
