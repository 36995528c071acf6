"""Attention on NVIDIA GPUs with cuDNN's fused kernel, through JAX's public function."""

from typing import Literal

import jax


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Computes attention, see `Attention`. `implementation` xla runs without a GPU, for tests."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [rows, tokens, heads, head_dim]
    same_segment = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    attended = jax.nn.dot_product_attention(
        query, key, value, mask=same_segment, is_causal=causal, implementation=implementation
    )
    return attended.swapaxes(1, 2)
