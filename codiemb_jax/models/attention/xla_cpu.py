"""Attention in plain JAX for CPUs: in blocks that fit into their caches, without the texts that a block cannot see.

Scores of whole rows are limited by the speed of memory. Here one row is computed after the other, a block of queries at
a time, and the backward pass computes the scores again. It saves the output and the log-sum-exp, as in FlashAttention
(arXiv 2205.14135). A block reads only a window of keys, the shortest of a few lengths that has all texts of the block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from codiemb_jax.models.attention.saved import SAVED

BLOCK_TOKENS = 192
"""Maximum number of queries per block. In larger blocks, products are more efficient, but more scores are masked."""
WINDOW_MULTIPLE = 64
"""The lengths of windows are multiples of this, except for that of a whole row."""
WINDOW_GROWTH = 1.2
"""Each length is about this many times the one before. More lengths mask fewer scores, but take longer to compile."""
MASKED = jnp.finfo(jnp.float32).min


class Blocks(NamedTuple):
    """Queries of a row in blocks. The leading axis of every array is [blocks]."""

    query: jax.Array
    """float [blocks, kv_heads, heads / kv_heads, queries, head_dim], scaled"""
    segment_ids: jax.Array
    """int [blocks, queries]"""
    indices: jax.Array
    """int [blocks, queries]: the index of each query in its row"""
    window: jax.Array
    """int [blocks]: the index of the shortest window that has all texts of the block"""
    start: jax.Array
    """int [blocks]: the first key of that window"""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, causal: bool) -> jax.Array:
    """Computes attention, see `Attention`."""
    return _forward(query, key, value, segment_ids, causal)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, causal: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def attend_row(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, key, value, segments = row

        def attend_block(block: Blocks) -> tuple[jax.Array, jax.Array]:
            def attend_window(size: int) -> tuple[jax.Array, jax.Array]:
                scores, _, (_, block_value) = _window(block, (key, value), segments, size, causal)
                largest = jnp.max(scores, axis=-1, keepdims=True)
                weights = jnp.exp(scores - largest)
                total = jnp.sum(weights, axis=-1, keepdims=True)
                attended = jnp.einsum(
                    "kgqs,ksd->kgqd", weights.astype(value.dtype), block_value, preferred_element_type=jnp.float32
                )
                return (attended / total).astype(value.dtype), largest + jnp.log(total)

            return _switch(attend_window, block, key.shape[1])

        return jax.lax.map(attend_block, _split(query, segments, key.shape[0], causal))

    attended, log_sums = jax.lax.map(attend_row, (query, key, value, segment_ids))
    attended = checkpoint_name(_join(attended, query.shape), SAVED)
    return attended, (query, key, value, segment_ids, attended, checkpoint_name(log_sums, SAVED))


def _backward(causal: bool, saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, segment_ids, attended, log_sums = saved
    scale = query.shape[-1] ** -0.5

    def row_gradients(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        query, key, value, segments, attended, log_sums, gradient = row
        kv_heads, tokens, head_dim = key.shape
        # The gradient of the softmax needs, per query, the sum over keys of weight times gradient of the weight.
        sums = jnp.sum(gradient.astype(jnp.float32) * attended.astype(jnp.float32), axis=-1, keepdims=True)

        def block_gradients(
            totals: Any, inputs: tuple[Blocks, jax.Array, jax.Array, jax.Array]
        ) -> tuple[Any, jax.Array]:
            block, gradient, sums, log_sums = inputs

            def window_gradients(size: int) -> tuple[Any, jax.Array]:
                scores, start, (block_key, block_value) = _window(block, (key, value), segments, size, causal)
                weights = jnp.exp(scores - log_sums)
                d_weights = jnp.einsum("kgqd,ksd->kgqs", gradient, block_value, preferred_element_type=jnp.float32)
                d_scores = (weights * (d_weights - sums)).astype(key.dtype)
                d_query = jnp.einsum("kgqs,ksd->kgqd", d_scores, block_key, preferred_element_type=jnp.float32) * scale
                d_key = _sum_over_queries(block.query, d_scores)
                d_value = _sum_over_queries(gradient, weights.astype(value.dtype))
                return tuple(
                    jax.lax.dynamic_update_slice_in_dim(
                        total, jax.lax.dynamic_slice_in_dim(total, start, size, 2) + change, start, 2
                    )
                    for total, change in zip(totals, (d_key, d_value), strict=True)
                ), d_query.astype(query.dtype)

            return _switch(window_gradients, block, tokens)

        blocks = _split(query, segments, kv_heads, causal)
        zeros = jnp.zeros((kv_heads, head_dim, tokens), jnp.float32)
        inputs = (blocks, _split_tokens(gradient, kv_heads), _split_tokens(sums, kv_heads), log_sums)
        (d_key, d_value), d_query = jax.lax.scan(block_gradients, (zeros, zeros), inputs)
        d_key, d_value = (total.astype(key.dtype).swapaxes(1, 2) for total in (d_key, d_value))
        return d_query, d_key, d_value

    rows = (query, key, value, segment_ids, attended, log_sums, gradient)
    d_query, d_key, d_value = jax.lax.map(row_gradients, rows)
    return _join(d_query, query.shape), d_key, d_value, None


attend.defvjp(_forward, _backward)


def _block_size(tokens: int) -> int:
    """Returns the number of queries per block, so that blocks are about equal."""
    return -(-tokens // -(-tokens // BLOCK_TOKENS))


def _split_tokens(x: jax.Array, kv_heads: int) -> jax.Array:
    """Splits a row, [heads, tokens, …], into blocks, [blocks, kv_heads, heads / kv_heads, queries, …]."""
    size = _block_size(x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), (0, 0)])
    x = x.reshape(kv_heads, -1, x.shape[1] // size, size, x.shape[2])
    return x.transpose(2, 0, 1, 3, 4)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Reverses `_split_tokens` for all rows; `shape` is [rows, heads, tokens, head_dim]."""
    rows, heads, tokens, head_dim = shape
    return x.transpose(0, 2, 3, 1, 4, 5).reshape(rows, heads, -1, head_dim)[:, :, :tokens]


def _split(query: jax.Array, segment_ids: jax.Array, kv_heads: int, causal: bool) -> Blocks:
    """Splits a row, query [heads, tokens, head_dim] and segment_ids [tokens], into blocks."""
    tokens = query.shape[1]
    size = _block_size(tokens)
    indices = jnp.arange(tokens)
    changes = segment_ids[1:] != segment_ids[:-1]
    first = jax.lax.cummax(jnp.where(jnp.pad(changes, (1, 0), constant_values=True), indices, 0))
    last = jax.lax.cummin(jnp.where(jnp.pad(changes, (0, 1), constant_values=True), indices, tokens), reverse=True)

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, (0, -tokens % size), mode="edge").reshape(-1, size)

    stop = split(indices if causal else last)[:, -1] + 1
    start = split(first)[:, 0]
    window = jnp.searchsorted(jnp.array(_window_sizes(tokens)), stop - start)
    return Blocks(
        _split_tokens(query * query.shape[2] ** -0.5, kv_heads), split(segment_ids), split(indices), window, start
    )


def _window_sizes(tokens: int) -> list[int]:
    """Returns the lengths of windows, ascending, from that of a block to that of a row."""
    sizes, size = [], _block_size(tokens)
    while (size := -(-size // WINDOW_MULTIPLE) * WINDOW_MULTIPLE) < tokens:
        sizes.append(size)
        size = int(size * WINDOW_GROWTH)
    return [*sizes, tokens]


def _switch(function: Callable[[int], Any], block: Blocks, tokens: int) -> Any:
    """Calls a function with the size of the window of a block."""
    return jax.lax.switch(block.window, [partial(function, size) for size in _window_sizes(tokens)])


def _window(
    block: Blocks, keys_and_values: tuple[jax.Array, jax.Array], segment_ids: jax.Array, size: int, causal: bool
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Computes the masked scores of a block in a window of `size` keys.

    Returns:
      float32 [kv_heads, heads / kv_heads, queries, size], the first key of the window, and its keys and values.
    """
    start = jnp.minimum(block.start, segment_ids.size - size)
    key, value = (jax.lax.dynamic_slice_in_dim(x, start, size, 1) for x in keys_and_values)
    visible = block.segment_ids[:, None] == jax.lax.dynamic_slice_in_dim(segment_ids, start, size)
    if causal:
        visible &= block.indices[:, None] >= start + jnp.arange(size)
    scores = jnp.einsum("kgqd,ksd->kgqs", block.query, key, preferred_element_type=jnp.float32)
    return scores + jnp.where(visible, 0.0, MASKED), start, [key, value]


def _sum_over_queries(by_dim: jax.Array, by_key: jax.Array) -> jax.Array:
    """Contracts [kv_heads, groups, queries, head_dim] with [kv_heads, groups, queries, keys].

    Returns float32 [kv_heads, head_dim, keys].

    In this order, XLA transposes the smaller operand.
    """
    dimensions = (((1, 2), (1, 2)), ((0,), (0,)))
    return jax.lax.dot_general(by_dim, by_key, dimensions, preferred_element_type=jnp.float32)
