"""The physical limit of a model's speed: the operations that its texts need, at the rate of bare matrix products."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

ENCODER_TYPES = ("bert", "xlm-roberta")
"""Model types whose attention is bidirectional in transformers."""


def weight_shapes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Returns the shapes of the weight matrices of a layer, (inputs, outputs), from a Hugging Face config."""
    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    gate = [] if config["model_type"] in ENCODER_TYPES else [(hidden, mlp)]
    return [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden), (hidden, mlp), *gate, (mlp, hidden)]


def needed_flops(config: dict[str, Any], lengths: np.ndarray, *, causal: bool, training: bool) -> float:
    """Returns the operations of the matrix products that texts of the given lengths need, without padding.

    The backward pass needs twice the operations of the forward pass; nothing is computed again.
    """
    heads = config["num_attention_heads"]
    attention_size = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    pairs = (lengths.astype(float) * (lengths + 1) / 2 if causal else lengths.astype(float) ** 2).sum()
    weights = sum(2 * inputs * outputs for inputs, outputs in weight_shapes(config)) * lengths.sum()
    return config["num_hidden_layers"] * (weights + 4 * attention_size * pairs) * (3 if training else 1)


def matrix_product_rate(model: Path, tokens: int, dtype: str, repeats: int = 7) -> float:
    """Measures the rate of the products with the weights of a layer, forward and backward, in FLOP/s.

    Args:
      model: A Hugging Face folder.
      tokens: Number of tokens per product.
      dtype: The dtype of the products.
      repeats: Number of repetitions, whose median counts.
    """
    import jax
    import jax.numpy as jnp

    products = [jax.jit(lambda x, w, g: x @ w), jax.jit(lambda x, w, g: g @ w.T), jax.jit(lambda x, w, g: x.T @ g)]
    flops, seconds = 0.0, 0.0
    for inputs, outputs in weight_shapes(json.loads((model / "config.json").read_text())):
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = ((tokens, inputs), (inputs, outputs), (tokens, outputs))
        arrays = [jax.random.normal(key, shape, jnp.dtype(dtype)) for key, shape in zip(keys, shapes, strict=True)]
        for product in products:
            product(*arrays).block_until_ready()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                product(*arrays).block_until_ready()
                times.append(time.perf_counter() - start)
            flops += 2 * tokens * inputs * outputs
            seconds += float(np.median(times))
    return flops / seconds


def peak_flops() -> float | None:
    """Returns the peak rate of the GPU, or None if it is unknown or there is none."""
    import jax

    from codiemb_jax.training.chips import chip_of

    return chip_of(jax.devices()[0]).flops
