"""HF -> Orbax -> HF: the same weights, and a folder that others load to the same ids and vectors."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
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
from codiemb_jax.checkpoints.verify import as_written, verify
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import Triple
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from tests.helpers import assert_bitwise, content_of, load_weights, sentence_transformer

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
MARK = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\nraise RuntimeError('it was run')\n"
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
    """A random model: utu and MiniCPM in float32 with remote code, Qwen3 in bfloat16, Llama with grouped queries and
    a head of its own, BERT with a pooler, XLM-RoBERTa with a head and prefixed names."""
    torch.manual_seed(0)
    if kind in ENCODERS:
        make, config, own = ENCODERS[kind]
        model = make(config(**TINY | own))
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
        as_published(folder, kind)


OWN = {
    "utu": {"head_dim": 16, "model_type": "utu", "architectures": ["UTUModel"], "mlp_bias": False},
    "minicpm": {
        "model_type": "minicpm", "architectures": ["MiniCPMModel"], "scale_emb": 12, "scale_depth": 1.4,
        "dim_model_base": 256,
    },
}  # fmt: skip
STOCK = {
    "utu": {
        "model_type": "qwen3", "architectures": ["Qwen3Model"], "layer_types": ["full_attention"] * 2,
        "use_sliding_window": False,
    },
    "minicpm": {
        "model_type": "granite", "architectures": ["GraniteModel"], "head_dim": 12, "embedding_multiplier": 12.0,
        "residual_multiplier": 1.4 / 2**0.5, "attention_multiplier": 12**-0.5, "logits_scaling": 1.0,
    },
}  # fmt: skip


def as_published(folder: Path, kind: str) -> None:
    """Turns the saved model into a checkpoint as it is published: other type, remote code, transformers 4 keys."""
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
        **OWN[kind],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / f"modeling_{kind}.py").write_text(MARK)
    (folder / f"configuration_{kind}.py").write_bytes(MARK.encode() + b"# \xe4\xb8\xad\r\n")


def ran(folder: Path) -> list[Path]:
    return list(folder.rglob("*.ran"))


class Converted:
    """A model, its Orbax checkpoint, and the stock folder made of that."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        self.model, self.checkpoint, self.export = folder / "model", folder / "orbax", folder / "export"


@pytest.fixture(scope="module")
def convert(tmp_path_factory, tokenizer_files) -> Callable[[str], Converted]:
    """Converts a model of a kind there and back, once."""

    @cache
    def convert(kind: str) -> Converted:
        made = Converted(tmp_path_factory.mktemp(kind), kind)
        write_model(made.model, kind)
        tokenizer_files(made.model)
        hf_to_orbax(["--model", str(made.model), "--output", str(made.checkpoint)])
        export(made.checkpoint, made.export)
        return made

    return convert


@pytest.fixture(scope="module", params=KINDS)
def converted(request, convert) -> Converted:
    return convert(request.param)


@pytest.fixture(scope="module")
def utu(convert) -> Converted:
    return convert("utu")


def export(checkpoint: Path, output: Path) -> None:
    orbax_to_hf(["--checkpoint", str(checkpoint), "--output", str(output), "--architecture", "stock", "--verify"])


def reference(
    export: Path, source: Path, texts: Sequence[str], prompt: str = "", end: str = "", limit: int = 10**6
) -> np.ndarray:
    """Vectors by transformers, the source's own tokenizer, and a mean over what follows the prompt's characters."""
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


def assert_same_vectors(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    cosines = np.sum(found * expected, axis=1)
    assert cosines.min() > 0.99999, cosines


def test_weights_are_those_of_the_model(converted):
    assert_bitwise(load_weights(converted.export), load_weights(converted.model))


def test_config_is_that_of_the_model_but_for_its_attention(converted):
    came, went = (json.loads((folder / "config.json").read_text()) for folder in (converted.model, converted.export))
    if converted.kind not in ENCODERS:
        assert went.pop("is_causal") is False
        assert went.pop("use_bidirectional_attention") is True
    if stock := STOCK.get(converted.kind):
        for name, value in stock.items():
            assert went.pop(name) == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name
        for name in {"auto_map", "scale_emb", "scale_depth", "dim_model_base", *stock} & set(came):
            del came[name]
    assert went == came
    assert "auto_map" not in went


def test_the_folder_says_what_sentence_transformers_and_tei_read(converted):
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
    assert ran(converted.folder) == []


def test_sentence_transformers_makes_the_same_vectors(converted):
    model = sentence_transformer(converted.export)
    assert model.prompts == {"query": QUERY, "document": ""}
    assert model.max_seq_length == 640
    assert model.get_embedding_dimension() == 48
    assert 450 < model.preprocess([TEXTS[2]])["input_ids"].shape[1] < 580
    queries, documents = model.encode_query(TEXTS), model.encode_document(TEXTS)
    assert_same_vectors(queries, reference(converted.export, converted.model, TEXTS, QUERY))
    assert_same_vectors(documents, reference(converted.export, converted.model, TEXTS))
    assert np.abs(queries - documents).max() > 0.01  # the prompt does something
    for i, text in enumerate(TEXTS):  # no padding
        assert_same_vectors(model.encode_query([text]), queries[i : i + 1])
    np.testing.assert_allclose(model.similarity(queries, queries).diagonal(), 1, atol=1e-5)


def first_token_sees_the_last(folder: Path) -> bool:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        hidden = model(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    return bool((hidden[0, 0] - hidden[1, 0]).abs().max() > 1e-3)


def test_attention_is_bidirectional(converted):
    assert first_token_sees_the_last(converted.export)


def make_checkpoint(folder: Path, output: Path, prompt: PromptSettings, max_tokens: int | None = None, **settings):
    """A checkpoint as a run leaves it: with prompts, attention and lengths of its own."""
    model = open_model(ModelSettings(path=str(folder), **settings), prompt, make_mesh(MeshSettings()), max_tokens)
    save_model(output, model.stream(), model.stream_passthrough(), model.blueprint)


def encoder_of(blueprint: Blueprint) -> PromptTokenizer:
    return PromptTokenizer(blueprint.tokenizer(), blueprint.prompt)


def ids_of(model: SentenceTransformer, text: str, kind: str) -> list[int]:
    return model.preprocess([text], prompt=model.prompts[kind] or None)["input_ids"][0].tolist()


def test_special_tokens_at_both_ends(utu, tmp_path):
    prompt = PromptSettings(
        begin="<s>", query="{instruction}: ", passage="Passage: ", end="</s>", default_instruction="Find it"
    )
    make_checkpoint(utu.model, tmp_path / "orbax", prompt, 96)
    export(tmp_path / "orbax", tmp_path / "export")
    model = sentence_transformer(tmp_path / "export")
    assert model.prompts == {"query": "<s>Find it: ", "document": "<s>Passage: "}
    assert model.max_seq_length == 96
    encoder = encoder_of(OrbaxCheckpoint(tmp_path / "orbax").blueprint)
    kinds = {"query": (encoder.tokenize_queries, "Find it"), "document": (encoder.tokenize_passages, "")}
    for kind, (encode, instruction) in kinds.items():
        for text, ours in zip(
            TEXTS, encode([Triple(instruction, "", text.strip()) for text in TEXTS], 96), strict=True
        ):
            found = ids_of(model, text.strip(), kind)
            assert found == ours.ids.tolist()
            assert (found[0], found[-1]) == (0, 1)
            assert len(found) <= 96
    assert len(ids_of(model, TEXTS[2], "query")) == 96  # truncation keeps the end token
    texts = [text.strip() for text in TEXTS]
    expected = reference(tmp_path / "export", utu.model, texts, "<s>Find it: ", "</s>", 96)
    assert_same_vectors(model.encode_query(texts), expected)
    expected = reference(tmp_path / "export", utu.model, texts, "<s>Passage: ", "</s>", 96)
    assert_same_vectors(model.encode_document(texts), expected)


def test_a_tokenizer_that_joins_the_prompts_blank_with_the_first_word(golden, tmp_path):
    """The golden model's does, as most byte-level tokenizers do; the prompt alone has a token more there."""
    source = golden / "youtu_tiny"
    make_checkpoint(source, tmp_path / "orbax", PromptSettings(), 256)
    export(tmp_path / "orbax", tmp_path / "export")
    assert_bitwise(load_weights(tmp_path / "export"), load_weights(source))
    model = sentence_transformer(tmp_path / "export")
    texts = ["what is the capital of France", "How do plants make sugar out of light?", "the committee met " * 25]
    encoder = encoder_of(OrbaxCheckpoint(tmp_path / "orbax").blueprint)
    instruction = PromptSettings().default_instruction
    for text, ours in zip(
        texts, encoder.tokenize_queries([Triple(instruction, "", text.strip()) for text in texts], 256), strict=True
    ):
        features = model.preprocess([text], prompt=model.prompts["query"])
        assert features["input_ids"][0].tolist() == ours.ids.tolist()
        assert features["prompt_length"] == ours.content
    expected = reference(tmp_path / "export", source, [text.strip() for text in texts], QUERY)
    assert_same_vectors(model.encode_query(texts), expected)


def test_causal_attention(utu, tmp_path):
    make_checkpoint(utu.model, tmp_path / "orbax", PromptSettings(), attention="causal")
    export(tmp_path / "orbax", tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["is_causal"] is True
    assert config["use_bidirectional_attention"] is False
    assert not first_token_sees_the_last(tmp_path / "export")
    model = sentence_transformer(tmp_path / "export")
    assert_same_vectors(model.encode_query(TEXTS), reference(tmp_path / "export", utu.model, TEXTS, QUERY))


def test_minicpm_in_the_original_layout(convert, tmp_path):
    made = convert("minicpm")
    orbax_to_hf(["--checkpoint", str(made.checkpoint), "--output", str(tmp_path / "export")])
    went = json.loads((tmp_path / "export" / "config.json").read_text())
    came = json.loads((made.model / "config.json").read_text())
    assert went == came | {"is_causal": False, "use_bidirectional_attention": True}
    assert (tmp_path / "export" / "modeling_minicpm.py").read_bytes() == (
        made.model / "modeling_minicpm.py"
    ).read_bytes()
    assert ran(tmp_path) == ran(made.folder) == []


def test_an_exported_minicpm_is_read_again(convert, tmp_path):
    """As Granite, the name under which transformers knows it."""
    made = convert("minicpm")
    hf_to_orbax(["--model", str(made.export), "--output", str(tmp_path / "orbax")])
    export(tmp_path / "orbax", tmp_path / "export")
    assert_bitwise(load_weights(tmp_path / "export"), load_weights(made.model))


POOLINGS = {
    "mean": "mean_tokens",
    "cls": "cls_token",
    "last_token": "lasttoken",
    "weighted_mean": "weightedmean_tokens",
}
WRAPPED = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
INCLUDED = WRAPPED.model_copy(update={"include_in_pooling": True})


@pytest.mark.parametrize(
    ("kind", "settings", "prompt"),
    [
        ("bert", {"pooling": "cls"}, WRAPPED),
        ("xlm-roberta", {"pooling": "mean"}, WRAPPED),
        ("xlm-roberta", {"pooling": "last_token", "normalize": False}, WRAPPED),
        ("minicpm", {"pooling": "weighted_mean"}, PromptSettings(query="", end="</s>")),
        ("minicpm", {"pooling": "weighted_mean"}, INCLUDED),
        ("xlm-roberta", {"pooling": "mean"}, INCLUDED),
        ("utu", {"pooling": "cls", "projection_dim": 20}, PromptSettings()),
        ("bert", {"pooling": "mean", "projection_dim": 64, "normalize": False}, WRAPPED),
        ("llama", {"pooling": "last_token", "attention": "causal"}, WRAPPED),
    ],
    ids=str,
)
def test_every_pooling_and_projection_in_sentence_transformers(kind, settings, prompt, convert, tmp_path):
    made = convert(kind)
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    model = open_model(ModelSettings(path=str(made.model), compute_dtype="float32", **settings), prompt, mesh, 600)
    write_export(tmp_path / "export", params := model.load(7), {}, model.blueprint, stock=True)
    names = ["Transformer", "Pooling", *["Dense"] * ("projection_dim" in settings)]
    names += ["Normalize"] * settings.get("normalize", True)
    modules = json.loads((tmp_path / "export" / "modules.json").read_text())
    assert [module["type"].split(".")[-1] for module in modules] == names
    pooling = json.loads((tmp_path / "export" / "1_Pooling" / "config.json").read_text())
    assert [name for name in pooling if pooling[name] is True and name != "include_prompt"] == [
        f"pooling_mode_{POOLINGS[settings['pooling']]}"
    ]
    assert pooling["include_prompt"] is (prompt.include_in_pooling or settings["pooling"] != "mean")
    theirs = sentence_transformer(tmp_path / "export")
    texts = [text.strip() for text in TEXTS]
    ours = Embedder(model.graph, params, model.blueprint, mesh)
    instruction = prompt.default_instruction if prompt.query else ""
    queries, documents = ours.encode_query(texts, instruction=instruction), ours.encode_document(texts)
    np.testing.assert_array_equal(ours.encode_query(texts), queries)
    assert queries.shape == (5, settings.get("projection_dim", 48))
    np.testing.assert_allclose(theirs.encode_query(texts), queries, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(theirs.encode_document(texts), documents, atol=1e-4, rtol=1e-4)
    lengths = np.linalg.norm(queries, axis=1)
    assert np.allclose(lengths, 1, atol=1e-5) == settings.get("normalize", True)


def test_the_direction_of_attention_goes_with_an_export(utu, tmp_path):
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    settings = ModelSettings(path=str(utu.model), attention="causal")
    model = open_model(settings, PromptSettings(), mesh)
    write_export(tmp_path / "export", model.load(), {}, model.blueprint, stock=True)
    assert open_model(settings, PromptSettings(), mesh).folder.stored == {}
    hf_to_orbax(["--model", str(tmp_path / "export"), "--output", str(tmp_path / "orbax")])
    assert open_checkpoint(tmp_path / "orbax").blueprint.encoding["attention"] == "causal"


def test_a_projection_survives_a_checkpoint_and_is_random_by_seed(utu, tmp_path):
    mesh = make_mesh(MeshSettings(fsdp=2))
    settings = ModelSettings(path=str(utu.model), projection_dim=20)
    model = open_model(settings, PromptSettings(), mesh)
    one, same, other = model.load(1), model.load(1), model.load(2)
    kernel = np.asarray(one["projection"]["kernel"])
    assert np.asarray(same["projection"]["kernel"]).tobytes() == kernel.tobytes()
    assert not np.allclose(np.asarray(other["projection"]["kernel"]), kernel)
    bound = 48**-0.5  # of PyTorch's Linear
    assert np.abs(kernel).max() <= bound
    assert np.std(kernel) == pytest.approx(bound / 3**0.5, rel=0.05)
    as_lazy = jax.tree.map(lambda leaf: LazyArray(leaf.shape, leaf.dtype, lambda: np.asarray(leaf)), one)
    save_model(tmp_path / "orbax", as_lazy, {}, model.blueprint)
    again = open_model(settings.model_copy(update={"path": str(tmp_path / "orbax")}), PromptSettings(), mesh)
    assert np.asarray(again.load(9)["projection"]["kernel"]).tobytes() == kernel.tobytes()
    written = tmp_path / "export"
    orbax_to_hf(
        ["--checkpoint", str(tmp_path / "orbax"), "--output", str(written), "--architecture", "stock", "--verify"]
    )
    dense = load_file(written / "2_Dense" / "model.safetensors")
    assert dense["linear.weight"].tobytes() == np.ascontiguousarray(kernel.T).tobytes()
    for dim in (None, 21):
        with pytest.raises(UserError, match="was trained with a projection to 20; set it to 20"):
            open_model(ModelSettings(path=str(tmp_path / "orbax"), projection_dim=dim), PromptSettings(), mesh)


def test_a_weighted_mean_with_prompts_is_not_exported(convert, tmp_path):
    make_checkpoint(convert("minicpm").model, tmp_path / "orbax", WRAPPED, pooling="weighted_mean")
    with pytest.raises(UserError, match=r"set prompt\.begin and prompt\.query and prompt\.passage to nothing"):
        orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()


def change_a_weight(export: Path) -> None:
    path = export / "model.safetensors"
    weights = load_file(path)
    weights["layers.1.mlp.up_proj.weight"][3, 5] += 4
    save_file(weights, path, metadata={"format": "pt"})


def turn_attention(export: Path) -> None:
    path = export / "config.json"
    path.write_text(path.read_text().replace('"is_causal": false', '"is_causal": true'))


def append_a_token(export: Path) -> None:
    path = export / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    path.write_text(json.dumps(tokenizer))


def pool_the_prompt(export: Path) -> None:
    path = export / "1_Pooling" / "config.json"
    path.write_text(path.read_text().replace('"include_prompt": false', '"include_prompt": true'))


def take_normalisation_out(export: Path) -> None:
    path = export / "modules.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))


def verified(folder: Path, checkpoint: Path) -> bool:
    model = open_checkpoint(checkpoint)
    return verify(folder, model, Embedder(model.graph, as_written(model), model.blueprint, model.mesh))


def test_verify_accepts_what_was_exported(utu, capsys):
    assert verified(utu.export, utu.checkpoint) is True
    assert "DIFFER" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil", [change_a_weight, turn_attention, append_a_token, pool_the_prompt, take_normalisation_out]
)
def test_verify_finds_what_is_wrong(spoil, utu, tmp_path, capsys):
    folder = tmp_path / "export"
    shutil.copytree(utu.export, folder)
    before = content_of(folder)
    spoil(folder)
    assert content_of(folder) != before
    assert verified(folder, utu.checkpoint) is False
    output = capsys.readouterr().out
    assert "ids or vectors differ" in output
    assert ("DIFFER" in output) == (spoil is append_a_token)


def test_a_failed_verification_ends_the_program_as_an_error_of_ours(utu, tmp_path, monkeypatch):
    def write_and_spoil(folder: Path, *arguments, **options) -> None:
        write_export(folder, *arguments, **options)
        change_a_weight(folder)

    monkeypatch.setattr("codiemb_jax.checkpoints.export.write_export", write_and_spoil)
    with pytest.raises(SystemExit) as caught:
        export(utu.checkpoint, tmp_path / "export")
    assert "verification failed" in str(caught.value.code)  # a message: exit code 1
    assert (tmp_path / "export" / "model.safetensors").is_file()


def test_the_original_layout_keeps_the_code_and_never_runs_it(utu, tmp_path):
    orbax_to_hf(["--checkpoint", str(utu.checkpoint), "--output", str(tmp_path / "export")])
    source, written = utu.model, tmp_path / "export"
    came, went = (json.loads((folder / "config.json").read_text()) for folder in (source, written))
    assert went["model_type"] == "utu"
    assert went["auto_map"] == came["auto_map"]
    assert went == came | {"is_causal": False, "use_bidirectional_attention": True}
    for name in ("modeling_utu.py", "configuration_utu.py"):
        assert (written / name).read_bytes() == (source / name).read_bytes()
    assert_bitwise(load_weights(written), load_weights(source))
    assert ran(utu.folder) == ran(tmp_path) == []
    # What was written is a model that is read again.
    hf_to_orbax(["--model", str(written), "--output", str(tmp_path / "orbax")])
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "again")])
    assert_bitwise(load_weights(tmp_path / "again"), load_weights(source))
    assert ran(tmp_path) == []


def test_what_needs_remote_code_is_not_verified(utu, tmp_path):
    arguments = ["--checkpoint", str(utu.checkpoint), "--output", str(tmp_path / "export"), "--verify"]
    with pytest.raises(UserError, match="add --architecture stock"):
        orbax_to_hf(arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(utu, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for main, option, path in (
        (hf_to_orbax, "--model", utu.model),
        (orbax_to_hf, "--checkpoint", utu.checkpoint),
    ):
        with pytest.raises(UserError, match="there: already exists"):
            main([option, str(path), "--output", str(tmp_path / "there")])
    model = open_checkpoint(utu.checkpoint)
    with pytest.raises(UserError, match="there: already exists"):
        write_export(tmp_path / "there", model.stream(), {}, model.blueprint, stock=True)
    with pytest.raises(UserError, match="there: already exists"):
        save_model(tmp_path / "there", model.stream(), {}, model.blueprint)
    assert content_of(tmp_path) == {"there/file": b"mine"}


def test_nothing_is_written_into_what_is_read(utu):
    before = content_of(utu.folder)
    for main, option, path in (
        (hf_to_orbax, "--model", utu.model),
        (orbax_to_hf, "--checkpoint", utu.checkpoint),
    ):
        with pytest.raises(UserError, match=f"lies in {path}, which is read; give a folder outside of it"):
            main([option, str(path), "--output", str(path / "a" / "output")])
    assert content_of(utu.folder) == before
    assert not list(utu.folder.glob("*/a"))


def test_what_is_no_checkpoint_is_told(utu, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (utu.model, tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(UserError, match=f"{path} is not a checkpoint"):
            orbax_to_hf(["--checkpoint", str(path), "--output", str(tmp_path / "export")])
    assert not (tmp_path / "export").exists()


def test_what_is_no_model_is_told(utu, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors not found|config\.json is missing"):
        hf_to_orbax(["--model", str(tmp_path / "empty"), "--output", str(tmp_path / "orbax")])
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        hf_to_orbax(["--model", str(tmp_path / "absent"), "--output", str(tmp_path / "orbax")])
    assert not (tmp_path / "orbax").exists()


def test_a_checkpoint_is_not_converted_again(utu, tmp_path):
    """It would lose its prompts."""
    with pytest.raises(UserError, match="is an Orbax checkpoint already"):
        hf_to_orbax(["--model", str(utu.checkpoint), "--output", str(tmp_path / "orbax")])
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_made_is_told(utu, tmp_path):
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
def test_an_exported_folder_is_a_model_that_encodes_alike(kind, settings, convert, tmp_path):
    """Pooling, normalisation and projection go with the folder, into a checkpoint and into another run."""
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    settings = ModelSettings(path=str(convert(kind).model), **settings)
    model = open_model(settings, PromptSettings(query="", end="</s>"), mesh, 600)
    write_export(tmp_path / "export", params := model.load(7), {}, model.blueprint, stock=True)
    hf_to_orbax(["--model", str(tmp_path / "export"), "--output", str(tmp_path / "orbax")])
    for path in (tmp_path / "export", tmp_path / "orbax"):
        again = open_model(settings.model_copy(update={"path": str(path)}), PromptSettings(), mesh, 600)
        stored = again.folder.stored
        assert stored.items() >= settings.model_dump(include={"pooling", "normalize", "projection_dim"}).items()
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again.load(8)), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    checkpoint = open_checkpoint(tmp_path / "orbax").blueprint
    assert checkpoint.encoding == model.blueprint.encoding
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "again")])
    assert_bitwise(load_weights(tmp_path / "again"), load_weights(tmp_path / "export"))
    for name in ("modules.json", *(str(path.relative_to(tmp_path / "export")) for path in tmp_path.glob("export/*/*"))):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
