"""Compiles the steps of the four recipes for TPU slices, without TPUs, and reports memory, work and traffic.

    pip install -e . libtpu && python benchmarks/recipes.py

Queries have about 40 tokens, and passages 250 on average and 1,000 at most. Batches have the recipe's number of
examples per device, and computation is bfloat16. Memory is what the compiler needs per device. FLOPs are those of all
matrix products, including padding and what is computed again, divided by 6 x parameters x tokens without padding.
Traffic is what each device exchanges with others per step; it is exposed if the device computes nothing meanwhile.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import numpy as np
from inputs import passage_lengths, query_lengths
from rich.console import Console
from rich.table import Table

import codiemb_jax
from codiemb_jax.batch import Task
from codiemb_jax.checkpoints.families import get_family
from codiemb_jax.config_file import find_config, load_settings
from codiemb_jax.models.attention import choose_backend
from codiemb_jax.models.build import abstract_model
from codiemb_jax.sharding import make_mesh
from codiemb_jax.training.ahead import tpu_devices, trace_step
from codiemb_jax.training.collectives import count_collective_bytes
from codiemb_jax.training.estimate import needed_memory
from codiemb_jax.training.flops import count_flops
from codiemb_jax.training.run import batch_layout

GB = 1e9
EXAMPLES = {
    "youtu_embedding": {"ir": 28, "sts": 32}, "minicpm_embedding": {"ir": 28, "sts": 32},
    "bge_large_zh": {"ir": 64, "sts": 32}, "multilingual_e5_large_instruct": {"ir": 64, "sts": 32},
}  # fmt: skip
"""Examples per device of each recipe, as in the original on 8 devices."""


class Case(NamedTuple):
    recipe: str
    topology: str
    remat: str
    chunks: int
    task: Task = "ir"
    packing: bool = True


CASES = [
    Case("youtu_embedding", "v5e:4x4", "dots", 42),
    Case("youtu_embedding", "v5e:4x4", "dots", 14),
    Case("youtu_embedding", "v5e:4x4", "dots", 14, task="sts"),
    Case("youtu_embedding", "v5e:4x4", "dots", 49, packing=False),
    Case("youtu_embedding", "v5p:2x2x2", "full", 1),
    Case("youtu_embedding", "v5p:2x2x2", "dots", 3),
    Case("youtu_embedding", "v6e:2x4", "dots", 7),
    Case("minicpm_embedding", "v5e:4x4", "dots", 14),
    Case("minicpm_embedding", "v5p:2x2x2", "full", 1),
    Case("bge_large_zh", "v5e:2x4", "full", 1),
    Case("bge_large_zh", "v5e:2x4", "dots", 8),
    Case("multilingual_e5_large_instruct", "v5e:2x4", "full", 1),
    Case("multilingual_e5_large_instruct", "v5e:2x4", "dots", 8),
]


def measure(case: Case) -> dict[str, Any]:
    """Traces and compiles the step of a case."""
    devices = tpu_devices(case.topology)
    examples = {task: number * len(devices) for task, number in EXAMPLES[case.recipe].items()}
    flags = {
        "encode_chunks": case.chunks, "model.remat": case.remat, "data.packing": str(case.packing).lower(),
        "model.compute_dtype": "bfloat16", "mesh.fsdp": len(devices),
        "data.ir_global_batch_size": examples["ir"], "data.sts_global_batch_size": examples["sts"],
    }  # fmt: skip
    settings = load_settings(
        find_config(case.recipe), [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    )
    hf = json.loads((Path(codiemb_jax.__file__).parent / "shapes" / f"{case.recipe}.json").read_text())
    family = get_family(hf)
    config = family.read_config(hf)
    mesh = make_mesh(settings.mesh, devices)
    graph, params = abstract_model(family.model, config, settings.model, mesh)
    backend = choose_backend("auto", mesh, "bfloat16", config.kv_heads, config.head_dim)

    random, limit = np.random.default_rng(0), settings.data.passage_max_tokens
    passages = settings.data.positives_per_query + settings.data.negatives_per_query
    queries = query_lengths(random, (examples[case.task], 1 if case.task == "ir" else 2), limit)
    lengths = (
        queries
        if case.task == "sts"
        else np.hstack([queries, passage_lengths(random, (len(queries), passages), limit)])
    )
    group_size = next(spec.group_size for spec in settings.tasks if spec.name == case.task)
    layout = batch_layout(settings, mesh, backend=backend)(lengths, limit, group_size)

    step = trace_step(settings, graph, params, case.task, layout, lengths.shape[1] - 1, config.has_dropout)
    tokens, computed = int(lengths.sum()), layout.devices * layout.rows * layout.row_length
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    result = {
        **case._asdict(), "backend": backend, "rows": layout.rows, "row_length": layout.row_length, "tokens": tokens,
        "padding": 1 - tokens / computed, "flops_ratio": count_flops(step.jaxpr) / (6 * parameters * tokens),
    }  # fmt: skip
    start = time.perf_counter()
    try:
        compiled = step.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_memory(str(error))
        return result | {"error": f"needs {needed / GB:.1f} GB" if needed else str(error).splitlines()[0][:60]}
    memory = compiled.memory_analysis()
    collectives = count_collective_bytes(compiled.as_text())
    return result | {
        "compile_seconds": time.perf_counter() - start,
        "state_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collective_bytes": collectives.total,
        "exposed_collective_bytes": collectives.exposed,
    }


def add_row(table: Table, result: dict[str, Any]) -> None:
    row = [
        result["recipe"], result["topology"], result["task"], "packed" if result["packing"] else "padded",
        result["remat"], str(result["chunks"]), f"{result['rows']} x {result['row_length']}",
        f"{result['padding']:.1%}", f"{result['flops_ratio']:.2f}",
    ]  # fmt: skip
    if "error" in result:
        table.add_row(*row, f"does not fit: {result['error']}")
        return
    total = result["state_bytes"] + result["temporary_bytes"]
    table.add_row(
        *row, f"{total / GB:.1f} GB", f"{result['collective_bytes'] / GB:.0f} GB",
        f"{result['exposed_collective_bytes'] / GB:.1f} GB", f"{result['compile_seconds']:.0f} s",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=EXAMPLES, help="only this recipe")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    cases = [case for case in CASES if options.recipe in (None, case.recipe)]
    console = Console(width=170)  # as wide as the table
    table = Table(
        "recipe", "slice", "task", "layout", "remat", "chunks", "rows per device", "padding", "FLOPs ratio", "memory",
        "traffic", "exposed", "compilation",
    )  # fmt: skip
    results = []
    for number, case in enumerate(cases, 1):
        with console.status(f"{number} of {len(cases)}: {case.recipe} on {case.topology}"):
            try:
                results.append(measure(case))
            except (ImportError, RuntimeError) as error:
                raise SystemExit(f"cannot compile for TPUs ({error}); pip install libtpu") from error
        add_row(table, results[-1])
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
