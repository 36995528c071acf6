"""Tests of BEIR folders against the formulas of metrics and mteb."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

import codiemb_jax
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import EvaluationSettings, MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.evaluation import held_out
from codiemb_jax.evaluation.beir import Document, read_folder
from codiemb_jax.evaluation.held_out import HeldOutTexts, evaluate, read_files, read_held_out
from codiemb_jax.sharding import make_mesh
from tests.evaluation.test_metrics import mean_reference
from tests.storage_emulator import StorageEmulator

QUICKSTART = Path(codiemb_jax.__file__).parent / "quickstart" / "model"
PROMPT = PromptSettings(passage="Passage: ", default_instruction="Find it")
WORDS = ("wheel", "brake", "saddle", "chain", "pedal", "tube", "rim", "spoke", "oven", "flour", "butter", "sugar")
Folder = dict[str, Any]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    settings = ModelSettings(path=str(QUICKSTART), compute_dtype="float32")
    model = open_model(settings, PROMPT, make_mesh(MeshSettings()), 64)
    return Embedder(model.graph, model.load(), model.blueprint, model.mesh)


def make_data(seed: int = 0, documents: int = 60) -> Folder:
    """Returns documents, some without title or text, queries, some with the id of a document, and graded judgments."""
    rng = np.random.default_rng(seed)
    text = lambda size: " ".join(rng.choice(WORDS, size))  # noqa: E731
    corpus = {f"d{i}": {"title": text(2) if i % 3 else "", "text": text(6) if i % 7 else ""} for i in range(documents)}
    corpus["d5"] = corpus["d4"]  # a tie
    queries = {**{f"q{i}": text(4) for i in range(9)}, "d3": corpus["d3"]["text"], "unjudged": "wheel"}
    qrels = {
        query: {str(name): int(rng.integers(0, 4)) for name in rng.choice(list(corpus), 8, replace=False)}
        for query in queries
        if query != "unjudged"
    }
    qrels["q0"] = dict.fromkeys(qrels["q0"], 0)
    return {"corpus": corpus, "queries": queries, "qrels": qrels}


def write(folder: Path, data: Folder, split: str = "test") -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": name, **document, "metadata": {}} for name, document in data["corpus"].items()]
    queries = [{"_id": name, "text": text} for name, text in data["queries"].items()]
    for name, lines in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    judgments = [
        f"{query}\t{document}\t{gain}\n" for query, found in data["qrels"].items() for document, gain in found.items()
    ]
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(judgments))
    return folder


def score(folder: Path, embedder: Embedder, instruction: str | None = None) -> dict[str, float]:
    texts = HeldOutTexts(embedder.tokenizer, embedder.max_seq_length, instruction=instruction)
    (data,) = read_files([], [], [folder], texts, "--")
    return data.score(embedder)


@pytest.fixture(scope="module")
def expected(embedder) -> dict[str, float]:
    """The metrics of `make_data()` by their definitions."""
    data = make_data()
    texts = {name: f"{document['title']} {document['text']}".strip() for name, document in data["corpus"].items()}
    vectors = dict(zip(texts, embedder.encode_document([text or "x" for text in texts.values()]), strict=True))
    queries = dict(zip(data["qrels"], embedder.encode_query([data["queries"][q] for q in data["qrels"]]), strict=True))
    scores = [
        {name: float(query @ vectors[name]) if text else 0.0 for name, text in texts.items() if name != own}
        for own, query in queries.items()
    ]
    return mean_reference(scores, list(data["qrels"].values()))


@pytest.mark.parametrize("block", [16_384, 16, 7])
def test_metrics_match_formulas(block, embedder, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "VECTORS_PER_BLOCK", block)
    folder = write(tmp_path / "my.data", make_data())
    assert sum(not d["title"] and not d["text"] for d in make_data()["corpus"].values()) > 1
    assert 0.1 < expected["nDCG@10"] < 1
    assert score(folder, embedder) == pytest.approx(expected, abs=1e-6)
    settings = EvaluationSettings(beir=[folder])
    found = evaluate(embedder, read_held_out(settings, embedder.tokenizer, embedder.max_seq_length))
    assert found == pytest.approx({f"my {metric}": value for metric, value in expected.items()}, abs=1e-6)


def test_metrics_match_mteb(embedder, tmp_path):
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    from codiemb_jax.evaluation.mteb_tasks import MtebEncoder
    from tests.evaluation.local_mteb import LocalRetrieval

    data = make_data(1)

    class LocalBeir(LocalRetrieval):
        metadata = LocalRetrieval.metadata.model_copy(update={"name": "LocalBeir", "prompt": None})
        ignore_identical_ids = True

        def load_data(self, num_proc: int | None = None, **_: Any) -> None:
            columns = [{"id": name, **document} for name, document in data["corpus"].items()]
            split = RetrievalSplitData(
                corpus=Dataset.from_list(columns),
                queries=Dataset.from_list([{"id": name, "text": text} for name, text in data["queries"].items()]),
                relevant_docs={query: dict(found) for query, found in data["qrels"].items()},
                top_ranked=None,
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    registry = importlib.import_module("mteb.get_tasks")._TASKS_REGISTRY
    registry["LocalBeir"] = LocalBeir
    try:
        encoder = MtebEncoder(embedder, instructions={"LocalBeir": "Find parts"})
        results = mteb.evaluate(encoder, LocalBeir(), cache=None, co2_tracker=False, show_progress_bar=False)
    finally:
        del registry["LocalBeir"]
    (scores,) = results.task_results[0].scores["test"]
    found = score(write(tmp_path / "data", data), embedder, "Find parts")
    names = ("ndcg_at_10", "mrr_at_10", "recall_at_10", "recall_at_100", "map_at_1000")
    # mteb rounds the scores of retrieval to five digits
    assert list(found.values()) == pytest.approx([scores[name] for name in names], abs=5.1e-6)
    assert 0.1 < found["nDCG@10"] < 1


def test_ties_do_not_depend_on_the_order_of_the_corpus(tmp_path):
    """Many documents have equal vectors, also at the last rank that counts."""
    corpus = {f"d{i}": {"title": "", "text": WORDS[i % 3]} for i in range(1300)}
    data = {"corpus": corpus, "queries": {"q": "oven"}, "qrels": {"q": {f"d{i}": 1 for i in range(0, 1300, 9)}}}
    embedder = FixedWords()
    found = score(write(tmp_path / "a", data), embedder)
    scores = {name: float(embedder.vectors["oven"] @ embedder.vectors[d["text"]]) for name, d in corpus.items()}
    assert found == pytest.approx(mean_reference([scores], [data["qrels"]["q"]]), abs=1e-12)
    data["corpus"] = {str(name): corpus[name] for name in np.random.default_rng(0).permutation(list(corpus))}
    assert score(write(tmp_path / "b", data), embedder) == found


class FixedWords:
    """Stands in for an embedder and gives equal words equal unit vectors."""

    max_seq_length = 64

    def __init__(self):
        self.tokenizer = self
        self.prompts, self.default_prompt_name, self.takes_instructions = {"query": "", "document": ""}, None, False
        choices = np.concatenate([np.eye(4), [[0.5, 0.5, 0.5, 0.5], [0.5, -0.5, 0.5, -0.5]]]).astype(np.float32)
        self.vectors = {word: choices[i % len(choices)] for i, word in enumerate(WORDS)}

    def tokenize(self, texts, prompt, max_tokens):
        return [held_out.Tokens(np.array([WORDS.index(text)], np.int32), 0) for text in texts]

    def embed_tokens(self, texts, *_, **__):
        return np.stack([self.vectors[WORDS[text.ids[0]]] for text in texts])

    def get_embedding_dimension(self):
        return 4


def test_other_splits_are_used_in_order(tmp_path):
    data = make_data()
    folder = write(tmp_path / "data", data, "train")
    assert len(read_folder(folder).queries) == 10
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "other.tsv").write_text(header + "q1\td1\t1\n")
    with pytest.raises(UserError, match="qrels: expected test.tsv, dev.tsv, or a single other .tsv file, found other"):
        read_folder(folder)
    (folder / "qrels" / "dev.tsv").write_text(header + "q1\td1\t1\n")
    assert read_folder(folder).relevant == [{"d1": 1}]
    (folder / "qrels" / "test.tsv").write_text(header + "\nq2\td1\t2\r\nq2\td2\t-1\n")
    assert read_folder(folder).relevant == [{"d1": 2, "d2": -1}]
    assert list(read_folder(folder).queries) == ["q2"]


def test_documents_have_the_text_of_mteb(tmp_path):
    corpus = {
        "a": {"title": "T", "text": " x "}, "b": {"title": "", "text": " x "}, "c": {"text": "x"},
        "d": {"title": "T", "text": ""}, "e": {"title": None, "text": " "},
    }  # fmt: skip
    data = {"corpus": corpus, "queries": {"q": "x"}, "qrels": {"q": {"a": 1}}}
    folder = read_folder(write(tmp_path / "data", data))
    expected = [("a", "T  x"), ("b", "x"), ("c", "x"), ("d", "T"), ("e", "")]
    blocks = list(folder.blocks(2))
    assert [len(block) for block in blocks] == [2, 2, 1]
    assert [document for block in blocks for document in block] == [Document(*pair) for pair in expected]


INVALID: dict[str, tuple[str, bytes, str]] = {
    "id twice": ("corpus.jsonl", b'{"_id": "d1", "text": "x"}\n', r"corpus\.jsonl:4: _id 'd1': is also in line 2"),
    "query twice": ("queries.jsonl", b'{"_id": "q0", "text": "x"}\n', r"queries\.jsonl:3: _id 'q0': is also in line 1"),
    "no id": ("corpus.jsonl", b'{"id": "d", "text": "x"}\n', r"corpus\.jsonl:4: _id: missing, empty or not a string"),
    "number as id": ("corpus.jsonl", b'{"_id": 7, "text": "x"}\n', r"corpus\.jsonl:4: _id: missing"),
    "zero byte in id": ("corpus.jsonl", b'{"_id": "a\\u0000b", "text": "x"}\n', r"corpus\.jsonl:4: _id: missing"),
    "no text": ("corpus.jsonl", b'{"_id": "d"}\n', r"corpus\.jsonl:4: text: missing or not a string"),
    "title": ("corpus.jsonl", b'{"_id": "d", "text": "", "title": 1}\n', r"corpus\.jsonl:4: title: not a string"),
    "not JSON": ("corpus.jsonl", b"{\n", r"corpus\.jsonl:4: invalid JSON"),
    "nested": ("corpus.jsonl", b"[" * 100_000 + b"\n", r"corpus\.jsonl:4: "),
    "huge number": ("corpus.jsonl", b"9" * 5000 + b"\n", r"corpus\.jsonl:4: "),
    "list": ("corpus.jsonl", b"[]\n", r"corpus\.jsonl:4: expected one JSON object per line"),
    "not UTF-8": ("corpus.jsonl", b'{"_id": "\xff"}\n', r"corpus\.jsonl:4: not valid UTF-8"),
    "surrogate": ("corpus.jsonl", b'{"_id": "\\ud800", "text": ""}\n', r"corpus\.jsonl:4: contains an unpaired surr"),
    "empty query": ("queries.jsonl", b'{"_id": "q", "text": " "}\n', r"queries\.jsonl:3: text: empty text"),
    "unknown query": ("qrels/test.tsv", b"q9\td1\t1\n", r"test\.tsv:3: query-id: 'q9' is not an _id in queries\.jsonl"),
    "unknown document": ("qrels/test.tsv", b"q0\tx\t1\n", r"test\.tsv:3: corpus-id: 'x' is not an _id in corpus\.json"),
    "gain": ("qrels/test.tsv", b"q0\td2\t0.5\n", r"test\.tsv:3: score: '0\.5', expected an integer from -1000 to 1000"),
    "huge gain": ("qrels/test.tsv", b"q0\td2\t99999\n", r"test\.tsv:3: score: '99999', expected an integer"),
    "columns": ("qrels/test.tsv", b"q0 0 d2 1\n", r"test\.tsv:3: 1 columns, expected query id, document id and gain"),
    "judged twice": ("qrels/test.tsv", b"q0\td1\t2\n", r"test\.tsv:3: query 'q0' and document 'd1' are judged twice"),
    "bytes": ("qrels/test.tsv", b"q0\t\xff\t2\n", r"test\.tsv:3: not valid UTF-8"),
}


@pytest.fixture
def small(tmp_path) -> Path:
    corpus = {f"d{i}": {"title": "", "text": "x"} for i in range(3)}
    return write(tmp_path / "data", {"corpus": corpus, "queries": {"q0": "x", "q1": "y"}, "qrels": {"q0": {"d1": 1}}})


def test_byte_order_marks_are_left_out(small):
    expected = read_folder(small)
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (small / file).write_bytes(b"\xef\xbb\xbf" + (small / file).read_bytes())
    found = read_folder(small)
    assert (found.queries, found.relevant) == (expected.queries, expected.relevant)
    assert list(found.blocks(8)) == list(expected.blocks(8))


@pytest.mark.parametrize("name", INVALID)
def test_invalid_line_raises_user_error(name, small):
    file, line, message = INVALID[name]
    with (small / file).open("ab") as opened:
        opened.write(line)
    with pytest.raises(UserError, match=message):
        read_folder(small)


def test_all_problems_are_reported_together(small):
    for file in ("corpus.jsonl", "queries.jsonl"):
        with (small / file).open("a") as opened:
            opened.write("{}\n")
    with pytest.raises(UserError, match=r"(?s)corpus\.jsonl:4: _id.*queries\.jsonl:3: _id"):
        read_folder(small)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", "\n", r"corpus\.jsonl: the file is empty"),
        ("queries.jsonl", "", r"queries\.jsonl: the file is empty"),
        ("qrels/test.tsv", "", r"test\.tsv: contains no judgments"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", r"test\.tsv: contains no judgments"),
        ("qrels/test.tsv", "q0\td1\t1\n", r"test\.tsv:1: expected the header query-id<tab>corpus-id<tab>score"),
        ("qrels/test.tsv", "q0 0 d1 1\n" * 9, r"test\.tsv:1: expected the header[^\n]*$"),
    ],
)
def test_file_without_lines_or_header_raises_user_error(file, content, message, small):
    (small / file).write_text(content)
    with pytest.raises(UserError, match=message):
        read_folder(small)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
@pytest.mark.parametrize("kind", ["missing", "pipe", "folder"])
def test_other_than_file_raises_user_error(name, kind, small):
    (small / name).unlink()
    if kind == "pipe":
        os.mkfifo(small / name)
    elif kind == "folder":
        (small / name).mkdir()
    with pytest.raises(UserError, match="no such file|is not a file|found none"):
        read_folder(small)


def test_locations_that_are_no_folders_raise_user_error(small, tmp_path):
    texts = HeldOutTexts(FixedWords(), 64)
    (tmp_path / "link").symlink_to(small)
    (tmp_path / "loop").symlink_to("loop")
    for paths, message in (
        ([tmp_path / "absent"], "--beir: .*absent: no such folder; give a folder with corpus.jsonl"),
        ([small / "corpus.jsonl"], "--beir: .*corpus.jsonl: is not a folder"),
        ([small, tmp_path / "link"], "link: the same folder is listed twice"),
        ([Path(os.fsdecode(bytes(tmp_path) + b"/x\xff"))], r"--beir: '.*x.udcff': the name is not valid UTF-8"),
        ([tmp_path / "loop"], "--beir: .*: (cannot be read|no such folder)"),
    ):
        with pytest.raises(UserError, match=message):
            read_files([], [], paths, texts, "--")


def test_names_differ_from_those_of_ir_files(small, tmp_path, monkeypatch):
    record = {"task_type": "ir", "query": ["", "", "oven"], "positives": [["", "", "oven"]]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    for file in ("corpus.jsonl", "queries.jsonl"):
        path = small / file
        path.write_text(path.read_text().replace('"x"', '"oven"').replace('"y"', '"rim"'))
    texts = HeldOutTexts(FixedWords(), 64)
    found = read_files([tmp_path / "data.jsonl"], [], [small], texts, "--")
    assert [data.name for data in found] == ["data.jsonl", "data"]
    monkeypatch.chdir(small)
    assert [data.name for data in read_files([], [], [Path()], texts, "--")] == ["data"]


def test_corpus_that_changes_raises_user_error(small, embedder):
    texts = HeldOutTexts(embedder.tokenizer, 64)
    (data,) = read_files([], [], [small], texts, "--")
    with (small / "corpus.jsonl").open("a") as opened:
        opened.write('{"_id": "new", "text": "x"}\n')
    with pytest.raises(UserError, match=r"corpus\.jsonl: has changed while it was used; start again"):
        data.score(embedder)


def test_remote_folder_is_copied_without_other_files(small, embedder, tmp_path, monkeypatch):
    gcsfs = pytest.importorskip("gcsfs")
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    with StorageEmulator() as storage:
        for name, value in storage.environment.items():
            monkeypatch.setenv(name, value)
        gcsfs.GCSFileSystem.clear_instance_cache()  # they remember the address of another emulator
        for path in small.rglob("*"):
            if path.is_file():
                storage.put(f"parts/{path.relative_to(small)}", path.read_bytes())
        storage.put("parts/README.md", b"not needed")
        texts = HeldOutTexts(embedder.tokenizer, 64)
        (data,) = read_files([], [], [epath.Path("gs://bucket/parts")], texts, "--")
        with pytest.raises(UserError, match="gs://bucket/absent: contains no corpus.jsonl"):
            read_files([], [], [epath.Path("gs://bucket/absent")], texts, "--")
    assert (data.name, data.folder.documents, data.folder.relevant) == ("parts", 3, [{"d1": 1}])
    assert not list((tmp_path / "cache").rglob("README.md"))
