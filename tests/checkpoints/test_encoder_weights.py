"""Tests of reading and writing the weights of BERT and XLM-RoBERTa, including those that training does not use."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codiemb_jax.checkpoints.blueprint import Blueprint
from codiemb_jax.checkpoints.model import PretrainedModel
from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint
from codiemb_jax.errors import UserError
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from tests.checkpoints.test_safetensors import (
    DTYPES,
    MIXED,
    Weights,
    open_folder,
    save_folder,
    write_back,
)
from tests.helpers import assert_bitwise, load_weights

CONFIG: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 67, "pad_token_id": 2,
}  # fmt: skip
PREFIXES = {"bert": "bert.", "xlm-roberta": "roberta."}
HEADS = {
    "bert": {
        "cls.predictions.bias": (300,), "cls.predictions.transform.dense.weight": (16, 16),
        "cls.seq_relationship.weight": (2, 16),
    },
    "xlm-roberta": {"lm_head.dense.weight": (16, 16), "lm_head.bias": (300,)},
}  # fmt: skip


def weight_shapes(prefix: str, family: str, head: bool) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of a checkpoint, according to the format."""
    base: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (300, 16),
        "embeddings.position_embeddings.weight": (67, 16),
        "embeddings.token_type_embeddings.weight": (2, 16),
        "embeddings.LayerNorm.weight": (16,),
        "embeddings.LayerNorm.bias": (16,),
        "pooler.dense.weight": (16, 16),
        "pooler.dense.bias": (16,),
    }
    for layer in range(3):
        for name, shape in {
            "attention.self.query": (16, 16),
            "attention.self.key": (16, 16),
            "attention.self.value": (16, 16),
            "attention.output.dense": (16, 16),
            "attention.output.LayerNorm": (16,),
            "intermediate.dense": (24, 16),
            "output.dense": (16, 24),
            "output.LayerNorm": (16,),
        }.items():
            base[f"encoder.layer.{layer}.{name}.weight"] = shape
            base[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    return {prefix + name: shape for name, shape in base.items()} | (HEADS[family] if head else {})


def random_weights(prefix: str, family: str, head: bool, dtypes: tuple[str, ...]) -> Weights:
    random = np.random.default_rng(0)
    weights = {
        name: random.standard_normal(shape).astype(DTYPES[dtypes[i % len(dtypes)]])
        for i, (name, shape) in enumerate(sorted(weight_shapes(prefix, family, head).items()))
    }
    # A constant in old checkpoints.
    return weights | {f"{prefix}embeddings.position_ids": np.arange(67, dtype=np.int64)[None]}


@pytest.fixture
def write_model(tmp_path, tokenizer_files):
    """Writes a model folder and returns its path."""

    def write_model(family: str, weights: Weights, **overrides: Any) -> Path:
        save_folder(tmp_path / "model", CONFIG | {"model_type": family} | overrides, weights)
        tokenizer_files(tmp_path / "model")
        return tmp_path / "model"

    return write_model


@pytest.mark.parametrize("dtypes", [("F32",), ("BF16",), MIXED])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("family", PREFIXES)
def test_weights_round_trip_bitwise(family, prefixed, head, dtypes, write_model, tmp_path):
    prefix = PREFIXES[family] if prefixed else ""
    weights = random_weights(prefix, family, head, dtypes)
    folder = write_model(family, weights)
    model = open_folder(folder)
    assert model.blueprint.prefix == prefix
    assert set(model.stream_passthrough()) == {
        *(name for name in weights if "pooler" in name or "position_ids" in name),
        *(HEADS[family] if head else ()),
    }
    write_back(model, tmp_path / "loaded")
    assert_bitwise(load_weights(tmp_path / "loaded"), weights)
    hf_to_orbax(["--model", str(folder), "--output", str(tmp_path / "orbax")])
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "exported")])
    assert_bitwise(load_weights(tmp_path / "exported"), weights)


@pytest.mark.parametrize("family", PREFIXES)
def test_weights_map_to_the_right_parameters(family, write_model):
    weights = random_weights("", family, False, ("F32",))
    params = open_folder(write_model(family, weights)).load()
    np.testing.assert_array_equal(params["positions"], weights["embeddings.position_embeddings.weight"])
    np.testing.assert_array_equal(params["norm_bias"], weights["embeddings.LayerNorm.bias"])
    layer = "encoder.layer.1."
    for path, name in (
        ("q", "attention.self.query"), ("k", "attention.self.key"), ("v", "attention.self.value"),
        ("o", "attention.output.dense"), ("up", "intermediate.dense"), ("down", "output.dense"),
    ):  # fmt: skip
        np.testing.assert_array_equal(params["layers"][path][1], weights[f"{layer}{name}.weight"].T)
        np.testing.assert_array_equal(params["layers"][f"{path}_bias"][1], weights[f"{layer}{name}.bias"])
    for path, name in (("attention_norm", "attention.output.LayerNorm"), ("mlp_norm", "output.LayerNorm")):
        np.testing.assert_array_equal(params["layers"][path][1], weights[f"{layer}{name}.weight"])
        np.testing.assert_array_equal(params["layers"][f"{path}_bias"][1], weights[f"{layer}{name}.bias"])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ({"hidden_act": "silu"}, ("hidden_act", "'gelu', 'gelu_new', 'gelu_pytorch_tanh' or 'relu'", "'silu'")),
        ({"position_embedding_type": "relative_key"}, ("position_embedding_type", "'absolute'", "'relative_key'")),
        ({"num_attention_heads": 5}, ("num_attention_heads must divide hidden_size",)),
        ({"is_decoder": True}, ("is_decoder", "False")),
        ({"add_cross_attention": True}, ("add_cross_attention", "False")),
        ({"chunk_size_feed_forward": 7}, ("chunk_size_feed_forward", "0")),
        ({"hidden_dropout_prob": 1.0}, ("hidden_dropout_prob", "less than 1")),
        ({"layer_norm_eps": "1e-12"}, ("layer_norm_eps", "'1e-12'")),
    ],
    ids=str,
)
def test_unsupported_config_raises_user_error(override, parts, write_model):
    message = error_message(write_model("bert", random_weights("", "bert", False, ("F32",)), **override))
    for part in ("config.json", *parts):
        assert part in message


def error_message(folder: Path, max_tokens: int | None = None, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        open_folder(folder, max_tokens=max_tokens, **settings)
    return str(error.value)


def test_max_tokens_above_number_of_positions_raises_user_error(write_model):
    """Positions of XLM-RoBERTa start after the padding id, which leaves fewer of them."""
    weights = random_weights("", "bert", False, ("F32",))
    for family, positions in (("bert", 67), ("xlm-roberta", 64)):
        folder = write_model(family, weights)
        assert open_folder(folder).blueprint.max_tokens == positions
        assert open_folder(folder, max_tokens=positions).blueprint.max_tokens == positions
        assert f"data.query_max_tokens and data.passage_max_tokens may be at most {positions}" in error_message(
            folder, positions + 1
        )


def test_mismatched_padding_id_raises_user_error(write_model):
    weights = random_weights("", "xlm-roberta", False, ("F32",))
    message = error_message(write_model("xlm-roberta", weights, pad_token_id=1))
    assert "1 in config.json (pad_token_id) but 2 in the tokenizer" in message
    message = error_message(write_model("xlm-roberta", weights, pad_token_id=80))
    assert "max_position_embeddings 67 leaves no position after pad_token_id 80" in message
    message = error_message(write_model("xlm-roberta", weights, pad_token_id=300, max_position_embeddings=400))
    assert "pad_token_id 300 is outside the vocabulary of 300 tokens (vocab_size)" in message


def test_causal_encoder_raises_user_error(write_model):
    weights = random_weights("", "bert", False, ("F32",))
    assert "model.attention: causal needs a decoder" in error_message(write_model("bert", weights), attention="causal")


def test_checkpoint_keeps_original_dtypes(write_model, tmp_path):
    """A converted checkpoint is no larger than the original."""
    weights = random_weights("", "bert", False, ("BF16",))
    hf_to_orbax(["--model", str(write_model("bert", weights)), "--output", str(tmp_path / "orbax")])
    model: PretrainedModel = open_folder(tmp_path / "orbax")
    assert isinstance(OrbaxCheckpoint(tmp_path / "orbax").blueprint, Blueprint)
    streamed = model.stream()
    assert {str(leaf.dtype) for leaf in streamed["layers"].values()} == {"bfloat16"}
    loaded = model.load()
    assert {str(leaf.dtype) for leaf in loaded["layers"].values()} == {"float32"}
    expected = weights["encoder.layer.2.output.dense.weight"].T
    assert np.asarray(streamed["layers"]["down"])[2].tobytes() == np.ascontiguousarray(expected).tobytes()
    np.testing.assert_array_equal(loaded["layers"]["down"][2], expected.astype(np.float32))
