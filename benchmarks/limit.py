"""The physical limit of a model: the operations that its texts need, at the rate of plain matrix multiplications."""

import json
import platform
import time
from collections.abc import Callable
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

    The backward pass needs twice the operations of the forward pass; nothing is recomputed.
    """
    heads = config["num_attention_heads"]
    attention_size = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    pairs = (lengths.astype(float) * (lengths + 1) / 2 if causal else lengths.astype(float) ** 2).sum()
    weights = sum(2 * inputs * outputs for inputs, outputs in weight_shapes(config)) * lengths.sum()
    return config["num_hidden_layers"] * (weights + 4 * attention_size * pairs) * (3 if training else 1)


PRODUCTS: list[Callable[..., Any]] = [lambda x, w, g: x @ w, lambda x, w, g: g @ w.T, lambda x, w, g: x.T @ g]
"""The products of inputs, weights and gradients of outputs, forward and backward."""


def jax_rate(model: Path, tokens: int, dtype: str) -> float:
    """Measures the rate of JAX as it compiles models, see `matrix_product_rate`."""
    import jax
    import jax.numpy as jnp

    from codiemb_jax.config import MeshSettings
    from codiemb_jax.sharding import compiler_options, make_mesh

    options = compiler_options(make_mesh(MeshSettings()))
    products = [jax.jit(product, compiler_options=options) for product in PRODUCTS]

    def run(number: int, arrays: list[Any]) -> None:
        products[number](*arrays).block_until_ready()

    return matrix_product_rate(model, tokens, lambda array: jnp.asarray(array, jnp.dtype(dtype)), run)


def torch_rate(model: Path, tokens: int, dtype: str) -> float:
    """Measures the rate of PyTorch, see `matrix_product_rate`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(number: int, arrays: list[Any]) -> None:
        PRODUCTS[number](*arrays)
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.inference_mode():
        return matrix_product_rate(
            model, tokens, lambda array: torch.from_numpy(array).to(device, getattr(torch, dtype)), run
        )


def matrix_product_rate(
    model: Path,
    tokens: int,
    convert: Callable[[np.ndarray], Any],
    run: Callable[[int, list[Any]], None],
    repeats: int = 7,
) -> float:
    """Measures the rate of the products with the weights of a layer, forward and backward, in FLOP/s.

    Args:
      model: A Hugging Face folder.
      tokens: Number of tokens per product.
      convert: Makes an array of the library from a float32 one.
      run: Computes one of PRODUCTS, by its index, and waits for it.
      repeats: Number of repetitions, whose median counts.
    """
    random = np.random.default_rng(0)
    flops, seconds = 0.0, 0.0
    for inputs, outputs in weight_shapes(json.loads((model / "config.json").read_text())):
        shapes = ((tokens, inputs), (inputs, outputs), (tokens, outputs))
        arrays = [convert(random.standard_normal(shape, np.float32)) for shape in shapes]
        for number in range(len(PRODUCTS)):
            run(number, arrays)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                run(number, arrays)
                times.append(time.perf_counter() - start)
            flops += 2 * tokens * inputs * outputs
            seconds += float(np.median(times))
    return flops / seconds


def processor() -> str:
    """Returns the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_flops() -> float | None:
    """Returns the peak rate of the GPU, or None if it is unknown or there is none."""
    import jax

    from codiemb_jax.training.chips import chip_of

    return chip_of(jax.devices()[0]).flops
