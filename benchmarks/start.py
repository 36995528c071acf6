"""Benchmarks the time from the start of the training program to the end of its first step.

    pip install -e . && python benchmarks/start.py --work models/start

Every start is a new process. A cold one finds no compiled programs, a warm one finds those of the cold one before it.
Both find prepared data. Other flags are settings of the run, such as --model.path DIR. Reports medians over the rounds,
and the time of the imports alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

ONE_STEP = ("--optimizer.max_steps", "1", "--export", "false", "--evaluation.ir", "[]", "--evaluation.sts", "[]")
IMPORTS = """
from codiemb_jax.program import loading_modules
with loading_modules():
    import codiemb_jax.embedder, codiemb_jax.evaluation.held_out, codiemb_jax.training.loop
"""


def run_first_step(options: argparse.Namespace, flags: list[str]) -> float:
    """Runs one step in a new process; returns the seconds until its metrics are written."""
    run = options.work / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", options.config, "--output_dir", run]
    environment = os.environ | {"CODIEMB_JAX_CACHE": str(options.work / "cache")}
    start = time.perf_counter()
    process = subprocess.Popen([*command, *ONE_STEP, *flags], env=environment, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.002)
    seconds = time.perf_counter() - start
    _, log = process.communicate()
    if process.returncode:
        sys.exit(log)
    return seconds


def import_modules() -> float:
    """Returns the seconds that a new process takes to import what training needs."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the cache and the runs")
    parser.add_argument("--config", default="quickstart", metavar="FILE", help="settings (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="cold and warm starts (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options, flags = parser.parse_known_args()
    for name in ("JAX_COMPILATION_CACHE_DIR", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    options.work.mkdir(parents=True, exist_ok=True)
    run_first_step(options, flags)  # prepares the data
    seconds: dict[str, list[float]] = {"imports": [], "cold": [], "warm": []}
    for _ in range(options.rounds):
        shutil.rmtree(options.work / "cache" / "compiled")
        seconds["imports"].append(import_modules())
        seconds["cold"].append(run_first_step(options, flags))
        seconds["warm"].append(run_first_step(options, flags))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    table = Table("start", "seconds", "rounds", "share of cold")
    for name, values in seconds.items():
        span = f"{min(values):.2f} to {max(values):.2f}"
        table.add_row(name, f"{medians[name]:.2f}", span, f"{medians[name] / medians['cold']:.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"medians": medians, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
