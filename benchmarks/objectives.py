"""Measures the objectives alone, loss and gradient, and compares them with the model's part of a step.

    python benchmarks/objectives.py

The model's part is the operations that the texts of the batch need, forward and backward, at the rate of plain matrix
multiplications in the same process: no step is faster. Texts of pairs and queries have 40 tokens, passages 250.
"""

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from limit import jax_rate, needed_flops
from rich.console import Console
from rich.table import Table

import codiemb_jax
from codiemb_jax.batch import Task
from codiemb_jax.config import MeshSettings, ObjectiveSettings
from codiemb_jax.objectives.groups import Examples, Groups
from codiemb_jax.objectives.registry import OBJECTIVES
from codiemb_jax.sharding import compiler_options, make_mesh

SMALL_DECODER = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
    "num_key_value_heads": 4, "num_hidden_layers": 10,
}  # fmt: skip
"""The decoder with 45 M parameters of the other benchmarks."""


def random_examples(task: Task, count: int, dim: int) -> Examples:
    random = np.random.default_rng(0)

    def vectors(*shape: int) -> jax.Array:
        values = random.standard_normal((*shape, dim), np.float32)
        return jnp.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True))

    if task == "ir":
        return Examples(vectors(count), vectors(count, 6), jnp.ones((count, 4), bool), jnp.full(count, jnp.nan))
    scores = jnp.asarray(random.choice(np.linspace(0, 1, 11), count).astype(np.float32))
    return Examples(
        vectors(count), vectors(count, 1), jnp.zeros((count, 0), bool), scores, (vectors(count), vectors(count, 1))
    )


def seconds_of(task: Task, name: str, count: int, dim: int, group_size: int | None, repeats: int) -> list[float]:
    """Returns the seconds of the loss and its gradient with respect to all vectors."""
    settings, groups = ObjectiveSettings(), Groups(group_size)
    compute = OBJECTIVES[name][task].compute
    examples = random_examples(task, count, dim)

    @partial(jax.jit, compiler_options=compiler_options(make_mesh(MeshSettings())))
    def value_and_grad(queries: jax.Array, passages: jax.Array, middle: Any) -> Any:
        def loss(queries: jax.Array, passages: jax.Array, middle: Any) -> jax.Array:
            return compute(examples._replace(queries=queries, passages=passages, middle=middle), settings, groups)[0]

        return jax.value_and_grad(loss, argnums=(0, 1, 2) if middle else (0, 1))(queries, passages, middle)

    times = []
    for _ in range(1 + repeats):  # the first compiles
        start = time.perf_counter()
        jax.block_until_ready(value_and_grad(examples.queries, examples.passages, examples.middle))
        times.append(time.perf_counter() - start)
    return times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=8192, help="queries of InfoNCE (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    shapes = Path(codiemb_jax.__file__).parent / "shapes"
    models = {
        "45 M decoder": SMALL_DECODER,
        "Youtu-Embedding": json.loads((shapes / "youtu_embedding.json").read_text()),
    }
    rates = {}
    for name, config in models.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            rates[name] = jax_rate(Path(folder), 4096, "float32")
    cases: list[tuple[Task, str, int, int, int | None]] = [
        ("sts", "codi", 256, 2048, 32),
        ("sts", "codi", 256, 2048, None),
        ("sts", "codi", 4096, 2048, 32),
        ("sts", "codi", 4096, 2048, None),
        ("ir", "info_nce", options.queries, 2048, None),
    ]
    table = Table("objective", "examples", "compared", "seconds", *(f"of a step, {name}" for name in models))
    results = []
    for task, name, count, dim, group_size in cases:
        seconds = seconds_of(task, name, count, dim, group_size, options.repeats)
        lengths = np.tile([40, 40] if task == "sts" else [40] + 6 * [250], count)
        shares = {}
        for model, config in models.items():
            flops = needed_flops(config, lengths, causal=False, training=True)
            shares[model] = float(np.median(seconds)) / (float(np.median(seconds)) + flops / rates[model])
        results.append({"objective": name, "task": task, "examples": count, "seconds": seconds, "shares": shares})
        table.add_row(
            f"{task} {name}", str(count), str(group_size or count),
            f"{np.median(seconds):.4f} ({min(seconds):.4f} to {max(seconds):.4f})",
            *(f"{share:.3%}" for share in shares.values()),
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
