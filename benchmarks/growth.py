"""Measures how the time of a packed training step grows with the batch and with the length of the rows.

    pip install -e ".[test,benchmark]" && python benchmarks/growth.py --work models/benchmark

Runs the training program on the model and the texts of benchmarks/training.py, with batches of 1, 2, 4 and 8 times as
many queries, and with rows of 1, 2 and 4 times --max-tokens. Reports the seconds per computed token relative to the
first, which are 1 if the time is linear in the number of tokens.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from inputs import write_model
from rich.console import Console
from rich.table import Table
from training import counted_steps, run_codiemb_jax, write_data


def seconds_per_token(options: argparse.Namespace) -> tuple[float, int]:
    """Returns the median over the steps, and their number."""
    write_data(options.work / "data.jsonl", options.model, options.queries * options.steps, options.max_tokens, False)
    result = run_codiemb_jax(options, packing=True)
    steps = counted_steps(result["computed_tokens"], compiles=True)
    rates = np.divide(result["seconds"], result["computed_tokens"])[steps]
    return float(np.median(rates)), len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the model and the data")
    parser.add_argument("--queries", type=int, default=8, help="queries of the smallest batch (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="maximum length of a text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps per run (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    options.model, options.dtype = options.work / "decoder", "float32"
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.model.exists():
        write_model(options.model)
    smallest = options.queries
    runs: list[dict[str, Any]] = [{"queries": smallest * factor, "row_tokens": None} for factor in (1, 2, 4, 8)]
    runs += [{"queries": 2 * smallest, "row_tokens": options.max_tokens * factor} for factor in (1, 2, 4)]
    table = Table("queries", "row tokens", "steps", "µs per token", "relative")
    first = {}
    for run in runs:
        vars(options).update(run)
        value, steps = seconds_per_token(options)
        kind = "rows" if run["row_tokens"] else "batch"
        first.setdefault(kind, value)
        run |= {"seconds_per_token": value, "relative": value / first[kind]}
        row_tokens = run["row_tokens"] or options.max_tokens
        table.add_row(str(run["queries"]), str(row_tokens), str(steps), f"{value * 1e6:.0f}", f"{run['relative']:.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
