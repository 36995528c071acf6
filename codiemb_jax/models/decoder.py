"""Decoder model for Llama, Qwen3, Granite, MiniCPM and UTU (Youtu), which differ only in their configs.

The weights of all layers are stacked on a leading axis and the layers run in one `jax.lax.scan`, so compile time does
not grow with depth.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.config import ModelSettings
from codiemb_jax.models.attention import Attention, Backend
from codiemb_jax.models.layers import TextModel, linear, normal, ones, run_layers
from codiemb_jax.models.rope import Rope, rotate, rotation
from codiemb_jax.sharding import constrain_rows


@dataclass(frozen=True)
class DecoderConfig:
    """Hyperparameters of a decoder."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: Rope
    qk_norm: bool
    """Whether to apply RMSNorm to the queries and keys of each head before the rotation (Qwen3, UTU)."""
    max_positions: int
    initializer_range: float
    embedding_scale: float = 1.0
    """Factor applied to the token embeddings (MiniCPM, Granite)."""
    residual_scale: float = 1.0
    """Factor applied to the outputs of attention and MLP before they are added (MiniCPM, Granite)."""
    attention_dropout: float = 0.0

    @property
    def has_dropout(self) -> bool:
        return self.attention_dropout > 0

    def with_dropout(self, rate: float) -> "DecoderConfig":
        return replace(self, attention_dropout=rate)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalizes the last axis in float32, then scales in the dtype of x, as transformers does."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale.astype(x.dtype)


class DecoderLayers(nnx.Module):
    """The stacked weights of all layers. Called inside the scan, where each weight lacks its leading axis."""

    def __init__(self, config: DecoderConfig, attention: Attention, rngs: nnx.Rngs):
        self.config, self.attention = config, attention
        layers, embed, mlp, std = config.layers, config.hidden_size, config.mlp_size, config.initializer_range
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.attention_norm = ones(layers=layers, embed=embed)
        self.q = normal(rngs, std, layers=layers, embed=embed, heads=queries)
        self.k = normal(rngs, std, layers=layers, embed=embed, heads=keys)
        self.v = normal(rngs, std, layers=layers, embed=embed, heads=keys)
        self.o = normal(rngs, std, layers=layers, heads=queries, embed=embed)
        if config.qk_norm:
            self.q_norm = ones(layers=layers, head_dim=config.head_dim)
            self.k_norm = ones(layers=layers, head_dim=config.head_dim)
        self.mlp_norm = ones(layers=layers, embed=embed)
        self.gate = normal(rngs, std, layers=layers, embed=embed, mlp=mlp)
        self.up = normal(rngs, std, layers=layers, embed=embed, mlp=mlp)
        self.down = normal(rngs, std, layers=layers, mlp=mlp, embed=embed)

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        *,
        dropout_keys: jax.Array | None,
    ) -> jax.Array:
        """Applies one layer to x, [rows, tokens, embed], and returns the same shape."""
        eps, scale = self.config.norm_eps, self.config.residual_scale
        h = rms_norm(x, self.attention_norm[...], eps)
        query, key, value = self._query_key_value(h)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = self.attention(query, key, value, segment_ids, positions, dropout_keys)
        attended = attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        x = x + scale * (linear(attended, self.o[...].astype(x.dtype)))
        h = rms_norm(x, self.mlp_norm[...], eps)
        gate, up, down = (weight[...].astype(x.dtype) for weight in (self.gate, self.up, self.down))
        return constrain_rows(x + scale * linear(jax.nn.silu(linear(h, gate)) * linear(h, up), down))

    def _query_key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes query, key and value before the rotation.

        Returns:
          query [rows, heads, tokens, head_dim]; key and value [rows, kv_heads, tokens, head_dim].
        """
        rows, tokens, _ = x.shape
        config = self.config

        def project(weight: nnx.Param) -> jax.Array:
            heads = linear(x, weight[...].astype(x.dtype)).reshape(rows, tokens, -1, config.head_dim)
            return heads.transpose(0, 2, 1, 3)  # heads before tokens is fastest on CPUs

        query, key, value = project(self.q), project(self.k), project(self.v)
        if config.qk_norm:
            query = rms_norm(query, self.q_norm[...], config.norm_eps)
            key = rms_norm(key, self.k_norm[...], config.norm_eps)
        return query, key, value


class Decoder(TextModel):
    """Decoder stack that maps token ids to hidden states."""

    def __init__(self, config: DecoderConfig, settings: ModelSettings, backend: Backend, rngs: nnx.Rngs):
        super().__init__(config.hidden_size, config.layers, settings, rngs)
        self.config = config
        self.embedding = normal(rngs, config.initializer_range, vocab=config.vocab_size, embed=config.hidden_size)
        attention = Attention(settings.attention == "causal", config.attention_dropout, backend)
        self.layers = DecoderLayers(config, attention, rngs)
        self.norm = ones(embed=config.hidden_size)

    def __call__(
        self,
        rows: TokenRows,
        tap_layer: int | jax.Array,
        tap: Callable[[jax.Array], Any],
        dropout_keys: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        config = self.config
        # Cast after the lookup, so the gradient of a frequent token is accumulated in the dtype of the weights.
        x = config.embedding_scale * constrain_rows(self.embedding[...][rows.tokens].astype(self.compute_dtype))
        positions = jnp.asarray(rows.positions)
        cos, sin = rotation(config.rope.inverse_frequencies(config.head_dim), positions)
        x, tapped = run_layers(
            self.layers,
            config.layers,
            x,
            jnp.asarray(rows.segment_ids),
            positions,
            cos,
            sin,
            tap_layer=tap_layer,
            tap=tap,
            dropout_keys=dropout_keys,
            remat=self.remat,
        )
        return rms_norm(x, self.norm[...], config.norm_eps), tapped
