"""Tests of exports: weights round-trip bitwise; sentence-transformers computes the same token ids and embeddings."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GraniteConfig,
    GraniteModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3Model,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from codiemb_jax.checkpoints.blueprint import Blueprint
from codiemb_jax.checkpoints.export import write_export
from codiemb_jax.checkpoints.model import open_checkpoint, open_model
from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint, save_model
from codiemb_jax.checkpoints.safetensors import LazyArray
from codiemb_jax.checkpoints.verify import exported_params, verify
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import Triple
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from tests.helpers import assert_bitwise, load_weights, read_files, sentence_transformer

TINY = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 640, "initializer_range": 0.2,
}  # fmt: skip
QUERY = "Instruction: Given a search query, retrieve passages that answer the question Query: "
SENTENCE = "The committee of the town met on Monday to hear what the engineers say about the new bridge. "
TEXTS = [
    "Paris is the capital of France.",
    "How do plants make sugar out of light, water and air?",
    SENTENCE * 7,  # about 500 tokens
    "A",
    "Who wrote the book that was read by everyone in the year 1924?",
]
CODE = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nraise RuntimeError('code was run')\n"
KINDS = ("utu", "qwen3", "llama", "minicpm", "bert", "xlm-roberta")
ROPE = {"rope_type": "default", "rope_theta": 1.6e6}
ENCODERS = {
    "bert": (BertModel, BertConfig, {}),
    "xlm-roberta": (
        XLMRobertaForMaskedLM,
        XLMRobertaConfig,
        {"max_position_embeddings": 643, "type_vocab_size": 1, "pad_token_id": 2},
    ),
}


def write_model(folder: Path, kind: str) -> None:
    """Writes a random model.

    utu and MiniCPM are in float32 with remote code, Qwen3 in bfloat16; Llama has grouped queries and an untied head,
    BERT a pooler, XLM-RoBERTa a head and prefixed names.
    """
    torch.manual_seed(0)
    if kind in ENCODERS:
        model_class, config_class, overrides = ENCODERS[kind]
        model = model_class(config_class(**TINY | overrides))
    elif kind == "llama":
        config = LlamaConfig(
            **TINY, num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=ROPE, tie_word_embeddings=False
        )
        model = LlamaForCausalLM(config)
    elif kind == "minicpm":
        scales = {"embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 2**0.5, "attention_multiplier": 12**-0.5}
        tiny = TINY | {"initializer_range": 0.05}
        model = GraniteModel(
            GraniteConfig(**tiny, num_key_value_heads=4, rms_norm_eps=1e-6, rope_parameters=ROPE, **scales)
        )
    else:
        heads = {"utu": 4, "qwen3": 2}[kind]
        config = Qwen3Config(**TINY, num_key_value_heads=heads, head_dim=16, rms_norm_eps=1e-6, rope_parameters=ROPE)
        model = Qwen3Model(config)
    for name, weight in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):  # all ones otherwise
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith("bias"):  # all zeros otherwise
            torch.nn.init.normal_(weight, 0.0, 0.2)
    model.to(torch.bfloat16 if kind == "qwen3" else torch.float32).save_pretrained(folder)
    if kind in ("utu", "minicpm"):
        convert_to_published_form(folder, kind)


ORIGINAL_CONFIGS = {
    "utu": {"head_dim": 16, "model_type": "utu", "architectures": ["UTUModel"], "mlp_bias": False},
    "minicpm": {
        "model_type": "minicpm", "architectures": ["MiniCPMModel"], "scale_emb": 12, "scale_depth": 1.4,
        "dim_model_base": 256,
    },
}  # fmt: skip
STOCK_CONFIGS = {
    "utu": {
        "model_type": "qwen3", "architectures": ["Qwen3Model"], "layer_types": ["full_attention"] * 2,
        "use_sliding_window": False,
    },
    "minicpm": {
        "model_type": "granite", "architectures": ["GraniteModel"], "head_dim": 12, "embedding_multiplier": 12.0,
        "residual_multiplier": 1.4 / 2**0.5, "attention_multiplier": 12**-0.5, "logits_scaling": 1.0,
    },
}  # fmt: skip


def convert_to_published_form(folder: Path, kind: str) -> None:
    """Gives a saved model the model_type, remote code and transformers 4 keys of the published checkpoint."""
    config = {
        **TINY,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1.6e6,
        "rope_scaling": None,
        "hidden_act": "silu",
        "auto_map": {"AutoConfig": f"configuration_{kind}.Config", "AutoModel": f"modeling_{kind}.Model"},
        "attention_bias": False,
        "pretraining_tp": 1,
        "torch_dtype": "float32",
        "transformers_version": "4.51.3",
        **ORIGINAL_CONFIGS[kind],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"modeling_{kind}.py").write_text(CODE)
    (folder / f"configuration_{kind}.py").write_bytes(CODE.encode() + b"# \xe4\xb8\xad\r\n")


def executed_code(folder: Path) -> list[Path]:
    """Returns the files that the Python files of a folder create when they are run."""
    return list(folder.rglob("*.ran"))


class Converted:
    """A model, its Orbax checkpoint, and the stock export of the checkpoint."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.model, self.checkpoint, self.export = folder / "model", folder / "orbax", folder / "export"


@pytest.fixture(scope="module")
def convert(tmp_path_factory, tokenizer_files) -> Callable[[str], Converted]:
    """Converts and exports each kind of model once."""

    @cache
    def convert(kind: str) -> Converted:
        converted = Converted(tmp_path_factory.mktemp(kind), kind)
        write_model(converted.model, kind)
        tokenizer_files(converted.model)
        hf_to_orbax(["--model", str(converted.model), "--output", str(converted.checkpoint)])
        export(converted.checkpoint, converted.export)
        return converted

    return convert


@pytest.fixture(scope="module", params=KINDS)
def converted(request, convert) -> Converted:
    return convert(request.param)


@pytest.fixture(scope="module")
def utu(convert) -> Converted:
    return convert("utu")


def export(checkpoint: Path, output: Path) -> None:
    orbax_to_hf(["--checkpoint", str(checkpoint), "--output", str(output), "--architecture", "stock", "--verify"])


def reference_embeddings(
    export: Path, source: Path, texts: Sequence[str], prompt: str = "", end: str = "", limit: int = 10**6
) -> np.ndarray:
    """Computes embeddings with transformers and the original tokenizer: the mean over the tokens after the prompt."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    encoded = [tokenizer.encode(prompt + text + end, add_special_tokens=False) for text in texts]
    ends = tokenizer.encode(end, add_special_tokens=False).ids
    ids = [e.ids if len(e.ids) <= limit else e.ids[: limit - len(ends)] + ends for e in encoded]
    starts = [sum(stop <= len(prompt) for _, stop in e.offsets) for e in encoded]
    tokens = np.zeros((len(texts), max(map(len, ids))), np.int64)
    mask = np.zeros_like(tokens)
    for row, text in enumerate(ids):
        tokens[row, : len(text)], mask[row, : len(text)] = text, 1
    model = AutoModel.from_pretrained(export, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
    vectors = np.stack(
        [hidden[row, start : len(text)].mean(axis=0) for row, (start, text) in enumerate(zip(starts, ids, strict=True))]
    )
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_same_embeddings(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-5)
    cosines = np.sum(actual * expected, axis=1)
    assert cosines.min() > 0.99999, cosines


def test_weights_round_trip_bitwise(converted):
    assert_bitwise(load_weights(converted.export), load_weights(converted.model))


def test_config_changes_only_attention_and_architecture(converted):
    original, exported = (
        json.loads((folder / "config.json").read_text()) for folder in (converted.model, converted.export)
    )
    if converted.kind not in ENCODERS:
        assert exported.pop("is_causal") is False
        assert exported.pop("use_bidirectional_attention") is True
    if stock := STOCK_CONFIGS.get(converted.kind):
        for name, value in stock.items():
            assert exported.pop(name) == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name
        for name in {"auto_map", "scale_emb", "scale_depth", "dim_model_base", *stock} & set(original):
            del original[name]
    assert exported == original
    assert "auto_map" not in exported


def test_export_has_the_files_of_sentence_transformers_and_tei(converted):
    def read(name: str):
        return json.loads((converted.export / name).read_text())

    assert [(m["idx"], m["name"], m["path"], m["type"]) for m in read("modules.json")] == [
        (0, "0", "", "sentence_transformers.models.Transformer"),
        (1, "1", "1_Pooling", "sentence_transformers.models.Pooling"),
        (2, "2", "2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    assert read("1_Pooling/config.json") == {
        "word_embedding_dimension": 48,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": False,
    }
    assert read("config_sentence_transformers.json")["prompts"] == {"query": QUERY, "document": ""}
    assert read("sentence_bert_config.json")["max_seq_length"] == 640
    assert read("tokenizer_config.json")["model_max_length"] == 640
    assert list(converted.export.rglob("*.py")) == []
    assert executed_code(converted.folder) == []


def test_export_matches_sentence_transformers(converted):
    model = sentence_transformer(converted.export)
    assert model.prompts == {"query": QUERY, "document": ""}
    assert model.max_seq_length == 640
    assert model.get_embedding_dimension() == 48
    assert 450 < model.preprocess([TEXTS[2]])["input_ids"].shape[1] < 580
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    assert_same_embeddings(queries, reference_embeddings(converted.export, converted.model, TEXTS, QUERY))
    assert_same_embeddings(documents, reference_embeddings(converted.export, converted.model, TEXTS))
    assert np.abs(queries - documents).max() > 0.01  # the prompt has an effect
    for i, text in enumerate(TEXTS):  # without padding
        assert_same_embeddings(model.encode_query([text]), queries[i : i + 1])
    np.testing.assert_allclose(model.similarity(queries, queries).diagonal(), 1, atol=1e-5)


def first_token_attends_to_last(folder: Path) -> bool:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        hidden = model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    return bool((hidden[0, 0] - hidden[1, 0]).abs().max() > 1e-3)


def test_attention_is_bidirectional(converted):
    assert first_token_attends_to_last(converted.export)


def make_checkpoint(folder: Path, output: Path, prompt: PromptSettings, max_tokens: int | None = None, **settings):
    """Writes a checkpoint as a run would, with the given prompts, limit and model settings."""
    model = open_model(ModelSettings(path=str(folder), **settings), prompt, make_mesh(MeshSettings()), max_tokens)
    save_model(output, model.stream(), model.stream_passthrough(), model.blueprint)


def prompt_tokenizer(blueprint: Blueprint) -> PromptTokenizer:
    return PromptTokenizer(blueprint.tokenizer(), blueprint.prompt)


def token_ids(model: SentenceTransformer, text: str, kind: str) -> list[int]:
    return model.preprocess([text], prompt=model.prompts[kind] or None)["input_ids"][0].tolist()


def test_export_with_begin_and_end_tokens(utu, tmp_path):
    prompt = PromptSettings(
        begin="<s>", query="{instruction}: ", passage="Passage: ", end="</s>", default_instruction="Find it"
    )
    make_checkpoint(utu.model, tmp_path / "orbax", prompt, 96)
    export(tmp_path / "orbax", tmp_path / "export")
    model = sentence_transformer(tmp_path / "export")
    assert model.prompts == {"query": "<s>Find it: ", "document": "<s>Passage: "}
    stored = json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())
    assert (stored["query_template"], stored["begin"]) == ("{instruction}: ", "<s>")
    hf_to_orbax(["--model", str(tmp_path / "export"), "--output", str(tmp_path / "again")])
    assert open_checkpoint(tmp_path / "again").blueprint.sentence.query_template == "{instruction}: "
    assert model.max_seq_length == 96
    tokenizer = prompt_tokenizer(OrbaxCheckpoint(tmp_path / "orbax").blueprint)
    kinds = {"query": (tokenizer.tokenize_queries, "Find it"), "document": (tokenizer.tokenize_passages, "")}
    for kind, (tokenize, instruction) in kinds.items():
        for text, expected in zip(
            TEXTS, tokenize([Triple(instruction, "", text.strip()) for text in TEXTS], 96), strict=True
        ):
            actual = token_ids(model, text.strip(), kind)
            assert actual == expected.ids.tolist()
            assert (actual[0], actual[-1]) == (0, 1)
            assert len(actual) <= 96
    assert len(token_ids(model, TEXTS[2], "query")) == 96  # truncation keeps the end token
    texts = [text.strip() for text in TEXTS]
    expected = reference_embeddings(tmp_path / "export", utu.model, texts, "<s>Find it: ", "</s>", 96)
    assert_same_embeddings(model.encode_query(texts), expected)
    expected = reference_embeddings(tmp_path / "export", utu.model, texts, "<s>Passage: ", "</s>", 96)
    assert_same_embeddings(model.encode_document(texts), expected)


def test_export_with_a_tokenizer_that_merges_the_prompt_space(golden, tmp_path):
    """Byte-level tokenizers merge the space with the first word; the prompt alone has one more token."""
    source = golden / "youtu_tiny"
    make_checkpoint(source, tmp_path / "orbax", PromptSettings(), 256)
    export(tmp_path / "orbax", tmp_path / "export")
    assert_bitwise(load_weights(tmp_path / "export"), load_weights(source))
    model = sentence_transformer(tmp_path / "export")
    texts = ["what is the capital of France", "How do plants make sugar out of light?", "the committee met " * 25]
    tokenizer = prompt_tokenizer(OrbaxCheckpoint(tmp_path / "orbax").blueprint)
    instruction = PromptSettings().default_instruction
    for text, expected in zip(
        texts, tokenizer.tokenize_queries([Triple(instruction, "", text.strip()) for text in texts], 256), strict=True
    ):
        features = model.preprocess([text], prompt=model.prompts["query"])
        assert features["input_ids"][0].tolist() == expected.ids.tolist()
        assert features["prompt_length"] == expected.content_start
    expected = reference_embeddings(tmp_path / "export", source, [text.strip() for text in texts], QUERY)
    assert_same_embeddings(model.encode_query(texts), expected)


def test_export_with_causal_attention(utu, tmp_path):
    make_checkpoint(utu.model, tmp_path / "orbax", PromptSettings(), attention="causal")
    export(tmp_path / "orbax", tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["is_causal"] is True
    assert config["use_bidirectional_attention"] is False
    assert not first_token_attends_to_last(tmp_path / "export")
    model = sentence_transformer(tmp_path / "export")
    assert_same_embeddings(
        model.encode_query(TEXTS), reference_embeddings(tmp_path / "export", utu.model, TEXTS, QUERY)
    )


def test_export_of_minicpm_with_the_original_architecture(convert, tmp_path):
    minicpm = convert("minicpm")
    orbax_to_hf(["--checkpoint", str(minicpm.checkpoint), "--output", str(tmp_path / "export")])
    exported = json.loads((tmp_path / "export" / "config.json").read_text())
    original = json.loads((minicpm.model / "config.json").read_text())
    assert exported == original | {"is_causal": False, "use_bidirectional_attention": True}
    assert (tmp_path / "export" / "modeling_minicpm.py").read_bytes() == (
        minicpm.model / "modeling_minicpm.py"
    ).read_bytes()
    assert executed_code(tmp_path) == executed_code(minicpm.folder) == []


def test_exported_minicpm_can_be_converted_again(convert, tmp_path):
    """It is exported as Granite."""
    minicpm = convert("minicpm")
    hf_to_orbax(["--model", str(minicpm.export), "--output", str(tmp_path / "orbax")])
    export(tmp_path / "orbax", tmp_path / "export")
    assert_bitwise(load_weights(tmp_path / "export"), load_weights(minicpm.model))


POOLING_KEYS = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "last_token": "lasttoken",
    "weighted_mean": "weightedmean_tokens",
}
EXCLUDED = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
INCLUDED = EXCLUDED.model_copy(update={"include_in_pooling": True})


@pytest.mark.parametrize(
    ("kind", "settings", "prompt"),
    [
        ("bert", {"pooling": "cls"}, EXCLUDED),
        ("xlm-roberta", {"pooling": "mean"}, EXCLUDED),
        ("xlm-roberta", {"pooling": "last_token", "normalize": False}, EXCLUDED),
        ("minicpm", {"pooling": "weighted_mean"}, PromptSettings(query="", end="</s>")),
        ("minicpm", {"pooling": "weighted_mean"}, INCLUDED),
        ("xlm-roberta", {"pooling": "mean"}, INCLUDED),
        ("utu", {"pooling": "cls", "projection_dim": 20}, PromptSettings()),
        ("bert", {"pooling": "mean", "projection_dim": 64, "normalize": False}, EXCLUDED),
        ("llama", {"pooling": "last_token", "attention": "causal"}, EXCLUDED),
    ],
    ids=str,
)
def test_poolings_and_projections_match_sentence_transformers(kind, settings, prompt, convert, tmp_path):
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    model = open_model(
        ModelSettings(path=str(convert(kind).model), compute_dtype="float32", **settings), prompt, mesh, 600
    )
    write_export(tmp_path / "export", params := model.load(7), {}, model.blueprint, stock=True)
    names = ["Transformer", "Pooling", *["Dense"] * ("projection_dim" in settings)]
    names += ["Normalize"] * settings.get("normalize", True)
    modules = json.loads((tmp_path / "export" / "modules.json").read_text())
    assert [module["type"].split(".")[-1] for module in modules] == names
    pooling = json.loads((tmp_path / "export" / "1_Pooling" / "config.json").read_text())
    assert [name for name in pooling if pooling[name] is True and name != "include_prompt"] == [
        f"pooling_mode_{POOLING_KEYS[settings['pooling']]}"
    ]
    assert pooling["include_prompt"] is (prompt.include_in_pooling or settings["pooling"] != "mean")
    reference = sentence_transformer(tmp_path / "export")
    texts = [text.strip() for text in TEXTS]
    embedder = Embedder(model.graph, params, model.blueprint, mesh)
    instruction = prompt.default_instruction if prompt.query else ""
    queries, documents = embedder.encode_query(texts, instruction=instruction), embedder.encode_document(texts)
    np.testing.assert_array_equal(embedder.encode_query(texts), queries)
    assert queries.shape == (5, settings.get("projection_dim", 48))
    np.testing.assert_allclose(reference.encode_query(texts), queries, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(reference.encode_document(texts), documents, atol=1e-4, rtol=1e-4)
    norms = np.linalg.norm(queries, axis=1)
    assert np.allclose(norms, 1, atol=1e-5) == settings.get("normalize", True)


def test_export_stores_the_attention(utu, tmp_path):
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    settings = ModelSettings(path=str(utu.model), attention="causal")
    model = open_model(settings, PromptSettings(), mesh)
    write_export(tmp_path / "export", model.load(), {}, model.blueprint, stock=True)
    assert open_model(settings, PromptSettings(), mesh).folder.stored_settings == {}
    hf_to_orbax(["--model", str(tmp_path / "export"), "--output", str(tmp_path / "orbax")])
    assert open_checkpoint(tmp_path / "orbax").blueprint.encoding["attention"] == "causal"


def test_projection_depends_on_the_seed_and_is_stored_in_checkpoints(utu, tmp_path):
    mesh = make_mesh(MeshSettings(fsdp=2))
    settings = ModelSettings(path=str(utu.model), projection_dim=20)
    model = open_model(settings, PromptSettings(), mesh)
    params, same, other = model.load(1), model.load(1), model.load(2)
    kernel = np.asarray(params["projection"]["kernel"])
    assert np.asarray(same["projection"]["kernel"]).tobytes() == kernel.tobytes()
    assert not np.allclose(np.asarray(other["projection"]["kernel"]), kernel)
    bound = 48**-0.5  # as in torch.nn.Linear
    assert np.abs(kernel).max() <= bound
    assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)
    as_lazy = jax.tree.map(lambda leaf: LazyArray(leaf.shape, leaf.dtype, lambda: np.asarray(leaf)), params)
    save_model(tmp_path / "orbax", as_lazy, {}, model.blueprint)
    restored = open_model(settings.model_copy(update={"path": str(tmp_path / "orbax")}), PromptSettings(), mesh)
    assert np.asarray(restored.load(9)["projection"]["kernel"]).tobytes() == kernel.tobytes()
    written = tmp_path / "export"
    orbax_to_hf(
        ["--checkpoint", str(tmp_path / "orbax"), "--output", str(written), "--architecture", "stock", "--verify"]
    )
    dense = load_file(written / "2_Dense" / "model.safetensors")
    assert dense["linear.weight"].tobytes() == np.ascontiguousarray(kernel.T).tobytes()
    for dim in (None, 21):
        with pytest.raises(UserError, match="was trained with a projection to 20; set it to 20"):
            open_model(ModelSettings(path=str(tmp_path / "orbax"), projection_dim=dim), PromptSettings(), mesh)


def test_export_of_weighted_mean_with_excluded_prompts_raises_user_error(convert, tmp_path):
    make_checkpoint(convert("minicpm").model, tmp_path / "orbax", EXCLUDED, pooling="weighted_mean")
    with pytest.raises(UserError, match=r"set prompt\.begin and prompt\.query and prompt\.passage to ''"):
        orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()


def change_weight(export: Path) -> None:
    path = export / "model.safetensors"
    weights = load_file(path)
    weights["layers.1.mlp.up_proj.weight"][3, 5] += 4
    save_file(weights, path, metadata={"format": "pt"})


def make_attention_causal(export: Path) -> None:
    path = export / "config.json"
    path.write_text(path.read_text().replace('"is_causal": false', '"is_causal": true'))


def append_token(export: Path) -> None:
    path = export / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    path.write_text(json.dumps(tokenizer))


def include_prompt_in_pooling(export: Path) -> None:
    path = export / "1_Pooling" / "config.json"
    path.write_text(path.read_text().replace('"include_prompt": false', '"include_prompt": true'))


def remove_normalization(export: Path) -> None:
    path = export / "modules.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))


def run_verify(folder: Path, checkpoint: Path) -> bool:
    model = open_checkpoint(checkpoint)
    return verify(folder, model, Embedder(model.graph, exported_params(model), model.blueprint, model.mesh))


def test_verify_accepts_an_export(utu, capsys):
    assert run_verify(utu.export, utu.checkpoint) is True
    assert "DIFFER" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "corrupt", [change_weight, make_attention_causal, append_token, include_prompt_in_pooling, remove_normalization]
)
def test_verify_detects_corrupted_exports(corrupt, utu, tmp_path, capsys):
    folder = tmp_path / "export"
    shutil.copytree(utu.export, folder)
    before = read_files(folder)
    corrupt(folder)
    assert read_files(folder) != before
    assert run_verify(folder, utu.checkpoint) is False
    output = capsys.readouterr().out
    assert "token ids or embeddings differ" in output
    assert ("DIFFER" in output) == (corrupt is append_token)


def test_failed_verification_exits_with_code_1(utu, tmp_path, monkeypatch):
    def write_and_corrupt(folder: Path, *arguments, **options) -> None:
        write_export(folder, *arguments, **options)
        change_weight(folder)

    monkeypatch.setattr("codiemb_jax.checkpoints.export.write_export", write_and_corrupt)
    with pytest.raises(SystemExit) as caught:
        export(utu.checkpoint, tmp_path / "export")
    assert "verification failed" in str(caught.value.code)  # a string: exit code 1
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_export_with_the_original_architecture_keeps_the_code_and_never_runs_it(utu, tmp_path):
    orbax_to_hf(["--checkpoint", str(utu.checkpoint), "--output", str(tmp_path / "export")])
    source, written = utu.model, tmp_path / "export"
    original, exported = (json.loads((folder / "config.json").read_text()) for folder in (source, written))
    assert exported["model_type"] == "utu"
    assert exported["auto_map"] == original["auto_map"]
    assert exported == original | {"is_causal": False, "use_bidirectional_attention": True}
    for name in ("modeling_utu.py", "configuration_utu.py"):
        assert (written / name).read_bytes() == (source / name).read_bytes()
    assert_bitwise(load_weights(written), load_weights(source))
    assert executed_code(utu.folder) == executed_code(tmp_path) == []
    # The export can be converted again.
    hf_to_orbax(["--model", str(written), "--output", str(tmp_path / "orbax")])
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "again")])
    assert_bitwise(load_weights(tmp_path / "again"), load_weights(source))
    assert executed_code(tmp_path) == []


def test_verify_with_remote_code_raises_user_error(utu, tmp_path):
    arguments = ["--checkpoint", str(utu.checkpoint), "--output", str(tmp_path / "export"), "--verify"]
    with pytest.raises(UserError, match="add --architecture stock"):
        orbax_to_hf(arguments)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_raises_user_error(utu, tmp_path):
    (tmp_path / "existing").mkdir()
    (tmp_path / "existing" / "file").write_text("content")
    for main, option, path in (
        (hf_to_orbax, "--model", utu.model),
        (orbax_to_hf, "--checkpoint", utu.checkpoint),
    ):
        with pytest.raises(UserError, match="existing: already exists"):
            main([option, str(path), "--output", str(tmp_path / "existing")])
    model = open_checkpoint(utu.checkpoint)
    with pytest.raises(UserError, match="existing: already exists"):
        write_export(tmp_path / "existing", model.stream(), {}, model.blueprint, stock=True)
    with pytest.raises(UserError, match="existing: already exists"):
        save_model(tmp_path / "existing", model.stream(), {}, model.blueprint)
    assert read_files(tmp_path) == {"existing/file": b"content"}


def test_full_disk_raises_user_error(utu, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("codiemb_jax.checkpoints.safetensors.save_file", fail)
    model = open_checkpoint(utu.checkpoint)
    with pytest.raises(UserError, match="export: cannot be written: No space left on device"):
        write_export(tmp_path / "export", model.stream(), {}, model.blueprint, stock=True)
    assert list(tmp_path.iterdir()) == []


def test_output_inside_the_input_raises_user_error(utu):
    before = read_files(utu.folder)
    for main, option, path in (
        (hf_to_orbax, "--model", utu.model),
        (orbax_to_hf, "--checkpoint", utu.checkpoint),
    ):
        with pytest.raises(UserError, match=f"is inside the input folder {path}; give a folder outside it"):
            main([option, str(path), "--output", str(path / "a" / "output")])
    assert read_files(utu.folder) == before
    assert not list(utu.folder.glob("*/a"))


def test_exporting_a_folder_without_a_checkpoint_raises_user_error(utu, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (utu.model, tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError, match=f"{path} is not a checkpoint"):
            orbax_to_hf(["--checkpoint", str(path), "--output", str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()


def test_converting_a_folder_without_a_model_raises_user_error(utu, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors not found|config\.json is missing"):
        hf_to_orbax(["--model", str(tmp_path / "empty"), "--output", str(tmp_path / "orbax")])
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        hf_to_orbax(["--model", str(tmp_path / "absent"), "--output", str(tmp_path / "orbax")])
    assert not (tmp_path / "orbax").exists()


def test_converting_a_checkpoint_raises_user_error(utu, tmp_path):
    """It would lose its prompts."""
    with pytest.raises(UserError, match="is already an Orbax checkpoint"):
        hf_to_orbax(["--model", str(utu.checkpoint), "--output", str(tmp_path / "orbax")])
    assert list(tmp_path.iterdir()) == []


def test_invalid_output_path_raises_user_error(utu, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "folder", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"--output .* cannot be created"):
            hf_to_orbax(["--model", str(utu.model), "--output", str(output)])
        with pytest.raises(UserError, match=r"--output .* cannot be created"):
            orbax_to_hf(["--checkpoint", str(utu.checkpoint), "--output", str(output)])
    with pytest.raises(UserError, match=r"--output .* cannot be created"):
        hf_to_orbax(["--model", str(utu.model), "--output", str(tmp_path / "a" / "b" / ("x" * 300))])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bert", {"pooling": "cls", "projection_dim": 24}),
        ("xlm-roberta", {"pooling": "last_token", "normalize": False}),
    ],
)
def test_exports_can_be_converted_and_opened_with_the_same_settings(kind, settings, convert, tmp_path):
    """Pooling, normalization and projection are kept."""
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    settings = ModelSettings(path=str(convert(kind).model), **settings)
    model = open_model(settings, PromptSettings(query="", end="</s>"), mesh, 600)
    write_export(tmp_path / "export", params := model.load(7), {}, model.blueprint, stock=True)
    hf_to_orbax(["--model", str(tmp_path / "export"), "--output", str(tmp_path / "orbax")])
    for path in (tmp_path / "export", tmp_path / "orbax"):
        reopened = open_model(settings.model_copy(update={"path": str(path)}), PromptSettings(), mesh, 600)
        stored = reopened.folder.stored_settings
        assert stored.items() >= settings.model_dump(include={"pooling", "normalize", "projection_dim"}).items()
        for expected, actual in zip(jax.tree.leaves(params), jax.tree.leaves(reopened.load(8)), strict=True):
            assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()
    checkpoint = open_checkpoint(tmp_path / "orbax").blueprint
    assert checkpoint.encoding == model.blueprint.encoding
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "again")])
    assert_bitwise(load_weights(tmp_path / "again"), load_weights(tmp_path / "export"))
    for name in ("modules.json", *(str(path.relative_to(tmp_path / "export")) for path in tmp_path.glob("export/*/*"))):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
