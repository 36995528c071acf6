"""Compiles the steps of the four recipes for TPU slices, without TPUs, and reports memory, work and traffic.

    pip install -e ".[preflight]" && python benchmarks/recipes.py

Does for several slices and settings what `codiemb preflight` does for one. Batches have as many examples per chip as
the original has per device. FLOPs are those of all matrix products, with padding and recomputation, divided by
6 x parameters x tokens without padding.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

from rich.console import Console
from rich.table import Table

from codiemb_jax.config_file import find_config, load_settings
from codiemb_jax.errors import UserError
from codiemb_jax.preflight import size
from codiemb_jax.training.ahead import tpu_devices
from codiemb_jax.training.preflight import Preflight

IR_EXAMPLES = {"youtu_embedding": 28, "minicpm_embedding": 28, "bge_large_zh": 64, "multilingual_e5_large_instruct": 64}
"""Queries per chip of each recipe, as in the original on 8 devices."""
STS_EXAMPLES = {True: 32, False: 28}
"""Pairs per chip with and without packing; without, a batch must be a multiple of the chunks."""


class Case(NamedTuple):
    recipe: str
    topology: str
    chunks: int
    remat: str = "dots"
    packing: bool = True
    compute_dtype: str = "bfloat16"


CASES = [
    Case("youtu_embedding", "v5e:4x4", 42),
    Case("youtu_embedding", "v5e:4x4", 14),
    Case("youtu_embedding", "v5e:4x4", 28, packing=False),
    Case("youtu_embedding", "v5e:2x4", 14),
    Case("youtu_embedding", "v5p:2x2x2", 1, remat="full"),
    Case("youtu_embedding", "v5p:2x2x2", 3),
    Case("youtu_embedding", "v6e:2x4", 7),
    Case("minicpm_embedding", "v5e:4x4", 14),
    Case("minicpm_embedding", "v5p:2x2x2", 1, remat="full"),
    Case("minicpm_embedding", "v6e:2x4", 7),
    Case("bge_large_zh", "v5e:2x4", 8),
    Case("bge_large_zh", "v5e:2x4", 16, compute_dtype="float32"),
    Case("bge_large_zh", "v5p:2x2x1", 1),
    Case("bge_large_zh", "v6e:2x2", 4),
    Case("multilingual_e5_large_instruct", "v5e:2x4", 8),
    Case("multilingual_e5_large_instruct", "v5e:2x4", 16, compute_dtype="float32"),
    Case("multilingual_e5_large_instruct", "v5p:2x2x1", 1),
    Case("multilingual_e5_large_instruct", "v6e:2x2", 4),
]


def measure(case: Case) -> list[dict[str, Any]]:
    """Compiles the steps of a case, and returns what each needs."""
    start = time.perf_counter()
    devices = tpu_devices(case.topology)
    flags = {
        "encode_chunks": case.chunks,
        "model.remat": case.remat,
        "model.compute_dtype": case.compute_dtype,
        "data.packing": str(case.packing).lower(),
        "data.ir_global_batch_size": IR_EXAMPLES[case.recipe] * len(devices),
        "data.sts_global_batch_size": STS_EXAMPLES[case.packing] * len(devices),
        "mesh.fsdp": len(devices),
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    report = Preflight(load_settings(find_config(case.recipe), arguments), devices).report()
    results = []
    for task, step in report.steps.items():
        shapes = report.shapes[task]
        flops = step.flops * len(devices) / (6 * report.parameters * shapes.tokens)
        results.append(
            case._asdict()
            | asdict(step)
            | {
                "task": task,
                "rows": shapes.layout.rows,
                "row_length": shapes.layout.row_length,
                "padding": 1 - shapes.tokens / shapes.computed_tokens,
                "flops_ratio": flops,
                "tokens_per_second": step.seconds and shapes.tokens / step.seconds,
            }
        )
    seconds = time.perf_counter() - start
    return [result | {"compile_seconds": seconds} for result in results]


def add_row(table: Table, result: dict[str, Any]) -> None:
    seconds = result["seconds"]
    table.add_row(
        result["recipe"],
        result["topology"],
        result["task"],
        f"{result['compute_dtype']}, {'packed' if result['packing'] else 'padded'}",
        f"{result['remat']}, {result['chunks']}",
        f"{result['rows']} x {result['row_length']}",
        f"{result['padding']:.1%}",
        f"{result['flops_ratio']:.2f}",
        size(result["needed"]) if result["fits"] else f"does not fit: {size(result['needed'])}",
        size(result["collective_bytes"]),
        size(result["exposed_collective_bytes"]),
        f"{seconds:.2g} s" if seconds else "",
        f"{result['tokens_per_second']:,.0f}" if seconds else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=IR_EXAMPLES, help="only this recipe")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    cases = [case for case in CASES if options.recipe in (None, case.recipe)]
    console = Console(width=190)  # as wide as the table
    table = Table("recipe", "slice", "task", "computation", "remat, chunks", "rows per chip", "padding", "FLOPs ratio")
    for column in ("peak memory", "traffic", "exposed", "shortest step", "tokens/s"):
        table.add_column(column, justify="right")
    results = []
    for number, case in enumerate(cases, 1):
        with console.status(f"{number} of {len(cases)}: {case.recipe} on {case.topology}"):
            try:
                results += (found := measure(case))
            except UserError as error:
                raise SystemExit(f"{case.recipe} on {case.topology}: {error}") from error
        for result in found:
            add_row(table, result)
        if options.json:  # after every case, because all of them take hours
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
