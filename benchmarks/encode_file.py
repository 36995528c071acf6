"""Benchmarks `codiemb encode` against sentence-transformers: time and peak memory at several numbers of texts.

    codiemb train --config quickstart
    python benchmarks/encode_file.py --model runs/quickstart/export --work models/encode_file

Texts have about 20 words. Each run is a process of its own that reads the file of texts and writes a .npy file, with
defaults. Reports the seconds of the whole program, start-up and compilation included, its peak memory, and the largest
difference between the vectors of both. At the smallest number, `codiemb encode` is also killed half-way and continued;
the result must be the same file.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from child import Usage, run_measured
from inputs import quickstart_words
from rich.console import Console
from rich.table import Table

SENTENCE_TRANSFORMERS = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
model, source, output = sys.argv[1:]
with open(source, encoding="utf-8") as file:
    texts = file.read().splitlines()
np.save(output, SentenceTransformer(model, device="cpu").encode_document(texts, show_progress_bar=False))
"""


def write_texts(path: Path, count: int) -> None:
    """Writes random texts, one per line."""
    random = np.random.default_rng(0)
    words = quickstart_words()
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(" ".join(random.choice(words, random.integers(10, 30))) + "\n")


def encode_command(model: Path, source: Path, output: Path) -> list[Any]:
    return [sys.executable, "-m", "codiemb_jax.encode", "--model", model, "--input", source, "--output", output]


def kill_half_way(command: list[Any], state: Path, texts: int) -> int:
    """Starts a program, kills it when half of the texts are done, and returns how many were."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if state.exists() and (done := json.loads(state.read_text())["done"]) >= texts // 2:
            process.kill()
            process.wait()
            return done
        time.sleep(0.01)
    raise SystemExit("the program ended before it could be killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an export")
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs and outputs")
    parser.add_argument("--texts", type=int, nargs="+", default=[25_000, 100_000])
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.work / "texts.txt"
    table = Table("texts", "program", "seconds", "texts/s", "CPU s", "peak MB")
    results = []
    difference = 0.0

    def report(texts: int, program: str, usage: Usage) -> None:
        results.append({"texts": texts, "program": program, **usage._asdict()})
        table.add_row(
            f"{texts:,}", program, f"{usage.seconds:.1f}", f"{texts / usage.seconds:,.0f}",
            f"{usage.processor_seconds:.1f}", f"{usage.peak_mb:,.0f}",
        )  # fmt: skip

    for texts in options.texts:
        write_texts(source, texts)
        ours, theirs, killed = (options.work / f"{name}.npy" for name in ("ours", "theirs", "killed"))
        for path in (ours, theirs, killed):
            path.unlink(missing_ok=True)
        report(texts, "codiemb encode", run_measured(encode_command(options.model, source, ours)))
        peer = [sys.executable, "-c", SENTENCE_TRANSFORMERS, options.model, source, theirs]
        report(texts, "sentence-transformers", run_measured(peer))
        vectors = np.load(ours)
        difference = max(difference, float(np.abs(vectors - np.load(theirs)).max()))
        if texts == min(options.texts):
            command = encode_command(options.model, source, killed)
            done = kill_half_way(command, options.work / ".killed.npy.partial" / "state.json", texts)
            run_measured(command)
            if not np.array_equal(np.load(killed), vectors):
                raise SystemExit("the continued run has other vectors")
            print(f"killed after {done:,} of {texts:,} texts and continued: the same vectors")
    Console().print(table)
    print(f"largest difference between the vectors: {difference:.1e}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
