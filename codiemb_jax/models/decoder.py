"""The decoder of Llama, Qwen3 and UTU (Youtu): told apart by its config alone.

Weights of all layers are stacked on a leading axis and the layers run in one `jax.lax.scan`, so that
compile time does not grow with depth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from codiemb_jax.batch import ROW_AXES, Rows
from codiemb_jax.config import ModelSettings
from codiemb_jax.models.attention import attend
from codiemb_jax.models.rope import Rope, rotate, rotation


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


def _normal(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    """A matrix with named axes: shape, sharding names and initial values in one place."""
    value = std * jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32)
    return nnx.Param(value, axes=tuple(axes))


def _ones(**axes: int) -> nnx.Param:
    return nnx.Param(jnp.ones(tuple(axes.values()), jnp.float32), axes=tuple(axes))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalises the last axis in float32, then scales in the type of x, as transformers does."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


def by_rows(x: jax.Array) -> jax.Array:
    """Keeps activations spread by rows when a mesh is set, whatever the weights' sharding suggests."""
    axes = tuple(axis for axis in ROW_AXES if axis in jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(axes)) if axes else x


class DecoderLayers(nnx.Module):
    """All layers' weights; called inside the scan, where each weight has lost its leading axis."""

    def __init__(self, config: DecoderConfig, causal: bool, rngs: nnx.Rngs):
        self.config, self.causal = config, causal
        layers, embed, mlp, std = config.layers, config.hidden_size, config.mlp_size, config.initializer_range
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.attention_norm = _ones(layers=layers, embed=embed)
        self.q = _normal(rngs, std, layers=layers, embed=embed, heads=queries)
        self.k = _normal(rngs, std, layers=layers, embed=embed, heads=keys)
        self.v = _normal(rngs, std, layers=layers, embed=embed, heads=keys)
        self.o = _normal(rngs, std, layers=layers, heads=queries, embed=embed)
        if config.qk_norm:
            self.q_norm = _ones(layers=layers, head_dim=config.head_dim)
            self.k_norm = _ones(layers=layers, head_dim=config.head_dim)
        self.mlp_norm = _ones(layers=layers, embed=embed)
        self.gate = _normal(rngs, std, layers=layers, embed=embed, mlp=mlp)
        self.up = _normal(rngs, std, layers=layers, embed=embed, mlp=mlp)
        self.down = _normal(rngs, std, layers=layers, mlp=mlp, embed=embed)

    def __call__(self, x: jax.Array, segments: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
        """One layer: [rows, tokens, embed] -> the same."""
        x = x + self._attention(rms_norm(x, self.attention_norm[...], self.config.norm_eps), segments, cosine, sine)
        h = rms_norm(x, self.mlp_norm[...], self.config.norm_eps)
        gate, up, down = (weight[...].astype(x.dtype) for weight in (self.gate, self.up, self.down))
        return by_rows(x + (jax.nn.silu(h @ gate) * (h @ up)) @ down)

    def _attention(self, x: jax.Array, segments: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
        rows, tokens, _ = x.shape
        eps = self.config.norm_eps

        def heads(weight: nnx.Param) -> jax.Array:  # [rows, heads, tokens, head_dim]: the order CPUs like best
            split = (x @ weight[...].astype(x.dtype)).reshape(rows, tokens, -1, self.config.head_dim)
            return split.transpose(0, 2, 1, 3)

        query, key, value = heads(self.q), heads(self.k), heads(self.v)
        if self.config.qk_norm:
            query, key = rms_norm(query, self.q_norm[...], eps), rms_norm(key, self.k_norm[...], eps)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        mixed = attend(query, key, value, segments, causal=self.causal)
        return mixed.transpose(0, 2, 1, 3).reshape(rows, tokens, -1) @ self.o[...].astype(x.dtype)


class Decoder(nnx.Module):
    """Token ids -> hidden states."""

    def __init__(self, config: DecoderConfig, settings: ModelSettings, rngs: nnx.Rngs):
        self.config = config
        self.compute_dtype = jnp.dtype(settings.compute_dtype)
        self.remat = settings.remat
        self.embedding = _normal(rngs, config.initializer_range, vocab=config.vocab_size, embed=config.hidden_size)
        self.layers = DecoderLayers(config, settings.attention == "causal", rngs)
        self.norm = _ones(embed=config.hidden_size)

    def __call__(
        self, rows: Rows, tap_layer: int | jax.Array, tap: Callable[[jax.Array], Any]
    ) -> tuple[jax.Array, Any]:
        """Hidden states after the final norm, [rows, tokens, embed] in the compute type, and what `tap` makes
        of the states after layer `tap_layer` (not final-normed; 0: the embeddings).

        `tap` runs inside the scan, so that no layer's states need to be kept for it.
        """
        # Cast after the look-up: the gradient of a frequent token is summed in the type of the weights.
        x = by_rows(self.embedding[...][rows.tokens].astype(self.compute_dtype))
        frequencies = self.config.rope.inverse_frequencies(self.config.head_dim)
        cosine, sine = rotation(frequencies, jnp.asarray(rows.positions))
        segments = jnp.asarray(rows.segments)
        graph, weights = nnx.split(self.layers)

        def layer(carry: tuple[jax.Array, Any], scanned: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, Any], None]:
            (x, tapped), (weights, number) = carry, scanned
            x = nnx.merge(graph, weights)(x, segments, cosine, sine)
            return (x, jax.lax.cond(number == tap_layer, tap, lambda _: tapped, x)), None

        numbers = jnp.arange(1, self.config.layers + 1)
        (x, tapped), _ = jax.lax.scan(rematerialised(layer, self.remat), (x, tap(x)), (weights, numbers))
        return rms_norm(x, self.norm[...], self.config.norm_eps), tapped


def rematerialised(body: Callable, remat: str) -> Callable:
    """Wraps a scan's body so that its backward pass recomputes what `remat` (none, dots, full) says."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
