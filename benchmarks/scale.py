"""Measures that start-up and steps take the same time and memory for any number of examples.

    python benchmarks/scale.py --work models/scale

Writes synthetic indexes without tokens. For each, one process opens it, plans steps of a large batch and packs them.
Reports the time and the memory to open the index and make the plan; the time per step (the median, and how much of it
is packing); and the memory of the process after all steps: its own, and the total at its peak, which includes the pages
of the index that were read. The system takes those back when memory is short. Runs on Linux.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

LIMIT, PASSAGES = 512, 6


def write_index(folder: Path, examples: int) -> None:
    from codiemb_jax.data.index import IndexWriter

    random = np.random.default_rng(0)
    with IndexWriter(folder, LIMIT, LIMIT) as index:
        for start in range(0, examples, 100_000):
            count = min(100_000, examples - start)
            index.append(
                {
                    "score": np.zeros(count),
                    "query_tokens": np.clip(random.lognormal(np.log(30), 0.5, count), 4, LIMIT).astype(np.int32),
                    "positives": np.ones(count, np.int32),
                    "negatives": np.full(count, PASSAGES - 1, np.int32),
                    "passage_offsets": np.arange(1, count + 1) * PASSAGES,
                    "passage_tokens": np.clip(random.lognormal(np.log(150), 0.5, count * PASSAGES), 4, LIMIT).astype(
                        np.int32
                    ),
                    "passage_hashes": random.integers(0, 2**64, count * PASSAGES, np.uint64),
                }
            )
        index.finish()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Opens an index and plans steps in this process."""
    from codiemb_jax.config import DataSettings
    from codiemb_jax.data.layout import BatchLayout, PackedLayout
    from codiemb_jax.data.sampler import Plan, Source
    from codiemb_jax.data.store import PreparedDataset

    before = _memory()
    packing: list[float] = []

    class TimedLayout(PackedLayout):
        def __call__(self, lengths: np.ndarray, limit: int, group_size: int | None) -> BatchLayout:
            start = time.perf_counter()
            layout = super().__call__(lengths, limit, group_size)
            packing.append(time.perf_counter() - start)
            return layout

    start = time.perf_counter()
    dataset = PreparedDataset(Path("a.jsonl"), "ir", options.index)
    settings = DataSettings(
        ir=["a"], ir_global_batch_size=options.queries, positives_per_query=1, negatives_per_query=PASSAGES - 1,
        query_max_tokens=LIMIT, passage_max_tokens=LIMIT,
    )  # fmt: skip
    layout = TimedLayout(LIMIT, options.devices)
    plan = Plan([Source("a", "ir", dataset.index)], settings, 0, layout, {"ir": None, "sts": None})
    opened, steps = time.perf_counter() - start, []
    after_opening = _memory()
    for number in range(options.steps):
        start = time.perf_counter()
        plan.step(number * 7919)  # from all epochs
        steps.append(time.perf_counter() - start)
    after_steps = _memory()
    return {
        "examples": len(dataset),
        "opening_ms": opened * 1e3,
        "step_ms": float(np.median(steps)) * 1e3,
        "packing_ms": float(np.median(packing)) * 1e3,
        "opening_mb": sum(after_opening.values()) - sum(before.values()),
        "own_mb": after_steps["RssAnon"],
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _memory() -> dict[str, float]:
    """Returns the megabytes of this process that are its own, and those of files that are mapped into memory."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) / 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for the indexes")
    parser.add_argument("--examples", type=int, nargs="+", default=[10**6, 10**7], help="default: %(default)s")
    parser.add_argument("--queries", type=int, default=8192, help="queries per step (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=8, help="devices of the plan (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps to plan (default: %(default)s)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="measure only this index, in this process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    if options.index:
        options.json.write_text(json.dumps(measure(options)))
        return
    results = []
    for examples in options.examples:
        folder = options.work / str(examples)
        if not folder.exists():
            write_index(folder, examples)
        output = options.work / "result.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--index", folder, "--json", output]
        subprocess.run(command, check=True)
        results.append(json.loads(output.read_text()))
    table = Table("examples", "open, ms", "step, ms", "packing, ms", "open, MB", "own, MB", "peak, MB")
    for result in results:
        examples, *values = result.values()
        table.add_row(f"{examples:,}", *(f"{value:,.1f}" for value in values))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
