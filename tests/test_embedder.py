"""Tests of `Embedder` against sentence-transformers on the same folders."""

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
from codiemb_jax import Embedder, UserError, embedder
from codiemb_jax.config import MeshSettings
from codiemb_jax.text.prompts import Tokens
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


def assert_matches(model: Embedder, reference: SentenceTransformer, texts: list[str]) -> None:
    """Asserts that both models have the same prompts and dimensions and give the same embeddings."""
    for name in ("encode_query", "encode_document", "encode"):
        actual, expected = getattr(model, name)(texts), getattr(reference, name)(texts)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=1e-5, err_msg=name)
    assert model.prompts.items() >= reference.prompts.items()
    assert model.max_seq_length == reference.max_seq_length
    assert model.get_embedding_dimension() == reference.get_embedding_dimension()
    np.testing.assert_allclose(
        model.similarity(model.encode(texts[:2]), model.encode(texts)),
        reference.similarity(reference.encode(texts[:2]), reference.encode(texts)).numpy(),
        atol=1e-5,
    )


@pytest.fixture(scope="module")
def published(minilm) -> Embedder:
    return Embedder.from_pretrained(minilm)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a short run on the quickstart model and data."""
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


def test_export_run_and_checkpoint_match_sentence_transformers(run):
    reference = sentence_transformer(run / "export")
    for path in (run / "export", run, run / "checkpoints" / "2"):
        assert_matches(Embedder.from_pretrained(path), reference, TEXTS)


def write_with_prompts(folder: Path, source: Path, *, include_prompt: bool, pooling: str = "mean", **options) -> None:
    """Saves a model with prompts by sentence-transformers."""
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
def test_prompts_match_sentence_transformers(include_prompt, options, minilm, tmp_path):
    write_with_prompts(tmp_path / "model", minilm, include_prompt=include_prompt, **options)
    model, reference = Embedder.from_pretrained(tmp_path / "model"), sentence_transformer(tmp_path / "model")
    assert_matches(model, reference, TEXTS)
    for arguments in ({"prompt_name": "passage"}, {"prompt": "A different prompt: "}, {"prompt": ""}):
        actual, expected = model.encode(TEXTS, **arguments), reference.encode(TEXTS, **arguments)
        np.testing.assert_allclose(actual, expected, atol=1e-5, err_msg=str(arguments))


def test_published_encoder_matches_sentence_transformers(published, minilm):
    assert_matches(published, sentence_transformer(minilm), TEXTS)


def test_conversion_to_checkpoint_and_back_preserves_embeddings(minilm, tmp_path):
    write_with_prompts(tmp_path / "model", minilm, include_prompt=True, max_seq_length=40)
    hf_to_orbax(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "orbax")])
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export"), "--verify"])
    reference = sentence_transformer(tmp_path / "model")
    for folder in ("orbax", "export"):
        assert_matches(Embedder.from_pretrained(tmp_path / folder), reference, TEXTS)
    exported = sentence_transformer(tmp_path / "export")
    np.testing.assert_allclose(exported.encode_query(TEXTS), reference.encode_query(TEXTS), atol=1e-6)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory, tokenizer_files) -> Path:
    """A tiny Qwen3 saved by transformers, without sentence-transformers files."""
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
def test_causal_decoder_matches_sentence_transformers(pooling, decoder, tmp_path):
    write_with_prompts(tmp_path / "model", decoder, include_prompt=True, pooling=pooling)
    assert_matches(Embedder.from_pretrained(tmp_path / "model"), sentence_transformer(tmp_path / "model"), TEXTS[:5])


def test_plain_transformer_matches_sentence_transformers(decoder, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "bert", ignore=shutil.ignore_patterns("modules.json", "*sentence*", "1_*"))
    for folder in (decoder, tmp_path / "bert"):
        model, reference = Embedder.from_pretrained(folder), sentence_transformer(folder)
        np.testing.assert_allclose(model.encode(TEXTS[:5]), reference.encode(TEXTS[:5]), atol=1e-5, rtol=1e-4)


def test_shapes_of_embeddings_and_similarities(published):
    model = published
    assert model.encode(TEXTS[0]).shape == (384,)
    np.testing.assert_allclose(model.encode_query(TEXTS[0]), model.encode_query(TEXTS[:1])[0], atol=1e-6)
    assert model.encode([]).shape == (0, 384)
    assert model.similarity(model.encode(TEXTS[0]), model.encode(TEXTS)).shape == (1, len(TEXTS))


def test_embeddings_do_not_depend_on_order_or_batch_size(published):
    texts = [f"{text} {i}" for i in range(4) for text in TEXTS[:5]]
    expected = published.encode(texts)
    np.testing.assert_allclose(published.encode(texts, batch_size=3), expected, atol=1e-5)
    np.testing.assert_allclose(published.encode(texts[::-1])[::-1], expected, atol=1e-5)


def test_equal_texts_have_exactly_the_same_embedding(published, monkeypatch):
    """In batches of one row, whose positions in the row and neighbors differ."""
    words = np.random.default_rng(0).integers(0, 1000, 40)
    texts = [f"{TEXTS[i % 3]} {word}" for i, word in enumerate(words)]
    texts += [texts[i] for i in np.random.default_rng(1).permutation(40)[:25]]
    lengths: list[int] = []
    plan = embedder.plan_batches
    monkeypatch.setattr(
        embedder, "plan_batches", lambda sizes, *args, **options: lengths.extend(sizes) or plan(sizes, *args, **options)
    )
    vectors = published.encode(texts, batch_size=1)
    assert len(lengths) == len(set(texts))
    for text in set(texts):
        same = vectors[[other == text for other in texts]]
        assert np.all(same == same[0])
    np.testing.assert_allclose(vectors, [published.encode(text) for text in texts], atol=1e-5)


def test_equal_tokens_with_another_content_start_have_another_embedding(published):
    ids = published.tokenizer.tokenize([TEXTS[0]], "", 64)[0].ids
    vectors = published.embed_tokens([Tokens(ids, 0), Tokens(ids, 3), Tokens(ids.copy(), 0)])
    assert np.all(vectors[0] == vectors[2])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01


def test_program_leaves_out_ynnpack(published, monkeypatch):
    programs: list[str] = []
    embed = published._embed
    monkeypatch.setattr(
        published, "_embed", lambda *args: programs.append(embed.lower(*args).compile().as_text()) or embed(*args)
    )
    published.encode(TEXTS)
    assert "ENTRY" in programs[0] and "ynn_fusion" not in programs[0]


def test_embeddings_do_not_depend_on_mesh_or_dtype(published, minilm):
    expected = published.encode(TEXTS)
    sharded = Embedder.from_pretrained(minilm, mesh=MeshSettings(fsdp=2, tensor=2))
    np.testing.assert_allclose(sharded.encode(TEXTS), expected, atol=1e-5)
    bfloat16 = Embedder.from_pretrained(minilm, dtype="bfloat16")
    assert np.sum(bfloat16.encode(TEXTS) * expected, axis=1).min() > 0.999


@pytest.mark.parametrize("folder", ["checkpoints/2", "export"])
def test_instruction_is_inserted_into_query_prompt(folder, run):
    model = Embedder.from_pretrained(run / folder)
    prompt = "Instruction: Find similar code Query: "
    expected = model.encode_query(TEXTS, prompt=prompt)
    np.testing.assert_array_equal(model.encode_query(TEXTS, instruction="Find similar code"), expected)
    np.testing.assert_array_equal(model.encode_query(TEXTS, instruction=""), model.encode_query(TEXTS, prompt=""))


def test_instruction_for_a_model_without_placeholder_raises_user_error(published):
    with pytest.raises(UserError, match="no placeholder for an instruction; give the whole prompt"):
        published.encode_query(TEXTS, instruction="Find similar code")


UNUSUAL_FILES: dict[str, dict] = {
    "no document prompt": {"config_sentence_transformers.json": {
        "prompts": {"query": "q: ", "other": None}, "default_prompt_name": "document",
    }},
    "old name of sentence_bert_config.json": {"sentence_xlm-roberta_config.json": {"max_seq_length": 30}},
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL_FILES)
def test_unusual_files_match_sentence_transformers(name, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model")
    (tmp_path / "model" / "sentence_bert_config.json").unlink()
    for file, content in UNUSUAL_FILES[name].items():
        (tmp_path / "model" / file).write_text(json.dumps(content))
    model, reference = Embedder.from_pretrained(tmp_path / "model"), sentence_transformer(tmp_path / "model")
    assert_matches(model, reference, TEXTS[:5])


INVALID_CALLS: dict[str, tuple[Callable[[Embedder], object], str]] = {
    "unknown prompt": (lambda model: model.encode(TEXTS, prompt_name="title"), "unknown prompt 'title'; available "),
    "not a string": (lambda model: model.encode([1]), "expected a string, found int"),
    "long prompt": (lambda model: model.encode(TEXTS, prompt="word " * 600), "leave no room next to the prompt"),
    "both": (lambda model: model.encode_query(TEXTS, prompt="x", instruction="y"), "or a prompt, not both"),
}


@pytest.mark.parametrize("name", INVALID_CALLS)
def test_invalid_call_raises_user_error(name, published):
    call, message = INVALID_CALLS[name]
    with pytest.raises(UserError, match=message):
        call(published)


def test_folder_without_model_raises_user_error(tmp_path, run):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Embedder.from_pretrained(tmp_path / "empty")
    with pytest.raises(UserError, match="is a folder of checkpoints; give one of them"):
        Embedder.from_pretrained(run / "checkpoints")


def test_cls_pooling_without_prompt_raises_user_error(minilm, tmp_path):
    write_with_prompts(tmp_path / "model", minilm, include_prompt=False, pooling="cls")
    with pytest.raises(UserError, match="pooling cls without the prompt"):
        Embedder.from_pretrained(tmp_path / "model")


INVALID_FILES = {
    "config_sentence_transformers.json": [
        {"prompts": {"query": 1}}, {"prompts": []}, {"default_prompt_name": "none"},
        {"query_template": "no placeholder"}, {"query_template": 1}, {"begin": ["<s>"]},
    ],
    "sentence_bert_config.json": [{"max_seq_length": "512"}, {"max_seq_length": 0}, {"do_lower_case": "yes"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, contents in INVALID_FILES.items() for content in contents], ids=str
)
def test_invalid_sentence_transformers_file_raises_user_error(name, content, minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model")
    (tmp_path / "model" / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=str(tmp_path / "model")):
        Embedder.from_pretrained(tmp_path / "model")


UNSUPPORTED_SETTINGS = {
    "tokenizer_args": {"truncation_side": "left"},
    "processing_kwargs": {"text": {"max_length": 8}},
    "query_length": 12,
    "query_expansion": {"token": "[MASK]"},
}


@pytest.mark.parametrize("key", UNSUPPORTED_SETTINGS)
def test_unsupported_tokenizer_setting_raises_user_error(key, minilm, tmp_path):
    """Ignoring it would change the embeddings."""
    shutil.copytree(minilm, tmp_path / "model")
    settings = {"max_seq_length": 64, key: UNSUPPORTED_SETTINGS[key]}
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"{key} in sentence_\*_config\.json is not supported"):
        Embedder.from_pretrained(tmp_path / "model")


def test_chat_template_raises_user_error(minilm, tmp_path):
    """sentence-transformers puts the texts into the template if the folder says so."""
    shutil.copytree(minilm, tmp_path / "model")
    settings = {"max_seq_length": 64, "modality_config": {"text": {}, "message": {"method": "forward"}}}
    (tmp_path / "model" / "sentence_bert_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="formatted with a chat template, which is not supported; remove `message`"):
        Embedder.from_pretrained(tmp_path / "model")


def test_plain_transformer_uses_model_max_length_of_tokenizer(minilm, tmp_path):
    shutil.copytree(minilm, tmp_path / "model", ignore=shutil.ignore_patterns("modules.json", "*sentence*", "1_*"))
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 20}))
    model, reference = Embedder.from_pretrained(tmp_path / "model"), sentence_transformer(tmp_path / "model")
    assert model.max_seq_length == reference.max_seq_length == 20
    np.testing.assert_allclose(model.encode(TEXTS), reference.encode(TEXTS), atol=1e-5, rtol=1e-4)


def change_tokenizer(folder: Path, **changes) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


TEMPLATE = {
    "type": "TemplateProcessing",
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
}
INVALID_TOKENIZERS = {
    "id outside the vocabulary": (
        {"post_processor": TEMPLATE | {
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"x": {"id": "x", "ids": [50000], "tokens": ["x"]}},
        }},
        "a token with id 50000, but the model has only 30522 embeddings",
    ),
    "text inserted twice": (
        {"post_processor": TEMPLATE | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "special_tokens": {}}},
        "the tokenizer produces more than the 256 tokens allowed",
    ),
    "panic": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "invalid tokenizer.json"),
    "no unknown token": (
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[NONE]"}, "added_tokens": []},
        "invalid tokenizer.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID_TOKENIZERS)
def test_invalid_tokenizer_raises_user_error(name, minilm, tmp_path):
    changes, message = INVALID_TOKENIZERS[name]
    shutil.copytree(minilm, tmp_path / "model")
    change_tokenizer(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        Embedder.from_pretrained(tmp_path / "model").encode(TEXTS)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_invalid_batch_size_raises_user_error(batch_size, published):
    with pytest.raises(UserError, match="batch_size: expected a positive integer"):
        published.encode(TEXTS, batch_size=batch_size)


@pytest.mark.parametrize(
    "arguments", [{"inputs": 5}, {"inputs": None}, {"inputs": ["\ud800"]}, {"inputs": TEXTS, "prompt": 5}], ids=str
)
def test_invalid_text_raises_user_error(arguments, published):
    with pytest.raises(UserError, match="expected|not valid Unicode"):
        published.encode(**arguments)
