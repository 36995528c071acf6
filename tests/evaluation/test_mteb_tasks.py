"""Tests of the mteb adapter on local tasks, against direct computations and mteb's wrapper of sentence-transformers."""

import builtins
import importlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("mteb")

import mteb
import pytrec_eval
from mteb.models import EncoderProtocol
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

import codiemb_jax
from codiemb_jax.checkpoints.export import write_export
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.checkpoints.orbax import save_model
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.evaluation.mteb_tasks import (
    COLUMNS,
    PUBLISHED_CMTEB,
    PUBLISHED_QUERY_PROMPT,
    MtebEncoder,
    MtebResults,
    MtebScore,
    find_tasks,
    instructions_of,
    mteb_table,
    run_mteb,
)
from codiemb_jax.sharding import make_mesh
from convert.orbax_to_hf import main as orbax_to_hf
from tests.evaluation.local_mteb import TASKS, LocalMissing, pairs, retrieval_data
from tests.helpers import sentence_transformer

QUICKSTART = Path(codiemb_jax.__file__).parent / "quickstart" / "model"
NAMES = [task.metadata.name for task in TASKS]
PROMPT = PromptSettings(passage="Passage: ", default_instruction="Find it")


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Makes mteb know the local tasks."""
    registry = importlib.import_module("mteb.get_tasks")._TASKS_REGISTRY
    local = {task.metadata.name: task for task in (*TASKS, LocalMissing)}
    registry.update(local)
    yield
    for name in local:
        del registry[name]


@pytest.fixture(scope="module")
def model():
    settings = ModelSettings(path=str(QUICKSTART), compute_dtype="float32")
    return open_model(settings, PROMPT, make_mesh(MeshSettings()), 64)


@pytest.fixture(scope="module")
def embedder(model):
    """A model that inserts instructions."""
    return Embedder(model.graph, model.load(), model.blueprint, model.mesh)


@pytest.fixture(scope="module")
def export(model, tmp_path_factory) -> Path:
    """The same model as a Hugging Face folder, with the prompts of the local tasks."""
    folder = tmp_path_factory.mktemp("mteb") / "export"
    # mteb has no prompt for LocalSTS.
    instructions = instructions_of(NAMES) | {"LocalSTS": PROMPT.default_instruction}
    write_export(folder, model.load(), {}, model.blueprint, stock=True, instructions=instructions)
    return folder


@pytest.fixture(scope="module")
def scores(embedder) -> dict[str, float]:
    results = run_mteb(embedder, NAMES)
    assert [score.type for score in results.scores] == list(COLUMNS)
    return {score.type: score.value for score in results.scores}


def unit_pairs(encode, seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Returns the embeddings of pairs, float64, and the number of words that both texts have."""
    first, second, shared = pairs(80, seed)
    return encode(first).astype(np.float64), encode(second).astype(np.float64), shared


def test_sts_matches_scipy(embedder, scores):
    first, second, shared = unit_pairs(embedder.encode_query, 4)  # mteb has no prompt for it
    expected = spearmanr(np.sum(first * second, axis=1), shared).statistic
    assert 0.2 < expected < 0.999
    assert scores["STS"] == pytest.approx(expected, abs=1e-6)


def test_pair_classification_matches_sklearn(embedder, scores):
    encode = partial(embedder.encode_query, prompt="Instruction: Retrieve paraphrases Query: ")
    first, second, shared = unit_pairs(encode, 3)
    labels = np.array(shared) > 0
    # mteb takes the best of five similarities. Of unit vectors, four rank alike, the other is the Manhattan distance.
    similarities = np.sum(first * second, axis=1), -np.abs(first - second).sum(axis=1)
    expected = max(average_precision_score(labels, similarity) for similarity in similarities)
    assert 0.2 < expected < 0.999
    assert scores["PairClassification"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("reranking", [False, True])
def test_retrieval_and_reranking_match_trec_eval(reranking, embedder, scores):
    data = retrieval_data(reranking=reranking)
    instruction = "Given a question, rank manuals" if reranking else "Given a question, retrieve manuals"
    queries = embedder.encode_query(list(data["queries"]["text"]), prompt=f"Instruction: {instruction} Query: ")
    corpus = zip(data["corpus"]["title"], data["corpus"]["text"], strict=True)
    documents = embedder.encode_document([f"{title} {text}".strip() for title, text in corpus], prompt="Passage: ")
    ids = list(data["corpus"]["id"])
    ranking = {}
    for query, row in zip(data["queries"]["id"], queries @ documents.T, strict=True):
        candidates = data["top_ranked"][query] if data["top_ranked"] is not None else ids
        ranking[query] = {name: float(row[ids.index(name)]) for name in candidates}
    metric = "map_cut.1000" if reranking else "ndcg_cut.10"
    evaluated = pytrec_eval.RelevanceEvaluator(data["relevant_docs"], {metric}).evaluate(ranking)
    expected = np.mean([score[metric.replace(".", "_")] for score in evaluated.values()])
    assert 0.2 < expected < 0.999
    # mteb rounds the scores of retrieval to five digits
    assert scores["Reranking" if reranking else "Retrieval"] == pytest.approx(expected, abs=5.1e-6)


def test_scores_match_those_of_mteb_with_sentence_transformers_on_the_export(export, scores):
    wrapper = SentenceTransformerEncoderWrapper(sentence_transformer(export))
    loaded = run_mteb(Embedder.from_pretrained(export), NAMES)
    for task, score in zip(TASKS, loaded.scores, strict=True):
        task_type = task.metadata.type
        expected = scores[task_type]
        assert score.value == pytest.approx(expected, abs=1e-6), task_type
        result = mteb.evaluate(wrapper, task(), cache=None, co2_tracker=False, show_progress_bar=False)
        assert result.task_results[0].get_score() == pytest.approx(expected, abs=1e-6), task_type


def test_export_of_a_checkpoint_has_the_prompts_of_named_tasks(model, tmp_path):
    save_model(tmp_path / "checkpoint", model.stream(), model.stream_passthrough(), model.blueprint)
    arguments = ["--checkpoint", str(tmp_path / "checkpoint"), "--output", str(tmp_path / "export")]
    with pytest.raises(UserError, match="STSb"):
        orbax_to_hf([*arguments, "--mteb", "STSb"])
    assert not (tmp_path / "export").exists()
    orbax_to_hf([*arguments, "--mteb", "STSB", "DuRetrieval"])
    registered = mteb.get_model_meta("tencent/Youtu-Embedding").loader_kwargs["prompts_dict"]
    config = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
    expected = {"STSB": registered["STSB"], "DuRetrieval-query": registered["DuRetrieval"]["query"]}
    assert {name: config["prompts"][name] for name in expected} == {
        name: PROMPT.begin + PROMPT.query.replace("{instruction}", instruction)
        for name, instruction in expected.items()
    }
    assert config["prompts"].keys() == {"query", "document", *expected}


class Recorder:
    """Stands in for an embedder and records how it is called."""

    def __init__(self, prompts: dict[str, str], takes_instructions: bool = False):
        self.prompts, self.calls = prompts, []
        self.tokenizer = SimpleNamespace(
            takes_instructions=takes_instructions, query_prompt=lambda instruction: instruction
        )

    def encode_query(self, texts, prompt_name=None, prompt=None, batch_size=32, *, instruction=None):
        assert instruction is None or self.tokenizer.takes_instructions
        return self._record("query", texts, prompt_name, prompt, instruction)

    def encode_document(self, texts, prompt_name=None, prompt=None, batch_size=32):
        return self._record("document", texts, prompt_name, prompt, None)

    def _record(self, kind, texts, prompt_name, prompt, instruction):
        given = {"name": prompt_name, "prompt": prompt, "instruction": instruction}
        self.calls.append((kind, {key: value for key, value in given.items() if value is not None}))
        return np.ones((len(texts), 2), np.float32)


def recorded(embedder: Recorder, metadata, prompt_type: PromptType | None, **options) -> tuple[str, dict[str, str]]:
    encoder = MtebEncoder(embedder, **options)
    assert isinstance(encoder, EncoderProtocol)
    embedder.calls.clear()
    encoder.encode(
        [{"text": ["a", "b"]}, {"text": ["c"]}], task_metadata=metadata, hf_split="test", hf_subset="default",
        prompt_type=prompt_type,
    )  # fmt: skip
    (call,) = embedder.calls
    return call


QUERY, DOCUMENT = PromptType.query, PromptType.document
DU_INSTRUCTION = "Given a Chinese search query, retrieve web passages that answer the question"
AFQMC_INSTRUCTION = (
    "Represent the text in conversations between users and financial customer service, retrieve semantically similar "
    "text"
)


def task(name: str, task_type: str, prompt=None) -> SimpleNamespace:
    return SimpleNamespace(name=name, type=task_type, prompt=prompt)


def test_instructions_come_from_caller_registry_task_and_model_in_this_order():
    model = Recorder({"query": "q: ", "document": "d: "}, takes_instructions=True)
    own = {"query": "of mteb", "document": "of documents"}
    known, unknown = task("DuRetrieval", "Retrieval", own), task("Other", "Retrieval", own)
    call = partial(recorded, model)
    given = {"instructions": {"DuRetrieval": "of the caller"}}
    assert call(known, QUERY, **given) == ("query", {"instruction": "of the caller"})
    assert call(known, QUERY) == ("query", {"instruction": DU_INSTRUCTION})
    assert call(unknown, QUERY, **given) == ("query", {"instruction": "of mteb"})
    assert call(task("Other", "Reranking", "of mteb"), QUERY) == ("query", {"instruction": "of mteb"})
    assert call(task("Other", "Retrieval"), QUERY) == ("query", {})
    assert call(known, DOCUMENT, **given) == ("document", {"name": "document"})
    # symmetric
    assert call(task("AFQMC", "STS"), None) == ("query", {"instruction": AFQMC_INSTRUCTION})
    assert call(task("Other", "STS", "of mteb"), None) == ("query", {"instruction": "of mteb"})
    assert call(task("Other", "STS"), None) == ("query", {})
    assert call(task("AFQMC", "STS"), None, instructions={"AFQMC": ""}) == ("query", {"instruction": ""})


def test_query_prompt_replaces_that_of_the_model():
    published = {"query_prompt": PUBLISHED_QUERY_PROMPT}
    for takes_instructions in (True, False):
        call = partial(recorded, Recorder({"query": "q: ", "document": "d: "}, takes_instructions), **published)
        known = task("DuRetrieval", "Retrieval")
        assert call(known, QUERY) == ("query", {"prompt": f"Instruction: {DU_INSTRUCTION} \nQuery: "})
        assert call(known, QUERY, instructions={"DuRetrieval": "{instruction}"}) == (
            "query",
            {"prompt": "Instruction: {instruction} \nQuery: "},
        )
        assert call(known, QUERY, instructions={"DuRetrieval": ""}) == ("query", {"prompt": ""})
        assert call(known, DOCUMENT) == ("document", {"name": "document"})
        assert call(task("Other", "STS"), None) == ("query", {})


@pytest.mark.parametrize("prompt_type", [QUERY, DOCUMENT, None])
def test_prompts_of_a_folder_are_used_under_the_names_that_mteb_looks_up(prompt_type):
    kind = prompt_type.value if prompt_type else "query"
    names = ["DuRetrieval-query", "DuRetrieval-document", "DuRetrieval"]
    names += ["Retrieval-query", "Retrieval-document", "Retrieval", "query", "document"]
    prompts = dict.fromkeys(names, "")
    if prompt_type:
        order = [f"DuRetrieval-{kind}", "DuRetrieval", f"Retrieval-{kind}", "Retrieval", kind]
    else:
        order = ["DuRetrieval", "Retrieval"]
    for name in order:
        assert recorded(Recorder(prompts), task("DuRetrieval", "Retrieval", "of mteb"), prompt_type) == (
            kind,
            {"name": name},
        )
        del prompts[name]
    assert recorded(Recorder(prompts), task("DuRetrieval", "Retrieval"), prompt_type) == (kind, {})


def test_instructions_reach_the_model(embedder):
    encoder = MtebEncoder(embedder, instructions={"STSB": "Find twins"})
    expected = embedder.encode_query(["red bicycle", "blue"], prompt="Instruction: Find twins Query: ")
    call = partial(encoder.encode, task_metadata=task("STSB", "STS"), hf_split="test", hf_subset="default")
    np.testing.assert_array_equal(call([{"text": ["red bicycle", "blue"]}]), expected)
    with_empty = call([{"text": ["red bicycle", " "]}, {"text": ["blue"]}])
    np.testing.assert_allclose(with_empty[[0, 2]], expected, atol=1e-6)
    assert not with_empty[1].any()
    np.testing.assert_allclose(encoder.similarity(expected, with_empty)[:, [0, 2]], expected @ expected.T, atol=1e-6)
    np.testing.assert_allclose(encoder.similarity_pairwise(expected, expected), 1, atol=1e-6)
    with pytest.raises(UserError, match="STSB: .*\n.*leaves no room"):
        MtebEncoder(embedder, instructions={"STSB": "word " * 100}).encode(
            [{"text": ["a"]}], task_metadata=task("STSB", "STS"), hf_split="test", hf_subset="default"
        )


def test_embeddings_that_are_not_finite_are_reported(monkeypatch):
    broken = Recorder({"query": ""})
    monkeypatch.setattr(broken, "encode_query", lambda *_, **__: np.full((3, 2), np.nan, np.float32))
    with pytest.raises(UserError, match="^STSB: the model's embeddings are NaN or infinite$"):
        recorded(broken, task("STSB", "STS"), None)


def test_cmteb_has_its_tasks_and_an_instruction_for_each():
    tasks = find_tasks(["STSB", "cmteb", "DuRetrieval"])
    assert len(tasks) == 31
    assert tasks[0].metadata.name == "STSB"
    assert list(tasks[0].eval_splits) == ["test"]
    instructions = instructions_of(["cmteb"])
    assert len(instructions) == 31
    assert instructions["AFQMC"] == AFQMC_INSTRUCTION
    assert instructions["DuRetrieval-query"] == DU_INSTRUCTION
    assert instructions["MMarcoReranking-query"].startswith(
        "Given a web search query"
    )  # mteb's own names a Chinese one
    assert mteb.models.abs_encoder.AbsEncoder.validate_task_to_prompt_name(instructions) == instructions
    assert instructions_of(["LocalSTS"]) == {}


ERRORS = {
    "near": ({"tasks": ["duretrieval"]}, r"^duretrieval: mteb has no such task; did you mean .*DuRetrieval.*\?$"),
    "cmteb": ({"tasks": ["CMTEB"]}, r"did you mean .*cmteb"),
    "unknown": ({"tasks": ["STSB", "\x1b[31mxyzzy"]}, r"^\\x1b\[31mxyzzy: mteb has no such task; mteb.get_tasks\(\)"),
    "images": ({"tasks": ["CIFAR10"]}, "^CIFAR10: this task has inputs other than texts: .*image"),
    "override": ({"tasks": ["STSB"], "instructions": {"STSBB": "x"}}, "^STSBB: mteb has no such task; did you mean"),
    "placeholder": ({"tasks": ["STSB"], "query_prompt": "Query: "}, "must contain the placeholder {instruction}"),
    "download": ({"tasks": ["LocalMissing"]}, "^LocalMissing: its data set cannot be downloaded: "),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_problem(name, embedder):
    arguments, message = ERRORS[name]
    with pytest.raises(UserError, match=message):
        run_mteb(embedder, **arguments)


def test_instructions_need_a_prompt_to_insert_them_into():
    with pytest.raises(UserError, match="no placeholder for an instruction; also give the query prompt"):
        MtebEncoder(Recorder({"query": "q: "}), instructions={"STSB": "x"})


def test_query_prompt_starts_with_the_special_tokens_of_the_model(golden):
    settings = ModelSettings(path=str(golden / "youtu_tiny"), compute_dtype="float32")
    opened = open_model(settings, PROMPT, make_mesh(MeshSettings()), 64)
    special = next(t for t in opened.blueprint.tokenizer().all_special_tokens)
    opened = open_model(settings, PROMPT.model_copy(update={"begin": special}), make_mesh(MeshSettings()), 64)
    embedder = Embedder(opened.graph, opened.load(), opened.blueprint, opened.mesh)
    with pytest.raises(UserError, match="must start with"):
        MtebEncoder(embedder, query_prompt=PUBLISHED_QUERY_PROMPT)
    MtebEncoder(embedder, query_prompt=special + PUBLISHED_QUERY_PROMPT)


def test_missing_mteb_is_reported(monkeypatch):
    imported = builtins.__import__

    def without_mteb(name, *arguments, **options):
        if name == "mteb":
            raise ModuleNotFoundError("No module named 'mteb'", name="mteb")
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_mteb)
    with pytest.raises(UserError, match=r'pip install "codiemb-jax\[mteb\]"'):
        find_tasks(["STSB"])


def test_results_are_kept_for_the_same_model_and_prompts(embedder, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    run = partial(run_mteb, embedder, ["LocalSTS"], model_name="../my model", results_folder=folder)
    first = run()
    (path,) = folder.rglob("LocalSTS.json")
    assert path.parent.parent.parent == folder / "results"
    assert path.parent.parent.name == "codiemb_jax__.._my_model"
    content = path.read_bytes()
    assert json.loads(content)["scores"]["test"][0]["main_score"] == pytest.approx(first.scores[0].value)
    monkeypatch.setattr(TASKS[-1], "load_data", None)  # would fail if it were evaluated again
    assert run().scores[0].value == pytest.approx(first.scores[0].value, abs=1e-6)
    assert path.read_bytes() == content
    monkeypatch.undo()
    for damaged in (content[:50], b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="LocalSTS.json: not a result of mteb; remove it"):
            run()
    run(query_prompt=PUBLISHED_QUERY_PROMPT)
    assert len(list(folder.rglob("LocalSTS.json"))) == 2
    monkeypatch.setattr(Embedder, "max_seq_length", 16)
    run()
    assert len(list(folder.rglob("LocalSTS.json"))) == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot be created: "):
        run(results_folder=tmp_path / "file")


def test_table_has_means_of_tasks_and_types_and_the_published_row():
    rng = np.random.default_rng(0)
    tasks = find_tasks(["cmteb"])
    scores = tuple(MtebScore(t.metadata.name, t.metadata.type, "m", float(rng.random())) for t in tasks)
    table, figures = mteb_table(MtebResults("mine", scores))
    assert list(figures) == list(PUBLISHED_CMTEB)
    means = []
    for task_type, column in COLUMNS.items():
        values = [100 * score.value for score in scores if score.type == task_type]
        means.append(sum(values) / len(values))
        assert figures[column] == pytest.approx(means[-1])
    assert figures["Mean(Task)"] == pytest.approx(100 * sum(score.value for score in scores) / 31)
    assert figures["Mean(Type)"] == pytest.approx(sum(means) / 6)
    assert np.mean(list(PUBLISHED_CMTEB.values())[:6]) == pytest.approx(PUBLISHED_CMTEB["Mean(Type)"], abs=0.006)

    def lines(table) -> list[str]:
        console = Console(width=200)
        with console.capture() as capture:
            console.print(table)
        return capture.get().splitlines()

    assert any("published" in line and "77.60" in line and "70.91" in line for line in lines(table))
    other = MtebScore("Tatoeba", "BitextMining", "f1", 0.5)
    table, figures = mteb_table(MtebResults("mine", (other, *scores[:1])))
    assert list(figures) == ["Retr.", "BitextMining", "Mean(Task)", "Mean(Type)"]
    assert not any("published" in line for line in lines(table))
