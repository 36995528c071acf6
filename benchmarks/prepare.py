"""Benchmarks the preparation of a data file: parsing, tokenizing and writing.

    python benchmarks/prepare.py --work models/prepare

Compares `prepare` with one and with several processes to a plain loop that only tokenizes, calling the Hugging Face
tokenizer once per text. An example is a query, a passage that answers it and four hard negatives, with lengths like
those of news stories: about 30 tokens per query, and passages of 150 on average. Each measurement runs in a process of
its own, and they take turns; the median of the rounds is reported. Start-up of Python and imports is not counted, that
of worker processes is. Examples per second of processor time are reported as well, because other programs on the
machine affect them less.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def quickstart() -> Path:
    import codiemb_jax

    return Path(codiemb_jax.__file__).parent / "quickstart"


def write_data(path: Path, examples: int) -> None:
    """Writes examples whose words come from the texts of the quickstart."""
    random = np.random.default_rng(0)
    texts = (quickstart() / "data" / "train" / "ir" / "encyclopedia.jsonl").read_text(encoding="utf-8").splitlines()
    words = np.array(" ".join(triple[2] for text in texts for triple in json.loads(text)["positives"]).split())

    def triple(mean: float, instruction: str = "") -> list[str]:
        count = max(3, int(random.lognormal(np.log(mean), 0.5)))
        return [instruction, "", " ".join(random.choice(words, count))]

    with path.open("w", encoding="utf-8") as file:
        for _ in range(examples):
            record = {
                "task_type": "ir",
                "query": triple(8, "Given a question, retrieve passages that answer it"),
                "positives": [triple(60)],
                "negatives": [triple(60) for _ in range(4)],
            }
            file.write(json.dumps(record) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs one measurement in this process, and returns seconds and tokens."""
    from transformers import AutoTokenizer

    from codiemb_jax.config import PromptSettings
    from codiemb_jax.data import prepare as module
    from codiemb_jax.text.prompts import PromptTokenizer

    data = options.work / "data.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.workers == 0:
        with data.open(encoding="utf-8") as file:
            records = [json.loads(line) for line, _ in zip(file, range(options.loop_examples), strict=False)]
        texts = [r[2] for record in records for r in [record["query"], *record["positives"], *record["negatives"]]]
        tokenizer(texts[0])
        start, processor = time.perf_counter(), processor_seconds()
        tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
        return {
            "seconds": time.perf_counter() - start,
            "processor_seconds": processor_seconds() - processor,
            "examples": len(records),
            "tokens": tokens,
        }
    prompts = PromptTokenizer(tokenizer, PromptSettings())
    module.available_processors = lambda: options.workers
    with tempfile.TemporaryDirectory(dir=options.work) as cache:
        start, processor = time.perf_counter(), processor_seconds()
        prepared = module.prepare(
            data, "ir", prompts, query_max_tokens=options.max_tokens, passage_max_tokens=options.max_tokens,
            cache=Path(cache),
        )  # fmt: skip
        seconds, processor = time.perf_counter() - start, processor_seconds() - processor
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "examples": len(prepared),
        "tokens": prepared.totals.tokens,
    }


def processor_seconds() -> float:
    """Returns the time that this process and those it started have used processors."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the data")
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of the tokenizer (default: the quickstart's)")
    parser.add_argument("--examples", type=int, default=20_000, help="examples of the file (default: %(default)s)")
    parser.add_argument("--loop-examples", type=int, default=2000, help="examples of the loop (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="maximum length of a text (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="processes to compare with one (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="run only this measurement, in this process; 0: the loop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    options.model = options.model or quickstart() / "model"
    if options.workers is not None:
        options.json.write_text(json.dumps(measure(options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    write_data(options.work / "data.jsonl", options.examples)
    names = {
        (0, "true"): "one text at a time",
        (1, "false"): "prepare, 1 process with 1 thread",
        (1, "true"): "prepare, 1 process with threads",
        (options.processes, "true"): f"prepare, {options.processes} processes",
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    output = options.work / "result.json"
    for _ in range(options.rounds):
        for (workers, threads), name in names.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--workers", str(workers), "--json", output]
            subprocess.run(command, check=True, env=os.environ | {"TOKENIZERS_PARALLELISM": threads})
            rounds[name].append(json.loads(output.read_text()))
    table = Table("", "examples/s", "rounds", "tokens/s", "ratio", "per processor s")
    results = {}
    for name, measured in rounds.items():
        rates = [result["examples"] / result["seconds"] for result in measured]
        rate = float(np.median(rates))
        per_processor = float(np.median([result["examples"] / result["processor_seconds"] for result in measured]))
        results[name] = {
            "examples_per_second": rate,
            "lowest_round": min(rates),
            "highest_round": max(rates),
            "examples_per_processor_second": per_processor,
        }
        tokens = rate * measured[0]["tokens"] / measured[0]["examples"]
        ratio = rate / results["one text at a time"]["examples_per_second"]
        table.add_row(
            name, f"{rate:,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}", f"{tokens:,.0f}", f"{ratio:.2f}",
            f"{per_processor:,.0f}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"results": results, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
