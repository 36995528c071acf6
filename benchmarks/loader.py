"""Benchmarks the data loader without a model: planned batches from ArrayRecord files to arrays on the device.

    python benchmarks/loader.py --work models/loader

Reports real tokens per second, with one and several threads, and with processes, for two datasets of random tokens:
retrieval (queries of about 30 tokens and six passages of about 150) and similarity (pairs of texts of about 30).
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.flags
import grain
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from codiemb_jax.batch import Task
from codiemb_jax.config import DataSettings, MeshSettings
from codiemb_jax.data import loader
from codiemb_jax.data.index import IndexWriter
from codiemb_jax.data.layout import PackedLayout
from codiemb_jax.data.sampler import Plan, Source
from codiemb_jax.data.store import PreparedDataset
from codiemb_jax.data.tokenize import write_part
from codiemb_jax.sharding import make_mesh, row_sharding

LIMIT = 512


def write_dataset(folder: Path, task: Task, examples: int) -> None:
    """Writes a prepared dataset of random tokens."""
    random = np.random.default_rng(0)
    count, mean = (6, 150) if task == "ir" else (1, 30)
    queries = np.clip(random.lognormal(np.log(30), 0.5, examples), 4, LIMIT).astype(np.int32)
    passages = np.clip(random.lognormal(np.log(mean), 0.5, (examples, count)), 4, LIMIT).astype(np.int32)
    lengths = np.concatenate([queries[:, None], passages], axis=1)

    def make_examples() -> Iterator[tuple[int, dict[str, Any]]]:
        for i, own in enumerate(lengths):
            tokens = random.integers(3, 30_000, own.sum()).astype(np.int32)
            yield i, {"tokens": tokens, "lengths": own, "content_starts": np.zeros(own.size, np.int32)}

    write_part(make_examples(), folder / "00000")
    with IndexWriter(folder, LIMIT, LIMIT) as index:
        index.append(
            {
                "score": np.zeros(examples),
                "query_tokens": queries,
                "positives": np.ones(examples, np.int32),
                "negatives": np.full(examples, count - 1, np.int32),
                "passage_offsets": np.arange(1, examples + 1) * count,
                "passage_tokens": passages.ravel(),
                "passage_hashes": np.zeros(passages.size, np.uint64),
            }
        )
        index.finish()


class OneDevice:
    """Stands in for a sharding over one device in grain's processes, to which JAX's devices cannot be sent."""

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[int, tuple[slice, ...]]:
        return {0: (slice(None),)}


def measure(plan: Plan, dataset: PreparedDataset, steps: int, threads: int, processes: int) -> float:
    """Returns real tokens per second."""
    sharding = row_sharding(make_mesh(MeshSettings(data=1)))
    warmup = 4 if processes else 2
    if processes:
        absl.flags.FLAGS.mark_as_parsed()  # grain's processes read them
        source = loader.StepSource(plan, [dataset], OneDevice(), steps + warmup)
        options = grain.MultiprocessingOptions(num_workers=processes)
        iterator = iter(grain.MapDataset.source(source).to_iter_dataset().mp_prefetch(options))
    else:
        loader.NUM_THREADS = threads
        iterator = loader.batches(plan, [dataset], sharding, start=0, stop=steps + warmup)
    for _ in range(warmup):
        next(iterator)
    start, tokens = time.perf_counter(), 0
    for step, batch in iterator:
        jax.block_until_ready(batch)
        tokens += step.tokens
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the data")
    parser.add_argument("--examples", type=int, default=20_000, help="examples of each dataset (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=256, help="examples per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="steps to measure (default: %(default)s)")
    parser.add_argument("--processes", action="store_true", help="also measure two processes of grain")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    table = Table("dataset", "loader", "tokens/s")
    results = []
    for task in ("ir", "sts"):
        folder = options.work / f"{task}-{options.examples}"
        if not folder.exists():
            write_dataset(folder, task, options.examples)
        dataset = PreparedDataset(Path(f"{task}.jsonl"), task, folder)
        settings = DataSettings(
            ir=["ir"], sts=["sts"], ir_global_batch_size=options.queries, sts_global_batch_size=options.queries,
            positives_per_query=1, negatives_per_query=5, query_max_tokens=LIMIT, passage_max_tokens=LIMIT,
        )  # fmt: skip
        plan = Plan([Source(task, task, dataset.index)], settings, 0, PackedLayout(LIMIT), {"ir": None, "sts": None})
        for threads, processes in [(1, 0), (2, 0), (4, 0), *([(1, 2)] if options.processes else [])]:
            name = f"{processes} processes" if processes else f"{threads} threads"
            rate = measure(plan, dataset, options.steps, threads, processes)
            results.append({"task": task, "loader": name, "tokens_per_second": rate})
            table.add_row(task, name, f"{rate:,.0f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
