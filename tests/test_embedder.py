"""`Embedder` against sentence-transformers on the same folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import Qwen3Config, Qwen3Model

import codiemb_jax
from codiemb_jax import Embedder, UserError
from codiemb_jax.config import MeshSettings
from codiemb_jax.train import main as train
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from tests.helpers import sentence_transformer

QUICKSTART = Path(codiemb_jax.__file__).parent / "quickstart"
TEXTS = [
    "how do I reset my password",
    "Choose Forgot password on the sign-in page.",
    "Überraschend schöne Straßen führen über den Pass",
    "怎样更换自行车的内胎？",
    "A",
    "The committee met in the spring to settle the budget and heard the reports of the working groups. " * 30,
]


def assert_same(model: Embedder, theirs: SentenceTransformer, texts: list[str]) -> None:
    """Vectors of queries, documents and texts without a prompt, and what is known of the model."""
    for name in ("encode_query", "encode_document", "encode"):
        found, expected = getattr(model, name)(texts), getattr(theirs, name)(texts)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
    assert model.prompts.items() >= theirs.prompts.items()
    assert model.max_seq_length == theirs.max_seq_length
    assert model.get_embedding_dimension() == theirs.get_embedding_dimension()
    np.testing.assert_allclose(
        model.similarity(model.encode(texts[:2]), model.encode(texts)),
        theirs.similarity(theirs.encode(texts[:2]), theirs.encode(texts)).numpy(),
        atol=1e-5,
    )


@pytest.fixture(scope="module")
def published(minilm) -> Embedder:
    return Embedder.from_pretrained(minilm)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a short run on the quickstart's model and data."""
    folder = tmp_path_factory.mktemp("run")
    settings = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(QUICKSTART / "model")},
        "data": {
            "ir": str(QUICKSTART / "data" / "train" / "ir"), "ir_global_batch_size": 8, "negatives_per_query": 1,
            "positives_per_query": 1, "query_max_tokens": 96, "passage_max_tokens": 128,
        },
        "optimizer": {"max_steps": 2, "learning_rate": 1e-3},
    }  # fmt: skip
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_JAX_CACHE", str(folder / "cache"))
        train(["--config", str(folder / "settings.yaml")])
    return folder / "run"


def test_three_lines_encode_with_what_a_run_leaves(run):
    theirs = sentence_transformer(run / "export")
    for path in (run / "export", run, run / "checkpoints" / "2"):
        model = Embedder.from_pretrained(path)
        assert_same(model, theirs, TEXTS)


def with_prompts(folder: Path, source: Path, *, include_prompt: bool, pooling: str = "mean", **options) -> None:
    """A folder that sentence-transformers writes, with prompts."""
    prompts = {"query": "Represent this question: ", "passage": "Passage - ", "other": "As Other words "}
    transformer = Transformer(str(source), model_kwargs={"dtype": "float32"}, **options)
    size = transformer.get_word_embedding_dimension()
    pool = Pooling(size, pooling_mode=pooling, include_prompt=include_prompt)
    model = SentenceTransformer(modules=[transformer, pool, Normalize()], prompts=prompts, device="cpu")
    model.default_prompt_name = "other"
    model.save_pretrained(str(folder))


@pytest.mark.parametrize(
    ("include_prompt", "options"),
    [
        (True, {"max_seq_length": 40}),
        (False, {"max_seq_length": 64}),
        (False, {"max_seq_length": 40, "do_lower_case": True}),
    ],
    ids=str,
)
def test_prompts_of_a_folder_are_used_as_sentence_transformers_does(include_prompt, options, minilm, tmp_path):
    with_prompts(tmp_path / "model", minilm, include_prompt=include_prompt, **options)
    model, theirs = Embedder.from_pretrained(tmp_path / "model"), sentence_transformer(tmp_path / "model")
    assert_same(model, theirs, TEXTS)
    for how in ({"prompt_name": "passage"}, {"prompt": "Quite another prompt: "}, {"prompt": ""}):
        np.testing.assert_allclose(model.encode(TEXTS, **how), theirs.encode(TEXTS, **how), atol=1e-5, err_msg=str(how))


def test_a_published_encoder(published, minilm):
    assert_same(published, sentence_transformer(minilm), TEXTS)


def test_what_a_folder_says_survives_a_checkpoint(minilm, tmp_path):
    """Prompts, pooling and lengths of a folder that is not ours: into a checkpoint, and out into a folder again."""
    with_prompts(tmp_path / "model", minilm, include_prompt=True, max_seq_length=40)
    hf_to_orbax(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "orbax")])
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "again"), "--verify"])
    theirs = sentence_transformer(tmp_path / "model")
    for folder in ("orbax", "again"):
        assert_same(Embedder.from_pretrained(tmp_path / folder), theirs, TEXTS)
    again = sentence_transformer(tmp_path / "again")
    np.testing.assert_allclose(again.encode_query(TEXTS), theirs.encode_query(TEXTS), atol=1e-6)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tokenizer_files) -> Path:
    """A tiny Qwen3 as transformers saves it: nothing says how to encode."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=640, initializer_range=0.2,
    )  # fmt: skip
    Qwen3Model(config).save_pretrained(folder)
    tokenizer_files(folder)
    return folder


@pytest.mark.parametrize("pooling", ["lasttoken", "mean", "weightedmean"])
def test_a_decoder_of_others_is_causal(pooling, decoder, tmp_path):
    with_prompts(tmp_path / "model", decoder, include_prompt=True, pooling=pooling)
    assert_same(Embedder.from_pretrained(tmp_path / "model"), sentence_transformer(tmp_path / "model"), TEXTS[:5])


def test_a_transformer_alone_is_read_as_sentence_transformers_does(decoder, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "bert", ignore=shutil.ignore_patterns("modules.json", "*sentence*", "1_*"))
    for folder in (decoder, tmp_path / "bert"):
        model, theirs = Embedder.from_pretrained(folder), sentence_transformer(folder)
        np.testing.assert_allclose(model.encode(TEXTS[:5]), theirs.encode(TEXTS[:5]), atol=1e-5, rtol=1e-4)


def test_one_text_gives_one_vector_and_none_gives_none(published):
    model = published
    assert model.encode(TEXTS[0]).shape == (384,)
    np.testing.assert_allclose(model.encode_query(TEXTS[0]), model.encode_query(TEXTS[:1])[0], atol=1e-6)
    assert model.encode([]).shape == (0, 384)
    assert model.similarity(model.encode(TEXTS[0]), model.encode(TEXTS)).shape == (1, len(TEXTS))


def test_order_and_batch_size_do_not_matter(published):
    texts = [f"{text} {i}" for i in range(4) for text in TEXTS[:5]]
    expected = published.encode(texts)
    np.testing.assert_allclose(published.encode(texts, batch_size=3), expected, atol=1e-5)
    np.testing.assert_allclose(published.encode(texts[::-1])[::-1], expected, atol=1e-5)


def test_weights_may_be_split_over_devices(published, minilm):
    expected = published.encode(TEXTS)
    split = Embedder.from_pretrained(minilm, mesh=MeshSettings(fsdp=2, tensor=2))
    np.testing.assert_allclose(split.encode(TEXTS), expected, atol=1e-5)
    half = Embedder.from_pretrained(minilm, dtype="bfloat16")
    assert np.sum(half.encode(TEXTS) * expected, axis=1).min() > 0.999


def test_an_instruction_goes_into_the_query_prompt_of_a_checkpoint(run):
    model = Embedder.from_pretrained(run / "checkpoints" / "2")
    prompt = "Instruction: Find similar code Query: "
    expected = model.encode_query(TEXTS, prompt=prompt)
    np.testing.assert_array_equal(model.encode_query(TEXTS, instruction="Find similar code"), expected)
    with pytest.raises(UserError, match="no place for an instruction; give the prompt itself"):
        Embedder.from_pretrained(run / "export").encode_query(TEXTS, instruction="Find similar code")


ODD: dict[str, dict] = {
    "no prompt for documents": {"config_sentence_transformers.json": {
        "prompts": {"query": "q: ", "other": None}, "default_prompt_name": "document",
    }},
    "an older name of the limits": {"sentence_xlm-roberta_config.json": {"max_seq_length": 30}},
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_odd_folders_are_read_as_sentence_transformers_does(what, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model")
    (tmp_path / "model" / "sentence_bert_config.json").unlink()
    for name, content in ODD[what].items():
        (tmp_path / "model" / name).write_text(json.dumps(content))
    model, theirs = Embedder.from_pretrained(tmp_path / "model"), sentence_transformer(tmp_path / "model")
    assert_same(model, theirs, TEXTS[:5])


MISTAKES: dict[str, tuple[Callable[[Embedder], object], str]] = {
    "unknown prompt": (lambda model: model.encode(TEXTS, prompt_name="title"), "there is no prompt 'title'; prompts "),
    "not a text": (lambda model: model.encode([1]), "expected texts, found int"),
    "both": (lambda model: model.encode_query(TEXTS, prompt="x", instruction="y"), "or a prompt, not both"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_call_raises_user_error(mistake, published):
    call, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        call(published)


def test_a_folder_that_is_no_model_raises_user_error(tmp_path, run):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Embedder.from_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match="holds several checkpoints"):
        Embedder.from_pretrained(run / "checkpoints")


def test_pooling_that_leaves_the_prompt_out_otherwise_raises_user_error(minilm, tmp_path):
    with_prompts(tmp_path / "model", minilm, include_prompt=False, pooling="cls")
    with pytest.raises(UserError, match="pooling cls without the prompt"):
        Embedder.from_pretrained(tmp_path / "model")


FILES = {
    "config_sentence_transformers.json": [{"prompts": {"query": 1}}, {"prompts": []}, {"default_prompt_name": "none"}],
    "sentence_bert_config.json": [{"max_seq_length": "512"}, {"max_seq_length": 0}, {"do_lower_case": "yes"}],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in FILES for content in FILES[name]], ids=str)
def test_what_sentence_transformers_would_not_take_raises_user_error(name, content, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model")
    (tmp_path / "model" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=str(tmp_path / "model")):
        Embedder.from_pretrained(tmp_path / "model")


UNREAD = {
    "tokenizer_args": {"truncation_side": "left"},
    "processing_kwargs": {"text": {"max_length": 8}},
    "query_length": 12,
}


@pytest.mark.parametrize("key", UNREAD)
def test_what_is_not_read_of_the_limits_raises_user_error(key, minilm, tmp_path):
    """It would change the vectors."""
    shutil.copytree(minilm, tmp_path / "model")
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, key: UNREAD[key]}))
    with pytest.raises(UserError, match=f"{key} in the file of limits is not supported"):
        Embedder.from_pretrained(tmp_path / "model")


def test_a_transformer_alone_has_the_length_of_its_tokenizer(minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model", ignore=shutil.ignore_patterns("modules.json", "*sentence*", "1_*"))
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 20}))
    model, theirs = Embedder.from_pretrained(tmp_path / "model"), sentence_transformer(tmp_path / "model")
    assert model.max_seq_length == theirs.max_seq_length == 20
    np.testing.assert_allclose(model.encode(TEXTS), theirs.encode(TEXTS), atol=1e-5, rtol=1e-4)


def change_tokenizer(folder: Path, **changes) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


TEMPLATE = {
    "type": "TemplateProcessing",
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
}
BROKEN = {
    "an id beyond the vocabulary": (
        {"post_processor": TEMPLATE | {
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"x": {"id": "x", "ids": [50000], "tokens": ["x"]}},
        }},
        "a token with id 50000, but the model only 30522 embeddings",
    ),
    "a text twice": (
        {"post_processor": TEMPLATE | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "special_tokens": {}}},
        "it makes more than the 256 tokens allowed",
    ),
    "a panic": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cannot be used"),
    "no unknown token": (
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[NONE]"}, "added_tokens": []},
        "cannot be used",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_tokenizer_that_cannot_be_used_raises_user_error(what, minilm, tmp_path):
    changes, message = BROKEN[what]
    shutil.copytree(minilm, tmp_path / "model")
    change_tokenizer(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        Embedder.from_pretrained(tmp_path / "model").encode(TEXTS)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_batch_size_that_is_none_raises_user_error(batch_size, published):
    with pytest.raises(UserError, match="batch_size: expected a whole number of at least 1"):
        published.encode(TEXTS, batch_size=batch_size)


@pytest.mark.parametrize(
    "arguments", [{"inputs": 5}, {"inputs": None}, {"inputs": ["\ud800"]}, {"inputs": TEXTS, "prompt": 5}], ids=str
)
def test_what_is_no_text_raises_user_error(arguments, published):
    with pytest.raises(UserError, match="expected|not valid Unicode"):
        published.encode(**arguments)
