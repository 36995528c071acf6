"""Benchmarks the two forms of InfoNCE, all scores at once (dense) and tile by tile around a ring of devices.

    pip install -e ".[preflight]" && python benchmarks/info_nce.py --json info_nce.json

The loss and its gradients with respect to all embeddings, in float32, with 1 positive and 7 negatives per query, and
duplicates masked as in training.

Memory: temporary buffers per chip, compiled for eight chips of a TPU v5e. Needs libtpu, which runs on any x86 CPU with
Linux, but no TPU.

Time: seconds per loss and gradient on the CPU, as one device and as eight simulated devices, which share its cores, for
growing pools. The forms alternate, and the median is reported.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to ask for its metadata
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec
from rich.console import Console
from rich.table import Table

from codiemb_jax.batch import PassageTexts
from codiemb_jax.config import MeshSettings
from codiemb_jax.objectives.contrastive import DENSE_BYTES, dense_info_nce
from codiemb_jax.objectives.groups import Examples, Groups
from codiemb_jax.objectives.ring import ring_info_nce
from codiemb_jax.sharding import ROW_AXES, make_mesh, row_sharding

FORMS = {"dense": dense_info_nce, "ring": ring_info_nce}
NEGATIVES = 7
TOPOLOGY, TPU_QUERIES, TPU_DIM = "v5e:2x4", 32_768, 1024
CPU_QUERIES, CPU_DIM = (512, 1024, 2048, 4096), 128


def loss_and_gradient(form: str, mesh: Mesh) -> Callable:
    """Returns the jitted mean loss and its gradients, from queries, passages, present negatives and texts."""
    groups = Groups(None, ROW_AXES)

    def device_loss(queries: jax.Array, passages: jax.Array, present: jax.Array, texts: PassageTexts) -> jax.Array:
        examples = Examples(queries, passages, present, jnp.full(len(queries), jnp.nan), texts=texts)
        return groups.mean(jnp.mean(FORMS[form](examples, 0.02, groups)[0]))

    loss = jax.shard_map(device_loss, mesh=mesh, in_specs=PartitionSpec(ROW_AXES), out_specs=PartitionSpec())
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def make_batch(queries: int, dim: int) -> tuple:
    """Returns queries, passages, present negatives and texts."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(queries, 2 + NEGATIVES, dim)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    texts = np.arange(queries * (1 + NEGATIVES), dtype=np.int32).reshape(queries, -1)
    positives = np.pad(texts[:, :1], ((0, 0), (0, 3)), constant_values=-2)
    return vectors[:, 0], vectors[:, 1:], np.ones((queries, NEGATIVES), bool), PassageTexts(texts, positives)


def tpu_temporaries(form: str) -> int:
    """Compiles for a TPU and returns the bytes of temporary buffers per chip."""
    mesh = make_mesh(MeshSettings(), topologies.get_topology_desc(TOPOLOGY, platform="tpu").devices)
    sharding = row_sharding(mesh)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((TPU_QUERIES, *x.shape[1:]), x.dtype, sharding=sharding), make_batch(1, TPU_DIM)
    )
    return loss_and_gradient(form, mesh).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def cpu_seconds(devices: int, queries: int, rounds: int) -> dict[str, float]:
    """Returns the median seconds of each form."""
    mesh = make_mesh(MeshSettings(), jax.devices()[:devices])
    arguments = jax.device_put(make_batch(queries, CPU_DIM), row_sharding(mesh))
    functions = {form: loss_and_gradient(form, mesh) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(rounds + 1):
        for form, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if number:  # the first call compiles
                seconds[form].append(time.perf_counter() - start)
    return {form: statistics.median(times) for form, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements per time (default: 5)")
    options = parser.parse_args()
    console = Console()
    results: dict[str, list[dict]] = {"memory": [], "time": []}
    title = f"{TOPOLOGY}, {TPU_QUERIES:,} queries, {TPU_QUERIES * (1 + NEGATIVES):,} passages, dim {TPU_DIM:,}"
    if importlib.util.find_spec("libtpu"):
        table = Table("form", "temporaries per chip (MB)", title=title)
        for form in FORMS:
            size = tpu_temporaries(form)
            results["memory"].append({"form": form, "topology": TOPOLOGY, "bytes": size})
            table.add_row(form, f"{size / 1e6:,.0f}")
        console.print(table)
    else:
        console.print(f"skipped {title}: libtpu is not installed; pip install -e '.[preflight]'", markup=False)
    table = Table("devices", "queries", "scores per device (MB)", *(f"{form} (s)" for form in FORMS), title="CPU")
    for devices in (1, 8):
        for queries in CPU_QUERIES:
            score_bytes = queries // devices * queries * (1 + NEGATIVES) * 4
            seconds = cpu_seconds(devices, queries, options.rounds)
            results["time"].append({"devices": devices, "queries": queries, "score_bytes": score_bytes, **seconds})
            table.add_row(
                str(devices), f"{queries:,}", f"{score_bytes / 1e6:,.0f}", *(f"{seconds[form]:.3f}" for form in FORMS)
            )
    console.print(table)
    console.print(f"training uses dense up to {DENSE_BYTES / 1e6:,.0f} MB of scores per device")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
