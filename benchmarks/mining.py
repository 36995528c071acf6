"""Benchmarks `codiemb mine`: time and peak memory at several sizes of the corpus.

    python benchmarks/mining.py --work models/mining

Documents have about 20 words, and each query has five words of its positive. Each size runs in a process of its own
with the model of the quickstart. Reports the seconds of the whole program, start-up and compilation included, its peak
memory, and how many negatives were found.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from child import run_measured
from inputs import QUICKSTART, quickstart_words
from rich.console import Console
from rich.table import Table


def write_inputs(corpus: Path, data: Path, documents: int, queries: int) -> None:
    """Writes a corpus of random texts, and queries for the first documents."""
    random = np.random.default_rng(0)
    words = quickstart_words()
    with corpus.open("w", encoding="utf-8") as file, data.open("w", encoding="utf-8") as records:
        for i in range(documents):
            text = random.choice(words, random.integers(10, 30))
            file.write(json.dumps({"_id": str(i), "text": " ".join(text)}) + "\n")
            if i < queries:
                query = ["Given a question, retrieve the passage", "", " ".join(random.choice(text, 5))]
                record = {"task_type": "ir", "query": query, "positives": [["", "", " ".join(text)]]}
                records.write(json.dumps(record) + "\n")


def measure(folder: Path, documents: int, queries: int) -> dict[str, Any]:
    """Runs the program and returns its time, its peak memory and the number of negatives."""
    corpus, data, output = (folder / f"{name}.jsonl" for name in ("corpus", "data", "output"))
    write_inputs(corpus, data, documents, queries)
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "codiemb_jax.mine", "--model", QUICKSTART / "model", "--ir", data]
    command += ["--corpus", corpus, "--output", output, "--relative_margin", "0.05"]
    usage = run_measured(command)
    with output.open(encoding="utf-8") as file:
        negatives = sum(len(json.loads(line)["negatives"]) for line in file)
    return {
        "documents": documents,
        "queries": queries,
        **usage._asdict(),
        "negatives": negatives,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs and outputs")
    parser.add_argument("--documents", type=int, nargs="+", default=[12_500, 50_000])
    parser.add_argument("--queries", type=int, nargs="+", default=[4000], help="one number, or one for each size")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    queries = options.queries * len(options.documents) if len(options.queries) == 1 else options.queries
    table = Table("documents", "queries", "seconds", "processor seconds", "peak MB", "negatives")
    results = []
    for documents, count in zip(options.documents, queries, strict=True):
        result = measure(options.work, documents, count)
        results.append(result)
        table.add_row(
            f"{documents:,}", f"{count:,}", f"{result['seconds']:.1f}", f"{result['processor_seconds']:.1f}",
            f"{result['peak_mb']:,.0f}", f"{result['negatives']:,}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
