"""Benchmarks the preparation of a data file: parsing, tokenizing and writing.

    python benchmarks/prepare.py --work models/prepare

Compares `prepare` with one and with several processes to a plain loop that writes the same examples, but calls the
Hugging Face tokenizer once per text; a second loop only calls the tokenizer. An example is a query, a passage that
answers it and four hard negatives, with lengths like those of news stories: about 30 tokens per query, and passages of
150 on average. Each measurement runs in a process of its own, and they alternate; the median of the rounds is
reported. Start-up of Python and imports is not counted, that of worker processes is. Examples per second of processor
time are reported as well, because other programs on the machine affect them less.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from inputs import QUICKSTART
from rich.console import Console
from rich.table import Table

LOOP = "one text at a time"
Measurement: TypeAlias = Callable[[argparse.Namespace, Path, Path], tuple[int, int]]
"""Tokenizes a data file, may write to a folder, and returns the numbers of examples and tokens."""


def write_data(path: Path, examples: int) -> None:
    """Writes examples whose words come from the texts of the quickstart."""
    random = np.random.default_rng(0)
    texts = (QUICKSTART / "data" / "train" / "ir" / "encyclopedia.jsonl").read_text(encoding="utf-8").splitlines()
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


def tokenize_only(options: argparse.Namespace, data: Path, folder: Path) -> tuple[int, int]:
    """Calls the tokenizer once per text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    examples = tokens = 0
    with data.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            examples += 1
            for triple in [record["query"], *record["positives"], *record["negatives"]]:
                tokens += len(tokenizer(triple[2])["input_ids"])
    return examples, tokens


def prepare_one_by_one(options: argparse.Namespace, data: Path, folder: Path) -> tuple[int, int]:
    """Writes the examples of `prepare` with one call of the tokenizer per text."""
    from transformers import AutoTokenizer

    from codiemb_jax.config import PromptSettings
    from codiemb_jax.data.tokenize import write_part

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    settings = PromptSettings()
    count = tokens = 0

    def example(record: dict[str, Any]) -> dict[str, Any]:
        prompts = [settings.begin + settings.query.replace("{instruction}", record["query"][0])]
        prompts += [settings.begin + settings.passage] * (len(record["positives"]) + len(record["negatives"]))
        ids, starts = [], []
        for prompt, triple in zip(prompts, [record["query"], *record["positives"], *record["negatives"]], strict=True):
            encoded = tokenizer(
                prompt + triple[2].strip("\t\n :") + settings.end, add_special_tokens=False, truncation=True,
                max_length=options.max_tokens, return_offsets_mapping=True,
            )  # fmt: skip
            ids.append(np.array(encoded["input_ids"], np.int32))
            starts.append(next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt)))
        lengths = np.array([each.size for each in ids], np.int32)
        return {"tokens": np.concatenate(ids), "lengths": lengths, "content_starts": np.array(starts, np.int32)}

    def examples() -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal count, tokens
        with data.open(encoding="utf-8") as file:
            for count, line in enumerate(file, 1):
                value = example(json.loads(line))
                tokens += value["tokens"].size
                yield count, value

    write_part(examples(), folder)
    return count, tokens


def prepare_in_processes(processes: int) -> Measurement:
    """Returns a measurement of `prepare`."""

    def run(options: argparse.Namespace, data: Path, folder: Path) -> tuple[int, int]:
        from transformers import AutoTokenizer

        from codiemb_jax.config import PromptSettings
        from codiemb_jax.data import prepare as module
        from codiemb_jax.text.prompts import PromptTokenizer

        module.available_processors = lambda: processes
        prepared = module.prepare(
            data, "ir", PromptTokenizer(AutoTokenizer.from_pretrained(options.model), PromptSettings()),
            query_max_tokens=options.max_tokens, passage_max_tokens=options.max_tokens, cache=folder,
        )  # fmt: skip
        return len(prepared), prepared.totals.tokens

    return run


def measure(options: argparse.Namespace, measurement: Measurement, examples: int) -> dict[str, Any]:
    """Runs one measurement in this process, and returns seconds and tokens."""
    data = data_path(options, examples)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        first = Path(folder) / "first.jsonl"
        with data.open(encoding="utf-8") as file:
            first.write_text(file.readline(), encoding="utf-8")
        measurement(options, first, Path(folder) / "first")  # imports modules
        start, processor = time.perf_counter(), processor_seconds()
        count, tokens = measurement(options, data, Path(folder) / "all")
        seconds, processor = time.perf_counter() - start, processor_seconds() - processor
    return {"seconds": seconds, "processor_seconds": processor, "examples": count, "tokens": tokens}


def data_path(options: argparse.Namespace, examples: int) -> Path:
    return options.work / f"{examples}.jsonl"


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
    parser.add_argument("--measure", type=int, metavar="N", help="run only this measurement, in this process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    options.model = options.model or QUICKSTART / "model"
    measurements: dict[str, tuple[Measurement, int, str]] = {
        "one text at a time, only tokenized": (tokenize_only, options.loop_examples, "false"),
        LOOP: (prepare_one_by_one, options.loop_examples, "false"),
        "prepare, 1 process with 1 thread": (prepare_in_processes(1), options.examples, "false"),
        "prepare, 1 process with threads": (prepare_in_processes(1), options.examples, "true"),
        f"prepare, {options.processes} processes": (
            prepare_in_processes(options.processes), options.examples, "true",
        ),
    }  # fmt: skip
    if options.measure is not None:
        measurement, examples, _ = list(measurements.values())[options.measure]
        options.json.write_text(json.dumps(measure(options, measurement, examples)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    for examples in {options.examples, options.loop_examples}:
        write_data(data_path(options, examples), examples)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in measurements}
    output = options.work / "result.json"
    for _ in range(options.rounds):
        for number, (name, (_, _, threads)) in enumerate(measurements.items()):
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(number), "--json", output]
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
    for name, measured in rounds.items():
        result = results[name]
        rate = result["examples_per_second"]
        tokens = rate * measured[0]["tokens"] / measured[0]["examples"]
        ratio = rate / results[LOOP]["examples_per_second"]
        table.add_row(
            name, f"{rate:,.0f}", f"{result['lowest_round']:,.0f} to {result['highest_round']:,.0f}",
            f"{tokens:,.0f}", f"{ratio:.2f}", f"{result['examples_per_processor_second']:,.0f}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"results": results, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
