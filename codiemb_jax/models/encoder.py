"""The encoder of BERT and XLM-RoBERTa: learned positions, norms after each addition.

Layers are stacked and scanned as in the decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.config import ModelSettings
from codiemb_jax.models.attention import Attention
from codiemb_jax.models.layers import TextModel, dropout, fold, normal, ones, run_layers, zeros
from codiemb_jax.sharding import constrain_rows

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""By their names in Hugging Face's `hidden_act`."""


@dataclass(frozen=True)
class EncoderConfig:
    """What makes one encoder differ from another."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    norm_eps: float
    activation: str
    position_rows: int
    """Rows of the table of positions."""
    first_position: int
    """Row of a text's first token (XLM-RoBERTa: the one after the padding id)."""
    token_types: int
    hidden_dropout: float
    attention_dropout: float
    initializer_range: float

    @property
    def max_positions(self) -> int:
        return self.position_rows - self.first_position

    @property
    def has_dropout(self) -> bool:
        return self.hidden_dropout > 0 or self.attention_dropout > 0

    def with_dropout(self, rate: float) -> "EncoderConfig":
        return replace(self, hidden_dropout=rate, attention_dropout=rate)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Normalizes the last axis in float32; returns the type of x."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _linear(x: jax.Array, weight: nnx.Param, bias: nnx.Param) -> jax.Array:
    return x @ weight[...].astype(x.dtype) + bias[...].astype(x.dtype)


class EncoderLayers(nnx.Module):
    """All layers' weights; called inside the scan, where each weight has lost its leading axis."""

    def __init__(self, config: EncoderConfig, attention: Attention, rngs: nnx.Rngs):
        self.config, self.attention = config, attention
        layers, embed, mlp, std = config.layers, config.hidden_size, config.mlp_size, config.initializer_range
        self.q = normal(rngs, std, layers=layers, embed=embed, heads=embed)
        self.k = normal(rngs, std, layers=layers, embed=embed, heads=embed)
        self.v = normal(rngs, std, layers=layers, embed=embed, heads=embed)
        self.o = normal(rngs, std, layers=layers, heads=embed, embed=embed)
        self.q_bias, self.k_bias, self.v_bias = (zeros(layers=layers, heads=embed) for _ in "qkv")
        self.o_bias = zeros(layers=layers, embed=embed)
        self.attention_norm, self.attention_norm_bias = (
            ones(layers=layers, embed=embed),
            zeros(layers=layers, embed=embed),
        )
        self.up, self.up_bias = normal(rngs, std, layers=layers, embed=embed, mlp=mlp), zeros(layers=layers, mlp=mlp)
        self.down = normal(rngs, std, layers=layers, mlp=mlp, embed=embed)
        self.down_bias = zeros(layers=layers, embed=embed)
        self.mlp_norm, self.mlp_norm_bias = ones(layers=layers, embed=embed), zeros(layers=layers, embed=embed)

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, *, dropout_keys: jax.Array | None
    ) -> jax.Array:
        """One layer: [rows, tokens, embed] -> the same."""
        config, keys = self.config, dropout_keys
        h = self._attention(x, segment_ids, positions, fold(keys, 0))
        h = dropout(h, config.hidden_dropout, fold(keys, 1))
        x = layer_norm(x + h, self.attention_norm[...], self.attention_norm_bias[...], config.norm_eps)
        h = ACTIVATIONS[config.activation](_linear(x, self.up, self.up_bias))
        h = dropout(_linear(h, self.down, self.down_bias), config.hidden_dropout, fold(keys, 2))
        return constrain_rows(layer_norm(x + h, self.mlp_norm[...], self.mlp_norm_bias[...], config.norm_eps))

    def _attention(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, dropout_keys: jax.Array | None
    ) -> jax.Array:
        rows, tokens, _ = x.shape

        def heads(weight: nnx.Param, bias: nnx.Param) -> jax.Array:  # [rows, heads, tokens, head_dim]
            return _linear(x, weight, bias).reshape(rows, tokens, self.config.heads, -1).transpose(0, 2, 1, 3)

        query, key, value = heads(self.q, self.q_bias), heads(self.k, self.k_bias), heads(self.v, self.v_bias)
        attended = self.attention(query, key, value, segment_ids, positions, dropout_keys)
        return _linear(attended.transpose(0, 2, 1, 3).reshape(rows, tokens, -1), self.o, self.o_bias)


def position_rows(rows: TokenRows, first_position: int) -> jax.Array:
    """Which row of the table of positions each token takes, int32 [rows, tokens].

    Where rows begin after that of the padding id (XLM-RoBERTa), a padding token inside a text takes the padding's
    row and is not counted, as in transformers.
    """
    positions = jnp.asarray(rows.positions)
    if not first_position:
        return positions
    padding = jnp.asarray(rows.tokens) == first_position - 1
    before = jnp.pad(jnp.cumsum(padding, axis=1), ((0, 0), (1, 0)))  # of a row's first 0, 1, … tokens
    places = jnp.arange(positions.shape[1])
    before_text = jnp.take_along_axis(before, places - positions, axis=1)
    return jnp.where(padding, 0, positions + 1 - before[:, :-1] + before_text) + first_position - 1


class Encoder(TextModel):
    """Token ids -> hidden states."""

    def __init__(self, config: EncoderConfig, settings: ModelSettings, rngs: nnx.Rngs):
        super().__init__(config.hidden_size, config.layers, settings, rngs)
        self.config = config
        embed, std = config.hidden_size, config.initializer_range
        self.embedding = normal(rngs, std, vocab=config.vocab_size, embed=embed)
        self.positions = normal(rngs, std, positions=config.position_rows, embed=embed)
        self.token_types = normal(rngs, std, token_types=config.token_types, embed=embed)
        self.norm, self.norm_bias = ones(embed=embed), zeros(embed=embed)
        self.layers = EncoderLayers(config, Attention(False, config.attention_dropout), rngs)

    def __call__(
        self,
        rows: TokenRows,
        tap_layer: int | jax.Array,
        tap: Callable[[jax.Array], Any],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        config = self.config
        places = position_rows(rows, config.first_position)
        # All tokens are of the first type: a row holds single texts, never pairs.
        x = self.embedding[...][rows.tokens] + self.token_types[...][0] + self.positions[...][places]
        x = constrain_rows(
            layer_norm(x, self.norm[...], self.norm_bias[...], config.norm_eps).astype(self.compute_dtype)
        )
        x = dropout(x, config.hidden_dropout, fold(dropout_keys, 0))
        return run_layers(
            self.layers,
            config.layers,
            x,
            jnp.asarray(rows.segment_ids),
            jnp.asarray(rows.positions),
            tap_layer=tap_layer,
            tap=tap,
            dropout_keys=dropout_keys,
            remat=self.remat,
        )
