"""Tests prepared datasets."""

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
from codiemb_jax.data.store import Index, PreparedDataset, cache_folder
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import dataset_names, read_records

PROMPT = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
NO_TOKENS = "the tokenizer produces no tokens, expected a text in its vocabulary"
LIMITS = {"query_max_tokens": 40, "passage_max_tokens": 24}
WORDS = ["quick", "brown", "fox", "lazy", "dog", "river", "为什么", "我的", "committee", "weeks", "😀"]


def write_ir(path: Path, count: int = 300) -> Path:
    """Writes `count` lines with 1-3 positives and 0-4 negatives each, with some empty lines in between."""
    rng = random.Random(7)

    def triples(count: int) -> list[list[str]]:
        return [["", "", " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))] for _ in range(count)]

    lines = []
    for number in range(count):
        query = [rng.choice(["", "find it"]), "", f"{number} {triples(1)[0][2]}"]
        positives, negatives = triples(rng.randint(1, 3)), triples(rng.randint(0, 4))
        record = {"task_type": "ir", "query": query, "positives": positives, "negatives": negatives}
        lines.append(json.dumps(record) + rng.choice(["", "\n"]))
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
def prompt_tokenizer(tokenizer) -> PromptTokenizer:
    return PromptTokenizer(tokenizer, PROMPT)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def as_lists(texts) -> list[tuple[list[int], int]]:
    return [(text.ids.tolist(), text.content_start) for text in texts]


def assert_same_tokens(actual, expected) -> None:
    assert as_lists(actual) == as_lists(expected)
    assert {text.ids.dtype for text in actual} == {np.dtype(np.int32)}


@pytest.mark.parametrize("part_tokens", [2**26, 5000])
def test_ir_tokens_and_index_are_in_file_order(tmp_path, prompt_tokenizer, cache, monkeypatch, part_tokens):
    monkeypatch.setattr(module, "PART_TOKENS", part_tokens)
    path = write_ir(tmp_path / "some data.jsonl")
    data = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert (dataset_names([data.path]), data.path, data.task, len(data)) == (["some data"], path, "ir", 300)
    index = data.index
    assert not np.array_equal(index.position, np.arange(300))  # otherwise the test would prove nothing
    assert sorted(index.position) == list(range(300))
    assert len(list(data.folder.glob("0*"))) == (1 if part_tokens > 5000 else 6)
    texts = data.read(np.arange(300))
    for number, record in enumerate(read_records(path, "ir")):
        expected = prompt_tokenizer.tokenize_queries([record.query], 40)
        expected += prompt_tokenizer.tokenize_passages([*record.positives, *record.negatives], 24)
        assert_same_tokens(texts[number], expected)
        assert index.query_tokens[number] == expected[0].ids.size
        assert index.positives[number] == len(record.positives)
        assert index.negatives[number] == len(record.negatives)
        rows = slice(index.passage_offsets[number], index.passage_offsets[number + 1])
        assert index.passage_tokens[rows].tolist() == [tokens.ids.size for tokens in expected[1:]]
        hashes = [triple.hash() for triple in (*record.positives, *record.negatives)]
        assert index.passage_hashes[rows].tolist() == hashes
    assert index.passage_offsets[-1] == index.passage_tokens.size
    assert [value.dtype.name for value in vars(index).values()] == [
        "int64", "float64", "int32", "int32", "int32", "int64", "int32", "uint64",
    ]  # fmt: skip


def test_examples_are_read_in_the_requested_order(tmp_path, prompt_tokenizer, cache):
    data = prepare(write_ir(tmp_path / "a.jsonl", 60), "ir", prompt_tokenizer, cache=cache, **LIMITS)
    expected = data.read(np.arange(60))
    for example, texts in zip([7, 3, 7, 59], data.read(np.array([7, 3, 7, 59])), strict=True):
        assert_same_tokens(texts, expected[example])
    assert data.read(np.array([], np.int64)) == []


def test_sts_pairs_are_stored_as_queries_with_their_score(tmp_path, prompt_tokenizer, cache):
    scores = [0.1 + 0.2, -3.0, 1e15, 5, 0.25]
    data = prepare(write_sts(tmp_path / "a.jsonl", scores), "sts", prompt_tokenizer, cache=cache, **LIMITS)
    assert data.index.score.tolist() == scores
    assert data.scores(np.array([4, 0])).tolist() == [0.25, np.float32(0.1 + 0.2)]
    assert data.scores(np.array([4])).dtype == np.float32
    assert data.index.positives.tolist() == [1] * 5 and data.index.negatives.tolist() == [0] * 5
    for texts, record in zip(data.read(np.arange(5)), read_records(data.path, "sts"), strict=True):
        assert_same_tokens(texts, prompt_tokenizer.tokenize_queries([record.query, *record.positives], 40))


def test_prepared_file_is_not_tokenized_again(tmp_path, prompt_tokenizer, cache, monkeypatch):
    path = write_ir(tmp_path / "a.jsonl")
    first = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)

    def fail(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(PromptTokenizer, "_tokenize", fail)
    second = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert second.folder == first.folder
    assert_same_tokens(second.read(np.array([5]))[0], first.read(np.array([5]))[0])
    for name, value in vars(first.index).items():
        assert np.array_equal(value, getattr(second.index, name))


def test_changed_inputs_create_a_new_dataset(tmp_path, tokenizer, make_tokenizer, cache):
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


def test_invalid_lines_leave_nothing_behind(tmp_path, prompt_tokenizer, cache):
    path = write_ir(tmp_path / "a.jsonl")
    with path.open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: invalid JSON"):
        prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert list(cache.iterdir()) == []


def test_interruption_leaves_nothing_behind(tmp_path, prompt_tokenizer, cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(write_ir(tmp_path / "a.jsonl"), "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert list(cache.iterdir()) == []


def test_texts_without_content_are_reported_by_line_and_field(tmp_path, letter_tokenizer, cache):
    prompt = PromptSettings(query="aa{instruction}aa", passage="b", end="</s>")
    prompt_tokenizer = PromptTokenizer(letter_tokenizer, prompt)
    lines = [
        {"query": ["", "", "a"], "positives": [["", "", "b"]]},
        {"query": ["bb", "", "a"], "positives": [["", "", "b"], ["", "", "?"]], "negatives": [["", "", "!"]]},
        {"query": ["", "", "x"], "positives": [["", "", "b"]]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"task_type": "ir", **line}) for line in lines))
    with pytest.raises(UserError) as caught:
        prepare(path, "ir", prompt_tokenizer, query_max_tokens=7, passage_max_tokens=3, cache=cache)
    assert str(caught.value).splitlines() == [
        "texts without a content token:",
        f"  {path}:3: query: the prompt leaves no room for the text, expected data.query_max_tokens >= 8",
        f"  {path}:5: query: {NO_TOKENS}",
        f"  {path}:3: positives[1]: {NO_TOKENS}",
        f"  {path}:3: negatives[0]: {NO_TOKENS}",
    ]
    assert list(cache.iterdir()) == []


def test_twenty_texts_without_content_and_their_number_are_reported(tmp_path, letter_tokenizer, cache):
    path = write_sts(tmp_path / "a.jsonl", [1.0] * 300)  # "first" and "second" do not contain a or b
    with pytest.raises(UserError) as caught:
        prepare(path, "sts", PromptTokenizer(letter_tokenizer, PromptSettings()), cache=cache, **LIMITS)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[2] == f"  {path}:1: positives[0]: {NO_TOKENS}"
    assert lines[-1].endswith("600 in total")


def test_leftovers_of_killed_processes_are_removed(tmp_path, prompt_tokenizer, cache):
    path = write_ir(tmp_path / "a.jsonl", 3)
    folder = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS).folder
    (folder / "index.npz").unlink()  # now the dataset is incomplete
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = module.socket.gethostname().replace(".", "-")
    names = {
        process: cache / f".{folder.name}.{host}.{process}.abc" for process in (dead.pid, os.getpid(), os.getppid())
    }
    other_host = cache / f".{folder.name}.another-host.{dead.pid}.abc"
    for leftover in (*names.values(), other_host):
        (leftover / "unfinished").mkdir(parents=True)
    data = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert len(data.read(np.arange(3))) == 3
    assert sorted(cache.iterdir()) == sorted([folder, names[os.getppid()], other_host])


def test_prepared_dataset_pickles_as_paths(tmp_path, prompt_tokenizer, cache):
    data = prepare(write_ir(tmp_path / "a.jsonl"), "ir", prompt_tokenizer, cache=cache, **LIMITS)
    expected = data.read(np.arange(9))
    pickled = pickle.dumps(data)  # after it has been opened
    assert len(pickled) < 1000
    unpickled = pickle.loads(pickled)
    assert isinstance(unpickled, PreparedDataset) and unpickled.path == data.path and unpickled.task == "ir"
    for actual_texts, expected_texts in zip(unpickled.read(np.arange(9)), expected, strict=True):
        assert_same_tokens(actual_texts, expected_texts)


def prepare_together(tokenizer: Path, path: Path, cache: Path, barrier, results) -> None:
    """Runs in each of two processes, which start to write only after both have found no dataset."""
    write = module._DatasetWriter.write

    def write_together(self, folder):
        barrier.wait(timeout=120)
        write(self, folder)

    module._DatasetWriter.write = write_together
    prompt_tokenizer = PromptTokenizer(PreTrainedTokenizerFast.from_pretrained(tokenizer), PROMPT)
    data = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    results.put((data.folder.name, [[t.ids.tolist() for t in texts] for texts in data.read(np.arange(60))]))


def test_two_processes_prepare_the_same_file(tmp_path, tokenizer, prompt_tokenizer, cache):
    path = write_ir(tmp_path / "a.jsonl", 60)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    arguments = (tmp_path / "tokenizer", path, cache, barrier, results)
    processes = [spawn.Process(target=prepare_together, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=120), results.get(timeout=120)
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert first == second
    data = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert list(cache.iterdir()) == [data.folder]
    assert first == (data.folder.name, [[t.ids.tolist() for t in texts] for texts in data.read(np.arange(60))])


def test_prepare_prints_nothing(tmp_path, prompt_tokenizer, cache, capfd):
    prepare(write_ir(tmp_path / "a.jsonl"), "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert capfd.readouterr() == ("", "")


def test_unwritable_cache_raises_user_error(tmp_path, prompt_tokenizer):
    (tmp_path / "file").write_text("")
    path = write_ir(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match="set CODIEMB_JAX_CACHE to another folder"):
        prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "file" / "cache", **LIMITS)


def test_cache_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.setenv("CODIEMB_JAX_CACHE", "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.setenv("CODIEMB_JAX_CACHE", "somewhere")
    assert cache_folder() == Path.cwd() / "somewhere"
    monkeypatch.delenv("CODIEMB_JAX_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "codiemb_jax"


def test_cache_folder_without_home_or_on_a_remote_system_raises_user_error(monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match="CODIEMB_JAX_CACHE: remote paths are not supported"):
        cache_folder()
    monkeypatch.delenv("CODIEMB_JAX_CACHE")

    def fail(_: Path) -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", fail)
    with pytest.raises(UserError, match="no home directory for ~; set it to the folder of the cache"):
        cache_folder()


def test_prepare_does_not_import_slow_packages(tmp_path):
    code = (
        "import sys, codiemb_jax.data.prepare\n"
        "assert not {'tensorflow', 'torch', 'jax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
