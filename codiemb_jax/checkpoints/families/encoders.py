"""Shared by the encoder families."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import model_validator

from codiemb_jax.checkpoints.families.family import HFConfig, Weight, check_config
from codiemb_jax.config import Fraction, PositiveFloat, PositiveInt
from codiemb_jax.models.encoder import ACTIVATIONS, EncoderConfig

Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
assert set(get_args(Activation)) == set(ACTIVATIONS)

EXTRAS = ("pooler.*", "embeddings.position_ids", "embeddings.token_type_ids")
"""Additional weights in base checkpoints: the pooler, and constants in old ones."""


class HFEncoder(HFConfig):
    hidden_act: Activation = "gelu"
    layer_norm_eps: PositiveFloat = 1e-12
    max_position_embeddings: PositiveInt = 512
    position_embedding_type: Literal["absolute"] | None = "absolute"
    type_vocab_size: PositiveInt = 2
    hidden_dropout_prob: Fraction = 0.1
    attention_probs_dropout_prob: Fraction = 0.1
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    chunk_size_feed_forward: Literal[0] = 0

    @model_validator(mode="after")
    def _heads(self) -> "HFEncoder":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        return self


def read_encoder_config(hf: Mapping[str, Any], *, first_position: int) -> EncoderConfig:
    """Reads config.json; missing keys have the defaults of transformers."""
    checked = check_config(HFEncoder, hf)
    return EncoderConfig(
        vocab_size=checked.vocab_size,
        hidden_size=checked.hidden_size,
        mlp_size=checked.intermediate_size,
        layers=checked.num_hidden_layers,
        heads=checked.num_attention_heads,
        norm_eps=checked.layer_norm_eps,
        activation=checked.hidden_act,
        num_position_embeddings=checked.max_position_embeddings,
        first_position=first_position,
        token_types=checked.type_vocab_size,
        hidden_dropout=checked.hidden_dropout_prob,
        attention_dropout=checked.attention_probs_dropout_prob,
        initializer_range=checked.initializer_range,
    )


def encoder_weights() -> tuple[Weight, ...]:
    """Returns the table of a BERT-like encoder, without the prefix."""

    def both(path: str, name: str, transpose: bool) -> list[Weight]:
        return [Weight(path, f"{name}.weight", transpose), Weight(f"{path}_bias", f"{name}.bias", False)]

    layer = "encoder.layer.{layer}."
    return (
        Weight("embedding", "embeddings.word_embeddings.weight", False),
        Weight("positions", "embeddings.position_embeddings.weight", False),
        Weight("token_types", "embeddings.token_type_embeddings.weight", False),
        *both("norm", "embeddings.LayerNorm", False),
        *both("layers.q", layer + "attention.self.query", True),
        *both("layers.k", layer + "attention.self.key", True),
        *both("layers.v", layer + "attention.self.value", True),
        *both("layers.o", layer + "attention.output.dense", True),
        *both("layers.attention_norm", layer + "attention.output.LayerNorm", False),
        *both("layers.up", layer + "intermediate.dense", True),
        *both("layers.down", layer + "output.dense", True),
        *both("layers.mlp_norm", layer + "output.LayerNorm", False),
    )
