"""The decoder of Llama, Qwen3, UTU (Youtu) and MiniCPM: told apart by its config alone.

Weights of all layers are stacked on a leading axis and the layers run in one `jax.lax.scan`, so that
compile time does not grow with depth.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codiemb_jax.batch import TokenRows
from codiemb_jax.config import ModelSettings
from codiemb_jax.models.attention import Attention
from codiemb_jax.models.layers import TextModel, normal, ones, run_layers
from codiemb_jax.models.rope import Rope, rotate, rotation
from codiemb_jax.sharding import constrain_rows


@dataclass(frozen=True)
class DecoderConfig:
    """What makes one decoder differ from another."""

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
    """RMSNorm of each head's queries and keys before the rotation (Qwen3, UTU)."""
    max_positions: int
    initializer_range: float
    embedding_scale: float = 1.0
    """Factor of the embeddings (MiniCPM)."""
    residual_scale: float = 1.0
    """Factor of what attention and MLP add (MiniCPM)."""
    attention_dropout: float = 0.0

    @property
    def has_dropout(self) -> bool:
        return self.attention_dropout > 0

    def with_dropout(self, rate: float) -> "DecoderConfig":
        return replace(self, attention_dropout=rate)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalizes the last axis in float32, then scales in the type of x, as transformers does."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class DecoderLayers(nnx.Module):
    """All layers' weights; called inside the scan, where each weight has lost its leading axis."""

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
        cosine: jax.Array,
        sine: jax.Array,
        *,
        dropout_keys: jax.Array | None,
    ) -> jax.Array:
        """One layer: [rows, tokens, embed] -> the same."""
        eps, scale = self.config.norm_eps, self.config.residual_scale
        h = rms_norm(x, self.attention_norm[...], eps)
        query, key, value = self._query_key_value(h)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        attended = self.attention(query, key, value, segment_ids, positions, dropout_keys)
        attended = attended.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
        x = x + scale * (attended @ self.o[...].astype(x.dtype))
        h = rms_norm(x, self.mlp_norm[...], eps)
        gate, up, down = (weight[...].astype(x.dtype) for weight in (self.gate, self.up, self.down))
        return constrain_rows(x + scale * ((jax.nn.silu(h @ gate) * (h @ up)) @ down))

    def _query_key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Before the rotation, [rows, heads, tokens, head_dim] and twice [rows, kv_heads, tokens, head_dim]."""
        rows, tokens, _ = x.shape
        config = self.config

        def heads(weight: nnx.Param) -> jax.Array:  # heads before tokens: the order that CPUs like best
            split = (x @ weight[...].astype(x.dtype)).reshape(rows, tokens, -1, config.head_dim)
            return split.transpose(0, 2, 1, 3)

        query, key, value = heads(self.q), heads(self.k), heads(self.v)
        if config.qk_norm:
            query = rms_norm(query, self.q_norm[...], config.norm_eps)
            key = rms_norm(key, self.k_norm[...], config.norm_eps)
        return query, key, value


class Decoder(TextModel):
    """Token ids -> hidden states."""

    def __init__(self, config: DecoderConfig, settings: ModelSettings, rngs: nnx.Rngs):
        super().__init__(config.hidden_size, config.layers, settings, rngs)
        self.config = config
        self.embedding = normal(rngs, config.initializer_range, vocab=config.vocab_size, embed=config.hidden_size)
        attention = Attention(settings.attention == "causal", config.attention_dropout)
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
        # Cast after the look-up: the gradient of a frequent token is summed in the type of the weights.
        x = config.embedding_scale * constrain_rows(self.embedding[...][rows.tokens].astype(self.compute_dtype))
        positions = jnp.asarray(rows.positions)
        cosine, sine = rotation(config.rope.inverse_frequencies(config.head_dim), positions)
        x, tapped = run_layers(
            self.layers,
            config.layers,
            x,
            jnp.asarray(rows.segment_ids),
            positions,
            cosine,
            sine,
            tap_layer=tap_layer,
            tap=tap,
            dropout_keys=dropout_keys,
            remat=self.remat,
        )
        return rms_norm(x, self.norm[...], config.norm_eps), tapped
