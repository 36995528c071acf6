"""Shared by the decoder families."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import model_validator

from codiemb_jax.checkpoints.families.family import HFConfig, Weight, check_config
from codiemb_jax.config import Fraction, PositiveFloat, PositiveInt
from codiemb_jax.models.decoder import DecoderConfig
from codiemb_jax.models.rope import Rope

LM_EXTRAS = ("lm_head.weight", "layers.*.self_attn.rotary_emb.inv_freq")
"""Additional weights in language-model checkpoints: the head, and RoPE frequencies in old ones."""


def decoder_weights(qk_norm: bool) -> tuple[Weight, ...]:
    """Returns the table of a Llama-like decoder, without the prefix."""
    layer = "layers.{layer}."
    table = [
        Weight("embedding", "embed_tokens.weight", False),
        Weight("layers.attention_norm", layer + "input_layernorm.weight", False),
        Weight("layers.q", layer + "self_attn.q_proj.weight", True),
        Weight("layers.k", layer + "self_attn.k_proj.weight", True),
        Weight("layers.v", layer + "self_attn.v_proj.weight", True),
        Weight("layers.o", layer + "self_attn.o_proj.weight", True),
        Weight("layers.mlp_norm", layer + "post_attention_layernorm.weight", False),
        Weight("layers.gate", layer + "mlp.gate_proj.weight", True),
        Weight("layers.up", layer + "mlp.up_proj.weight", True),
        Weight("layers.down", layer + "mlp.down_proj.weight", True),
        Weight("norm", "norm.weight", False),
    ]
    if qk_norm:
        table.append(Weight("layers.q_norm", layer + "self_attn.q_norm.weight", False))
        table.append(Weight("layers.k_norm", layer + "self_attn.k_norm.weight", False))
    return tuple(table)


class HFDecoder(HFConfig):
    num_key_value_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rms_norm_eps: PositiveFloat
    max_position_embeddings: PositiveInt = 2048
    attention_dropout: Fraction = 0.0
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    use_sliding_window: Literal[False] | None = False
    layer_types: list[Literal["full_attention"]] | None = None

    @model_validator(mode="after")
    def _heads(self) -> "HFDecoder":
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if not self.head_dim:
            raise ValueError("num_attention_heads must be at most hidden_size unless head_dim is set")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even because RoPE rotates pairs of dimensions")
        return self


def read_decoder_config(
    hf: Mapping[str, Any], *, qk_norm: bool = False, defaults: Mapping[str, Any] = MappingProxyType({}), **scales: float
) -> DecoderConfig:
    """Reads config.json; `defaults` are the values of missing keys, as in transformers."""
    checked = check_config(HFDecoder, {**defaults, **hf})
    assert checked.num_key_value_heads and checked.head_dim  # set by the validator
    return DecoderConfig(
        vocab_size=checked.vocab_size,
        hidden_size=checked.hidden_size,
        mlp_size=checked.intermediate_size,
        layers=checked.num_hidden_layers,
        heads=checked.num_attention_heads,
        kv_heads=checked.num_key_value_heads,
        head_dim=checked.head_dim,
        norm_eps=checked.rms_norm_eps,
        rope=Rope.from_hf(dict(hf)),
        qk_norm=qk_norm,
        max_positions=checked.max_position_embeddings,
        initializer_range=checked.initializer_range,
        attention_dropout=checked.attention_dropout,
        **scales,
    )


def as_stock(hf: Mapping[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    """Returns config.json for an equivalent architecture that transformers supports natively."""
    checked = check_config(HFDecoder, hf)
    # Set explicitly because the other architecture has different defaults.
    explicit = ("head_dim", "num_key_value_heads", "max_position_embeddings")
    return {
        **hf,
        **{name: getattr(checked, name) for name in explicit},
        "model_type": model_type,
        "architectures": [architecture],
    }
