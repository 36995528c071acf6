"""Tests prepared datasets."""

import fcntl
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

from codiemb_jax.cache import cache_folder, remote_cache
from codiemb_jax.config import PromptSettings
from codiemb_jax.data import prepare as module
from codiemb_jax.data import tokenize
from codiemb_jax.data.find import dataset_names
from codiemb_jax.data.index import DTYPES, IndexWriter, Totals
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.store import PreparedDataset, open_parts
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import PromptTokenizer, Tokens
from codiemb_jax.text.records import read_records
from tests.helpers import in_memory

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


def read(data: PreparedDataset, examples: Sequence[int]) -> list[list[Tokens]]:
    """Reads the texts of each example."""
    texts, queries = data.read(np.array(examples, np.int64))
    return np.split(np.fromiter(texts.split(), object, len(texts.lengths)), queries)[1:]


def as_lists(texts) -> list[tuple[list[int], int]]:
    return [(text.ids.tolist(), text.content_start) for text in texts]


def rows_on_disk(data: PreparedDataset) -> list[list[int]]:
    """Returns the tokens of all rows in the order in which TensorFlow Datasets has them."""
    return [row["tokens"].tolist() for row in open_parts(data.folder)]


def assert_same_tokens(actual, expected) -> None:
    assert as_lists(actual) == as_lists(expected)
    assert {text.ids.dtype for text in actual} == {np.dtype(np.int32)}


@pytest.mark.parametrize("part_tokens", [2**26, 5000])
def test_ir_tokens_and_index_are_in_file_order(tmp_path, prompt_tokenizer, cache, monkeypatch, part_tokens):
    monkeypatch.setattr(tokenize, "PART_TOKENS", part_tokens)
    path = write_ir(tmp_path / "some data.jsonl")
    data = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert (dataset_names([data.path]), data.path, data.task, len(data)) == (["some data"], path, "ir", 300)
    index = in_memory(data.index)
    assert len(list(data.folder.glob("0*"))) == (1 if part_tokens > 5000 else 6)
    texts = read(data, range(300))
    assert rows_on_disk(data) == [[token for text in example for token in text.ids] for example in texts]
    for number, record in enumerate(read_records(path, "ir")):
        expected = prompt_tokenizer.tokenize_queries([record.query], 40)
        expected += prompt_tokenizer.tokenize_passages([*record.positives, *record.negatives], 24)
        assert_same_tokens(texts[number], expected)
        assert index.query_tokens[number] == expected[0].ids.size
        assert index.positives[number] == len(record.positives)
        assert index.negatives[number] == len(record.negatives)
        rows = slice(index.passage_offsets[number], index.passage_offsets[number + 1])
        assert index.passage_tokens[rows].tolist() == [tokens.ids.size for tokens in expected[1:]]
        hashes = [triple._replace(task="").hash() for triple in (*record.positives, *record.negatives)]
        assert index.passage_hashes[rows].tolist() == hashes
    assert index.passage_offsets[-1] == index.passage_tokens.size
    assert {name: getattr(index, name).dtype for name in DTYPES} == DTYPES
    assert data.totals == Totals(
        examples=300,
        passages=index.passage_tokens.size,
        tokens=sum(text.ids.size for example in texts for text in example),
        longest=max(text.ids.size for example in texts for text in example),
        with_negatives=int((index.negatives > 0).sum()),
        full=int((index.query_tokens == 40).sum() + (index.passage_tokens == 24).sum()),
        min_score=0.0,
        max_score=0.0,
    )
    assert data.totals.full > 0


def test_examples_are_read_in_the_requested_order(tmp_path, prompt_tokenizer, cache):
    data = prepare(write_ir(tmp_path / "a.jsonl", 60), "ir", prompt_tokenizer, cache=cache, **LIMITS)
    expected = read(data, range(60))
    for example, texts in zip([7, 3, 7, 59], read(data, [7, 3, 7, 59]), strict=True):
        assert_same_tokens(texts, expected[example])
    assert read(data, []) == []


def test_sts_pairs_are_stored_as_queries_with_their_score(tmp_path, prompt_tokenizer, cache):
    scores = [0.1 + 0.2, -3.0, 1e15, 5, 0.25]
    data = prepare(write_sts(tmp_path / "a.jsonl", scores), "sts", prompt_tokenizer, cache=cache, **LIMITS)
    index = in_memory(data.index)
    assert index.score.tolist() == scores
    assert data.scores(np.array([4, 0])).tolist() == [0.25, np.float32(0.1 + 0.2)]
    assert data.scores(np.array([4])).dtype == np.float32
    assert index.positives.tolist() == [1] * 5 and index.negatives.tolist() == [0] * 5
    for texts, record in zip(read(data, range(5)), read_records(data.path, "sts"), strict=True):
        assert_same_tokens(texts, prompt_tokenizer.tokenize_queries([record.query, *record.positives], 40))


@pytest.mark.parametrize(("query_max_tokens", "passage_max_tokens"), [(22, 60), (60, 22), (22, 22)])
def test_both_texts_of_a_pair_have_the_limit_of_queries(
    query_max_tokens, passage_max_tokens, tmp_path, prompt_tokenizer, cache
):
    limits = {"query_max_tokens": query_max_tokens, "passage_max_tokens": passage_max_tokens}
    path = write_sts(tmp_path / "a.jsonl", [0.5] * 8)
    data = prepare(path, "sts", prompt_tokenizer, cache=cache, **limits)
    texts = [
        prompt_tokenizer.tokenize_queries([triple], 1000)[0].ids.size
        for record in read_records(path, "sts")
        for triple in (record.query, *record.positives)
    ]
    assert (min(texts), max(texts)) == (21, 22)
    assert data.totals.full == (8 if query_max_tokens == 22 else 0)


def test_prepared_file_is_not_tokenized_again(tmp_path, prompt_tokenizer, cache, monkeypatch):
    path = write_ir(tmp_path / "a.jsonl")
    first = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)

    def fail(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(PromptTokenizer, "_tokenize_after", fail)
    second = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert second.folder == first.folder
    assert_same_tokens(read(second, [5])[0], read(first, [5])[0])
    assert first.totals == second.totals
    for name in DTYPES:
        assert np.array_equal(getattr(in_memory(first.index), name), getattr(in_memory(second.index), name))


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


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Makes `prepare` tokenize even small files in several processes."""
    for name, value in {"PROCESS_BYTES": 4000, "MIN_PART_BYTES": 3000}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "available_processors", lambda: 2)


def test_processes_write_the_same_dataset(tmp_path, prompt_tokenizer, cache, small_parts, monkeypatch):
    path = write_ir(tmp_path / "a.jsonl")
    parallel = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert len(list(parallel.folder.glob("0*"))) > 10
    assert multiprocessing.active_children() == []
    monkeypatch.setattr(module, "PROCESS_BYTES", 2**40)
    monkeypatch.setattr(module, "MIN_PART_BYTES", 2**22)
    data = prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "other", **LIMITS)
    assert len(list(data.folder.glob("0*"))) == 1
    assert rows_on_disk(parallel) == rows_on_disk(data)
    for actual, expected in zip(read(parallel, range(300)), read(data, range(300)), strict=True):
        assert_same_tokens(actual, expected)
    assert parallel.totals == data.totals
    for name in DTYPES:
        assert np.array_equal(getattr(in_memory(parallel.index), name), getattr(in_memory(data.index), name))


def test_processes_list_all_problems_in_order(tmp_path, prompt_tokenizer, cache, small_parts):
    path = write_ir(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    broken = [10, 11, len(lines) // 2, len(lines) - 1]
    for number in broken:
        lines[number] = "{"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    head, *problems = str(caught.value).splitlines()
    assert head == "invalid ir data:"
    assert [problem.split(": ")[0] for problem in problems] == [f"  {path}:{number + 1}" for number in broken]
    assert list(cache.iterdir()) == [] and multiprocessing.active_children() == []


class BrokenTokenizer:
    """Stands in for `PromptTokenizer` and fails in the process that uses it."""

    fingerprint = "none"

    def __init__(self, failure: str, folder: Path):
        self.failure, self.folder = failure, folder

    def tokenize_queries(self, triples, max_tokens):
        if self.failure == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.failure == "slow":
            with (self.folder / f"{os.getpid()}.lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until this process ends
                time.sleep(300)
        raise {"full disk": OSError(28, "No space left on device"), "bug": ZeroDivisionError("bug")}[self.failure]


def count_running(folder: Path) -> int:
    """Returns the number of processes that tokenize with a slow `BrokenTokenizer`."""
    count = 0
    for path in folder.glob("*.lock"):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                count += 1
    return count


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240  # processes start slowly on a busy machine
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_file_in_place_of_a_dataset_is_named(kind, tmp_path, prompt_tokenizer, cache):
    path = write_ir(tmp_path / "a.jsonl", 3)
    folder = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS).folder
    folder.rename(tmp_path / "moved")
    folder.write_text("mine") if kind == "file" else folder.symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match=f"{folder}: is not a folder; move it away"):
        prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert [child.name for child in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("killed", UserError, "a.jsonl: a process that tokenizes it ended, perhaps because memory ran out"),
        ("full disk", UserError, "a.jsonl: cannot be prepared in the cache .*: .* No space left on device"),
        ("bug", ZeroDivisionError, "bug"),
    ],
)
def test_failing_process_leaves_nothing_behind(failure, error, message, tmp_path, cache, small_parts):
    path = write_ir(tmp_path / "a.jsonl")
    with pytest.raises(error, match=message):
        prepare(path, "ir", BrokenTokenizer(failure, tmp_path), cache=cache, **LIMITS)
    assert list(cache.iterdir()) == [] and multiprocessing.active_children() == []


def test_interruption_ends_processes_and_leaves_nothing_behind(tmp_path, cache, small_parts):
    path = write_ir(tmp_path / "a.jsonl")

    def interrupt():
        wait_until(lambda: count_running(tmp_path) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        prepare(path, "ir", BrokenTokenizer("slow", tmp_path), cache=cache, **LIMITS)
    assert list(cache.iterdir()) == [] and multiprocessing.active_children() == []
    assert count_running(tmp_path) == 0 and len(list(tmp_path.glob("*.lock"))) == 2


def prepare_slowly(path: Path, cache: Path) -> None:
    """Runs in a process that will be killed."""
    module.PROCESS_BYTES, module.MIN_PART_BYTES, module.available_processors = 4000, 3000, lambda: 2
    prepare(path, "ir", BrokenTokenizer("slow", path.parent), cache=cache, **LIMITS)


def test_processes_end_when_the_main_process_is_killed(tmp_path, cache):
    path = write_ir(tmp_path / "a.jsonl")
    process = multiprocessing.get_context("spawn").Process(target=prepare_slowly, args=(path, cache))
    process.start()
    wait_until(lambda: count_running(tmp_path) == 2)
    process.kill()
    process.join()
    wait_until(lambda: count_running(tmp_path) == 0)


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

    monkeypatch.setattr(IndexWriter, "finish", interrupt)
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
    (folder / "index" / "manifest.json").unlink()  # now the dataset is incomplete
    prefix = f".{folder.name}.{module.socket.gethostname().replace('.', '-')}."
    leftover, in_use, unknown = (cache / f"{prefix}{name}" for name in ("left", "used", "without-lock"))
    other_host, other_dataset = cache / f".{folder.name}.another-host.left", cache / f".other{prefix}left"
    for path_left in (leftover, in_use, unknown, other_host, other_dataset):
        (path_left / "unfinished").mkdir(parents=True)
        if path_left != unknown:
            (path_left / "lock").touch()
    with FileLock(in_use / "lock"):
        data = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert len(read(data, range(3))) == 3
    assert sorted(cache.iterdir()) == sorted([folder, in_use, unknown, other_host, other_dataset])


def test_prepared_dataset_pickles_as_paths(tmp_path, prompt_tokenizer, cache):
    data = prepare(write_ir(tmp_path / "a.jsonl"), "ir", prompt_tokenizer, cache=cache, **LIMITS)
    expected = read(data, range(9))
    pickled = pickle.dumps(data)  # after it has been opened
    assert len(pickled) < 1000
    unpickled = pickle.loads(pickled)
    assert isinstance(unpickled, PreparedDataset) and unpickled.path == data.path and unpickled.task == "ir"
    for actual_texts, expected_texts in zip(read(unpickled, range(9)), expected, strict=True):
        assert_same_tokens(actual_texts, expected_texts)


def prepare_together(tokenizer: Path, path: Path, cache: Path, barrier, results) -> None:
    """Runs in each of two processes, which start to write only after both have found no dataset."""
    write = module.write_dataset

    def write_together(file, folder, beam_runner):
        barrier.wait(timeout=120)
        write(file, folder, beam_runner)

    module.write_dataset = write_together
    prompt_tokenizer = PromptTokenizer(PreTrainedTokenizerFast.from_pretrained(tokenizer), PROMPT)
    data = prepare(path, "ir", prompt_tokenizer, cache=cache, **LIMITS)
    results.put((data.folder.name, [[t.ids.tolist() for t in texts] for texts in read(data, range(60))]))


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
    assert first == (data.folder.name, [[t.ids.tolist() for t in texts] for texts in read(data, range(60))])


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


def test_invalid_cache_folder_raises_user_error(monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", "s3://bucket/cache")
    with pytest.raises(UserError, match="CODIEMB_JAX_CACHE: this address is not supported"):
        cache_folder()
    monkeypatch.setenv("CODIEMB_JAX_CACHE", "gs://Bucket/cache")
    with pytest.raises(UserError, match="CODIEMB_JAX_CACHE: gs://Bucket/cache is not a valid address"):
        remote_cache()
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


def test_error_of_the_record_writer_is_reported(tmp_path, prompt_tokenizer, cache, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError('Failed to finalize writing of split "train": write() failed: No space left on device')

    monkeypatch.setattr(tokenize.TokenizedTexts, "download_and_prepare", fail)
    with pytest.raises(UserError, match="a.jsonl: cannot be prepared in the cache .*: .*No space left on device"):
        prepare(write_ir(tmp_path / "a.jsonl"), "ir", prompt_tokenizer, cache=cache, **LIMITS)
    assert list(cache.iterdir()) == []
