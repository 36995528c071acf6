"""Encoder model for BERT and XLM-RoBERTa, with learned position embeddings and post-layer normalization.

Layers are stacked and scanned as in the decoder.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.config import ModelSettings
from codiemb_jax.models.attention import Attention, Backend
from codiemb_jax.models.layers import TextModel, dropout, fold_in, linear, normal, ones, run_layers, zeros
from codiemb_jax.sharding import constrain_rows


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Returns x times the standard normal distribution function of x, computed in float32, in the dtype of x.

    As in PyTorch, and unlike in `jax.nn.gelu`, by the error function and not its complement, which takes longer.
    """
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    y = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
    return (((_normal_cdf(y) + y * density) * gradient.astype(jnp.float32)).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
"""Activation functions by their names in `hidden_act` of Hugging Face configs."""


@dataclass(frozen=True)
class EncoderConfig:
    """Hyperparameters of an encoder."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    norm_eps: float
    activation: str
    num_position_embeddings: int
    """Number of position embeddings, including those before `first_position`."""
    first_position: int
    """Index of the position embedding of a text's first token (XLM-RoBERTa: the padding id + 1)."""
    token_types: int
    hidden_dropout: float
    attention_dropout: float
    initializer_range: float

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def max_positions(self) -> int:
        return self.num_position_embeddings - self.first_position

    @property
    def has_dropout(self) -> bool:
        return self.hidden_dropout > 0 or self.attention_dropout > 0

    def with_dropout(self, rate: float) -> "EncoderConfig":
        return replace(self, hidden_dropout=rate, attention_dropout=rate)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Normalizes the last axis in float32 and returns the dtype of x."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _affine(x: jax.Array, weight: nnx.Param, bias: nnx.Param) -> jax.Array:
    return linear(x, weight[...].astype(x.dtype)) + bias[...].astype(x.dtype)


class EncoderLayers(nnx.Module):
    """The stacked weights of all layers. Called inside the scan, where each weight lacks its leading axis."""

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
        """Applies one layer to x, [rows, tokens, embed], and returns the same shape."""
        config, keys = self.config, dropout_keys
        h = self._attention(x, segment_ids, positions, fold_in(keys, 0))
        h = dropout(h, config.hidden_dropout, fold_in(keys, 1))
        x = layer_norm(x + h, self.attention_norm[...], self.attention_norm_bias[...], config.norm_eps)
        h = ACTIVATIONS[config.activation](_affine(x, self.up, self.up_bias))
        h = dropout(_affine(h, self.down, self.down_bias), config.hidden_dropout, fold_in(keys, 2))
        return constrain_rows(layer_norm(x + h, self.mlp_norm[...], self.mlp_norm_bias[...], config.norm_eps))

    def _attention(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array, dropout_keys: jax.Array | None
    ) -> jax.Array:
        rows, tokens, _ = x.shape

        def project(weight: nnx.Param, bias: nnx.Param) -> jax.Array:  # [rows, heads, tokens, head_dim]
            return _affine(x, weight, bias).reshape(rows, tokens, self.config.heads, -1).transpose(0, 2, 1, 3)

        query, key, value = project(self.q, self.q_bias), project(self.k, self.k_bias), project(self.v, self.v_bias)
        attended = self.attention(query, key, value, segment_ids, positions, dropout_keys)
        return _affine(attended.transpose(0, 2, 1, 3).reshape(rows, tokens, -1), self.o, self.o_bias)


def position_indices(rows: TokenRows, first_position: int) -> jax.Array:
    """Returns the index of each token's position embedding, int32 [rows, tokens].

    If positions start after the padding id (XLM-RoBERTa), a padding token inside a text gets the padding position and
    does not advance the count, as in transformers.
    """
    positions = jnp.asarray(rows.positions)
    if not first_position:
        return positions
    is_padding = jnp.asarray(rows.tokens) == first_position - 1
    # Number of padding tokens among the first 0, 1, … tokens of each row.
    padding_before = jnp.pad(jnp.cumsum(is_padding, axis=1), ((0, 0), (1, 0)))
    columns = jnp.arange(positions.shape[1])
    before_text = jnp.take_along_axis(padding_before, columns - positions, axis=1)
    return jnp.where(is_padding, 0, positions + 1 - padding_before[:, :-1] + before_text) + first_position - 1


class Encoder(TextModel):
    """Encoder stack that maps token ids to hidden states."""

    def __init__(self, config: EncoderConfig, settings: ModelSettings, backend: Backend, rngs: nnx.Rngs):
        super().__init__(config.hidden_size, config.layers, settings, rngs)
        self.config = config
        embed, std = config.hidden_size, config.initializer_range
        self.embedding = normal(rngs, std, vocab=config.vocab_size, embed=embed)
        self.positions = normal(rngs, std, positions=config.num_position_embeddings, embed=embed)
        self.token_types = normal(rngs, std, token_types=config.token_types, embed=embed)
        self.norm, self.norm_bias = ones(embed=embed), zeros(embed=embed)
        self.layers = EncoderLayers(config, Attention(False, config.attention_dropout, backend), rngs)

    def __call__(
        self,
        rows: TokenRows,
        tap_layer: int | jax.Array,
        tap: Callable[[jax.Array], Any],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        config = self.config
        indices = position_indices(rows, config.first_position)
        # All tokens have token type 0, because texts are never encoded as pairs.
        x = self.embedding[...][rows.tokens] + self.token_types[...][0] + self.positions[...][indices]
        x = constrain_rows(
            layer_norm(x, self.norm[...], self.norm_bias[...], config.norm_eps).astype(self.compute_dtype)
        )
        x = dropout(x, config.hidden_dropout, fold_in(dropout_keys, 0))
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
