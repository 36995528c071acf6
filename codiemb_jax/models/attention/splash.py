"""Attention on TPUs with the splash attention kernel of JAX, which keeps scores on the chip."""

from functools import lru_cache
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from codiemb_jax.models.attention.saved import SAVED

BLOCK_SIZES = (512, 384, 256, 128)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention, see `Attention`. `interpret` runs the kernel on a CPU, for tests."""
    _, heads, tokens, head_dim = query.shape
    run = make_kernel(heads, tokens, causal, interpret)

    def attend_row(query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array) -> jax.Array:
        return run(query * head_dim**-0.5, key, value, segment_ids=kernel.SegmentIds(segments, segments))

    return jax.vmap(attend_row)(query, key, value, segment_ids)


@lru_cache
def make_kernel(heads: int, tokens: int, causal: bool, interpret: bool) -> Any:
    """Returns the kernel for rows of `tokens` tokens, with the same mask for all heads."""
    block = next(size for size in BLOCK_SIZES if tokens % size == 0)
    mask = masks.CausalMask((tokens, tokens)) if causal else masks.FullMask((tokens, tokens))
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )  # fmt: skip
    # The mask is an array; it must not be a tracer of the function that happens to call this first.
    with jax.ensure_compile_time_eval():
        return kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=SAVED,
            interpret=interpret,
        )
