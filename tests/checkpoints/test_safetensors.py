"""Tests of reading and writing decoder weights, and of the errors for mismatched ones."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from codiemb_jax.checkpoints.families import get_family
from codiemb_jax.checkpoints.model import PretrainedModel, open_model
from codiemb_jax.checkpoints.safetensors import WeightFiles, read_weights, round_to_stored_dtypes, write_weights
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import abstract_model
from codiemb_jax.sharding import make_mesh
from tests.helpers import assert_bitwise, load_weights

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
MIXED = ("F32", "F16", "BF16")
CONFIG: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
    "max_position_embeddings": 64, "attention_multiplier": 8**-0.5,
}  # fmt: skip
FAMILIES = ("utu", "qwen3", "llama", "minicpm", "granite")

Weights = dict[str, np.ndarray]


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of a base model's weights, according to the format."""
    width, mlp, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config["vocab_size"], width), "norm.weight": (width,)}
    for layer in range(config["num_hidden_layers"]):
        names = {
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, queries),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }
        if config["model_type"] in ("utu", "qwen3"):
            names |= {"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)}
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    return shapes


def random_weights(config: dict[str, Any], dtypes: tuple[str, ...], prefix: str = "", head: bool = False) -> Weights:
    """Returns weights with random finite bits (subnormal, huge, -0), cycling through `dtypes`."""
    random = np.random.default_rng(0)
    shapes = {prefix + name: shape for name, shape in weight_shapes(config).items()}
    if head:
        shapes["lm_head.weight"] = (config["vocab_size"], config["hidden_size"])
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        dtype = np.dtype(DTYPES[dtypes[i % len(dtypes)]])
        bits = random.integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        value = np.ascontiguousarray(bits).view(dtype)[..., 0]
        value = np.where(np.isfinite(value.astype(np.float32)), value, np.array(-0.0, dtype))
        weights[name] = np.ascontiguousarray(value.astype(dtype))
    return weights


def save_folder(folder: Path, config: dict[str, Any], weights: Weights, shards: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    names = sorted(weights)
    random = np.random.default_rng(1)
    random.shuffle(names)  # weights of a layer may be in different files
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        shard = names[i::shards]
        save_file({name: weights[name] for name in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def open_folder(
    folder: Path, mesh: MeshSettings | None = None, max_tokens: int | None = None, **settings: Any
) -> PretrainedModel:
    model = ModelSettings(path=str(folder), **settings)
    return open_model(model, PromptSettings(), make_mesh(mesh or MeshSettings()), max_tokens)


def write_back(model: PretrainedModel, folder: Path, **options: int) -> None:
    folder.mkdir()
    blueprint = model.blueprint
    write_weights(
        folder,
        model.load(),
        model.stream_passthrough(),
        model.family.weights,
        blueprint.prefix,
        blueprint.dtypes,
        **options,
    )


@pytest.fixture
def write_model(tmp_path, tokenizer_files):
    """Writes a model folder and returns its path."""

    def write_model(config: dict[str, Any], weights: Weights, shards: int = 1) -> Path:
        folder = tmp_path / "model"
        save_folder(folder, config, weights, shards)
        tokenizer_files(folder)
        return folder

    return write_model


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtypes", [("F32",), ("BF16",), ("F16",), MIXED])
@pytest.mark.parametrize(("prefix", "head"), [("", False), ("model.", False), ("model.", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_round_trip_bitwise(family, prefix, head, dtypes, shards, write_model, tmp_path):
    config = CONFIG | {"model_type": family}
    weights = random_weights(config, dtypes, prefix, head)
    model = open_folder(write_model(config, weights, shards))
    assert model.blueprint.prefix == prefix
    write_back(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_bitwise(load_weights(tmp_path / "out"), weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_map_to_the_right_parameters(family, write_model):
    """A round trip alone would not detect two swapped weights."""
    config = CONFIG | {"model_type": family}
    weights = random_weights(config, ("F32",))
    params = open_folder(write_model(config, weights)).load()
    layer_names = {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
        "up": "mlp.up_proj", "down": "mlp.down_proj",
    }  # fmt: skip
    if family in ("utu", "qwen3"):
        layer_names |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    assert params["layers"].keys() == layer_names.keys()
    for path, name in layer_names.items():
        for layer in range(3):
            np.testing.assert_array_equal(params["layers"][path][layer], weights[f"layers.{layer}.{name}.weight"].T)
    np.testing.assert_array_equal(params["embedding"], weights["embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"], weights["norm.weight"])


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_written_by_transformers_round_trip(family, dtype, tmp_path, tokenizer_files):
    torch.manual_seed(0)
    sizes = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    classes = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config, causal_lm = classes[family]
    model = causal_lm(config(**sizes, tie_word_embeddings=False)).to(dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size="4KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    tokenizer_files(tmp_path / "model")
    write_back(open_folder(tmp_path / "model"), tmp_path / "out")
    expected = load_weights(tmp_path / "model")
    assert "lm_head.weight" in expected and "model.norm.weight" in expected
    assert_bitwise(load_weights(tmp_path / "out"), expected)


@pytest.mark.parametrize("shard_bytes", [1, 700, 2500, 10**6])
def test_written_shards_have_a_complete_index_and_respect_the_size_limit(shard_bytes, write_model, tmp_path):
    config = CONFIG | {"model_type": "qwen3"}
    weights = random_weights(config, MIXED, "model.", head=True)
    write_back(open_folder(write_model(config, weights)), tmp_path / "out", shard_bytes=shard_bytes)
    out = tmp_path / "out"
    assert_bitwise(load_weights(out), weights)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if shard_bytes == 10**6:
        assert [path.name for path in out.iterdir()] == ["model.safetensors"]
        return
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert sorted(path.name for path in out.iterdir()) == [*files, "model.safetensors.index.json"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights.values())
    shards = {file: load_file(out / file) for file in files}
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    for shard in shards.values():
        assert sum(weight.nbytes for weight in shard.values()) <= shard_bytes or len(shard) == 1
    assert len(files) == len(weights) if shard_bytes == 1 else 1 < len(files) < len(weights)
    # The shards can be read.
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer.json").write_text((tmp_path / "model" / "tokenizer.json").read_text())
    write_back(open_folder(out), tmp_path / "again")
    assert_bitwise(load_weights(tmp_path / "again"), weights)


@st.composite
def tiny_configs(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    return {
        "model_type": "qwen3",
        "vocab_size": draw(st.integers(1, 20)),
        "hidden_size": draw(st.integers(1, 12)),
        "intermediate_size": draw(st.integers(1, 12)),
        "num_hidden_layers": draw(st.integers(1, 12)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 4)),
        "rms_norm_eps": 1e-6,
    }


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    tiny_configs(),
    st.lists(st.sampled_from(MIXED), min_size=1, max_size=4),
    st.sampled_from(["", "model."]),
    st.integers(1, 4),
    st.integers(1, 5000),
)
def test_any_tiny_config_round_trips(config, dtypes, prefix, shards, shard_bytes):
    weights = random_weights(config, tuple(dtypes), prefix)
    family = get_family(config)
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    _, abstract = abstract_model(family.model, family.read_config(config), ModelSettings(path="-"), mesh)
    with tempfile.TemporaryDirectory() as name:
        original, exported = Path(name) / "original", Path(name) / "exported"
        save_folder(original, config, weights, shards)
        exported.mkdir()
        files = WeightFiles(original)
        params = read_weights(files, family.weights, prefix, abstract)
        write_weights(exported, params, {}, family.weights, prefix, files.dtypes, shard_bytes)
        assert_bitwise(load_weights(exported), weights)


def test_sharded_mesh_reads_the_same_values(write_model, tmp_path):
    config = CONFIG | {"model_type": "utu"}
    weights = random_weights(config, MIXED)
    folder = write_model(config, weights, shards=2)
    unsharded = open_folder(folder).load()
    model = open_folder(folder, MeshSettings(fsdp=4, tensor=2))
    sharded = model.load()
    for expected, actual in zip(jax.tree.leaves(unsharded), jax.tree.leaves(sharded), strict=True):
        assert expected.dtype == actual.dtype == np.float32
        assert np.asarray(expected).tobytes() == np.asarray(actual).tobytes()
    sizes = {name: leaf.addressable_shards[0].data.shape for name, leaf in sharded["layers"].items()}
    assert sizes["q"] == (3, 4, 16)  # embed / 4, heads / 2
    assert sizes["o"] == (3, 16, 4)
    assert sizes["down"] == (3, 12, 4)
    assert sizes["q_norm"] == (3, 8)
    assert sharded["embedding"].addressable_shards[0].data.shape == (300, 4)
    write_back(model, tmp_path / "out")
    assert_bitwise(load_weights(tmp_path / "out"), weights)


def test_device_reads_only_its_own_shards(write_model, monkeypatch):
    config = CONFIG | {"model_type": "utu"}
    weights = random_weights(config, ("F32",))
    folder = write_model(config, weights)
    model = open_folder(folder, MeshSettings(fsdp=4, tensor=2))
    largest: dict[str, int] = {}
    original = WeightFiles.read

    def read(self, name, index=(slice(None),)):
        value = original(self, name, index)
        largest[name] = max(largest.get(name, 0), value.size)
        return value

    monkeypatch.setattr(WeightFiles, "read", read)
    model.load()
    assert largest["layers.1.self_attn.q_proj.weight"] == 32 * 16 // 8
    assert largest["layers.2.mlp.down_proj.weight"] == 16 * 24 // 8
    assert largest["embed_tokens.weight"] == 300 * 16 // 4


def test_round_to_stored_dtypes_matches_written_files(write_model, tmp_path):
    """Layers of a stacked weight may have different dtypes."""
    config = CONFIG | {"model_type": "llama"}
    model = open_folder(write_model(config, random_weights(config, MIXED)))
    random = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), model.abstract)
    table, dtypes = model.family.weights, model.blueprint.dtypes
    rounded = round_to_stored_dtypes(params, table, "", dtypes)
    for name, tree in {"rounded": rounded, "original": params}.items():
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, tree, {}, table, "", dtypes)
    assert_bitwise(load_weights(tmp_path / "rounded"), load_weights(tmp_path / "original"))
    written = load_weights(tmp_path / "original")
    for layer in range(3):
        expected = written[f"layers.{layer}.self_attn.q_proj.weight"].T.astype(np.float32)
        np.testing.assert_array_equal(rounded["layers"]["q"][layer].astype(np.float32), expected)


def test_bfloat16_parameters_are_rounded(write_model):
    config = CONFIG | {"model_type": "llama"}
    weights = random_weights(config, ("F32",))
    params = open_folder(write_model(config, weights), param_dtype="bfloat16").load()
    expected = weights["embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    assert np.asarray(params["embedding"]).tobytes() == expected.tobytes()


def error_message(folder: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        open_folder(folder, **settings)
    return str(error.value)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_all_mismatches_are_listed_at_once(prefix, write_model):
    config = CONFIG | {"model_type": "qwen3"}
    weights = random_weights(config, ("F32",), prefix)
    for name in ("norm.weight", "layers.1.self_attn.k_norm.weight"):
        del weights[prefix + name]
    weights[prefix + "layers.0.mlp.down_proj.weight"] = np.zeros((24, 16), np.float32)
    weights[prefix + "embed_tokens.weight"] = np.zeros((301, 16), np.float32)
    weights[prefix + "layers.2.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    weights[prefix + "layers.2.mlp.up_proj.weight"] = np.zeros((24, 16), np.int32)
    weights |= {f"{prefix}layers.3.extra{i}": np.zeros(i, np.float32) for i in range(30)}
    folder = write_model(config, weights)
    head, *problems = error_message(folder).splitlines()
    assert head == f"{folder}: weights do not match config.json:"
    assert sorted(problems) == sorted(
        [
            f"  missing: {prefix}norm.weight [16]",
            f"  missing: {prefix}layers.1.self_attn.k_norm.weight [8]",
            f"  shape: {prefix}layers.0.mlp.down_proj.weight is [24, 16], expected [16, 24] from config.json",
            f"  shape: {prefix}embed_tokens.weight is [301, 16], expected [300, 16] from config.json",
            f"  dtype: {prefix}layers.2.mlp.up_proj.weight is I32, expected one of F32, F16, BF16",
            f"  unexpected: {prefix}layers.2.self_attn.q_proj.bias [32]",
            *[f"  unexpected: {prefix}layers.3.extra{i} [{i}]" for i in range(30)],
        ]
    )


def test_head_is_passed_through_and_second_embedding_raises_user_error(write_model):
    config = CONFIG | {"model_type": "llama"}
    weights = random_weights(config, ("BF16",), "model.", head=True)
    model = open_folder(write_model(config, weights))
    (name,) = model.stream_passthrough()
    assert name == "lm_head.weight"
    assert np.asarray(model.stream_passthrough()[name]).tobytes() == weights[name].tobytes()
    weights["embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    assert "unexpected: embed_tokens.weight" in error_message(write_model(config, weights))


def change_index(folder: Path, **weight_map: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "weight_map": index["weight_map"] | weight_map}))


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors"])
def test_index_outside_of_folder_raises_user_error(name, write_model, tmp_path):
    config = CONFIG | {"model_type": "llama"}
    weights = random_weights(config, ("F32",))
    folder = write_model(config, weights, shards=2)
    save_file(weights, tmp_path / "x.safetensors")
    change_index(folder, **{"norm.weight": name})
    message = error_message(folder)
    assert message.startswith(f"{folder / 'model.safetensors.index.json'}: weight_map: {name!r} is not the name of")


def test_invalid_index_raises_user_error(write_model):
    folder = write_model(CONFIG | {"model_type": "llama"}, random_weights(CONFIG | {"model_type": "llama"}, ("F32",)))
    for text in ("{", "[" * 100_000, "[]", '{"weight_map": []}', "{}", '{"weight_map": {"norm.weight": 3}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json: " in error_message(folder)


def test_missing_shard_raises_user_error(write_model):
    config = CONFIG | {"model_type": "llama"}
    folder = write_model(config, random_weights(config, ("F32",)), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors not found; weights must be safetensors" in error_message(folder)


def test_overlong_shard_name_raises_user_error(write_model):
    config = CONFIG | {"model_type": "llama"}
    folder = write_model(config, random_weights(config, ("F32",)), shards=2)
    change_index(folder, **{"norm.weight": "x" * 300})
    assert f"{'x' * 300} not found" in error_message(folder)


def test_weight_in_two_shards_or_none_raises_user_error(write_model):
    config = CONFIG | {"model_type": "llama"}
    folder = write_model(config, random_weights(config, ("F32",)), shards=2)
    change_index(folder, **{"lm_head.weight": "model-00001-of-00002.safetensors"})
    assert "weight_map: no file contains lm_head.weight" in error_message(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))
    weights = load_file(first)
    save_file(weights | load_file(second), second)
    assert f"{second}: " in error_message(folder)
    assert "is also in model-00001-of-00002.safetensors; remove one of them" in error_message(folder)


def test_passthrough_weight_with_unsupported_dtype_raises_user_error(write_model):
    config = CONFIG | {"model_type": "llama"}
    folder = write_model(config, {})
    weights = {name: torch.from_numpy(weight) for name, weight in random_weights(config, ("F32",)).items()}
    head = torch.zeros((300, 16), dtype=torch.float8_e4m3fn)
    save_torch_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    assert "dtype: lm_head.weight is F8_E4M3, expected one of BF16, F16, F32, F64, I8" in error_message(folder)


def test_pickled_weights_raise_user_error(write_model):
    config = CONFIG | {"model_type": "llama"}
    folder = write_model(config, random_weights(config, ("F32",)))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = error_message(folder)
    assert "model.safetensors not found" in message
    assert "pytorch_model.bin is not read" in message


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file_raises_user_error(keep, write_model):
    config = CONFIG | {"model_type": "llama"}
    folder = write_model(config, random_weights(config, ("F32",)))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert error_message(folder).startswith(f"{path}: invalid safetensors file: ")


UNSUPPORTED = {
    "model_type": ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported", FAMILIES),
    "no model_type": ({"model_type": None}, "model_type None is not supported", FAMILIES),
    "rope_scaling": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "rope_type 'yarn' is not supported",
        ("default", "linear", "llama3"),
    ),
    "rope_parameters": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        "rope_type 'longrope' is not supported",
        ("default", "linear", "llama3"),
    ),
    "old RoPE key": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type 'dynamic' is not supported",
        ("default", "linear", "llama3"),
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_config_names_supported_values(case, write_model):
    override, message, supported = UNSUPPORTED[case]
    config = CONFIG | {"model_type": "qwen3"}
    folder = write_model(config | override, random_weights(config, ("F32",)))
    error = error_message(folder)
    assert message in error
    for name in supported:
        assert name in error.split("not supported")[1]


INVALID = {
    "attention_multiplier": (
        {"model_type": "granite", "attention_multiplier": 0.5},
        ("attention_multiplier 0.5 is not supported", "head_dim ** -0.5"),
    ),
    "scale_depth": ({"model_type": "minicpm", "scale_depth": 0}, ("scale_depth", "greater than 0")),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act", "'silu'", "'gelu'")),
    "attention bias": ({"attention_bias": True}, ("attention_bias", "False", "True")),
    "MLP bias": ({"mlp_bias": True}, ("mlp_bias", "False", "True")),
    "sliding window": ({"use_sliding_window": True}, ("use_sliding_window", "False", "True")),
    "indivisible heads": ({"num_key_value_heads": 3}, ("num_key_value_heads must divide num_attention_heads",)),
    "string for an integer": ({"hidden_size": "16"}, ("hidden_size", "'16'")),
    "string for a float": ({"rms_norm_eps": "1e-6"}, ("rms_norm_eps", "'1e-6'")),
    "sliding layers": ({"layer_types": ["sliding_attention"] * 3}, ("layer_types", "'full_attention'")),
    "nested rope": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        ("separate rope_parameters for full_attention layers",),
    ),
    "huge theta": ({"rope_theta": 10**400}, ("rope_theta", "expected a positive number")),
    "more heads than hidden_size": (
        {"num_attention_heads": 64, "head_dim": None, "num_key_value_heads": None},
        ("num_attention_heads must be at most hidden_size",),
    ),
    "too many layers": ({"num_hidden_layers": 10**9}, ("num_hidden_layers", "1000")),
    "no hidden_size": ({"hidden_size": None}, ("hidden_size", "None")),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, ("linear", "factor")),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_config_raises_user_error(case, write_model):
    override, parts = INVALID[case]
    config = CONFIG | {"model_type": "qwen3"}
    error = error_message(write_model(config | override, random_weights(config, ("F32",))))
    assert "config.json" in error
    for part in parts:
        assert part in error


def test_all_config_problems_are_listed_at_once(write_model):
    config = CONFIG | {"model_type": "qwen3"}
    weights = random_weights(config, ("F32",))
    incomplete = {name: value for name, value in config.items() if name not in ("hidden_size", "rms_norm_eps")}
    error = error_message(write_model(incomplete | {"hidden_act": "relu", "mlp_bias": True}, weights))
    _, *problems = error.splitlines()
    assert sorted(problem.split()[0] for problem in problems) == [
        "hidden_act:",
        "hidden_size:",
        "mlp_bias:",
        "rms_norm_eps:",
    ]


def test_max_tokens_above_number_of_positions_raises_user_error(write_model):
    config = CONFIG | {"model_type": "utu"}
    folder = write_model(config, random_weights(config, ("F32",)))
    settings, prompt, mesh = ModelSettings(path=str(folder)), PromptSettings(), make_mesh(MeshSettings())
    with pytest.raises(UserError) as error:
        open_model(settings, prompt, mesh, 65)
    message = str(error.value)
    assert "data.query_max_tokens and data.passage_max_tokens may be at most 64" in message
    assert "max_position_embeddings" in message
    assert open_model(settings, prompt, mesh, 64).blueprint.max_tokens == 64
    assert open_model(settings, prompt, mesh).blueprint.max_tokens == 64


def test_mesh_that_does_not_divide_the_model_raises_user_error(write_model):
    config = CONFIG | {"model_type": "utu", "intermediate_size": 25}
    folder = write_model(config, random_weights(config, ("F32",)))
    with pytest.raises(UserError, match=r"mesh\.tensor 2 does not divide the size of the model's axis 'mlp', 25"):
        open_folder(folder, MeshSettings(tensor=2))


def test_bfloat16_weights_keep_their_size(write_model, tmp_path):
    """A bfloat16 checkpoint loaded as float32 is written in bfloat16 again."""
    config = CONFIG | {"model_type": "utu"}
    write_back(open_folder(write_model(config, random_weights(config, ("BF16",)))), tmp_path / "out")
    parameters = sum(math.prod(shape) for shape in weight_shapes(config).values())
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    header = int.from_bytes((tmp_path / "out" / "model.safetensors").read_bytes()[:8], "little")
    assert size == 8 + header + 2 * parameters
