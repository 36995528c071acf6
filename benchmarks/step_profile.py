"""Shows where the time of a packed training step goes on CPUs.

    pip install -e ".[test,benchmark]" && python benchmarks/step_profile.py --work models/benchmark

Runs the training program on the model and the texts of benchmarks/training.py under the profiler of JAX, and adds up
the time of each kind of operation of the compiled steps. XLA uses one thread, because the profiler cannot tell which
operation other threads work on.
"""

import argparse
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
from inputs import write_model
from jax.profiler import ProfileData, ProfileOptions
from rich.console import Console
from rich.table import Table
from training import run_codiemb_jax, write_data

STEP = "jit_step"
"""The name of the compiled program of a step."""
MATRIX_PRODUCTS = re.compile(r"dot(_general)?")
"""Operations of matrix products."""
MOVES = re.compile(r"(bitcast|broadcast|concatenate|copy|dynamic|fusion|pad|slice|transpose|update|wrapped|[-_])+")
"""Operations that only move data, or fill memory."""


def operations(profile: Path) -> Iterator[tuple[str, float]]:
    """Yields the kind and the seconds of each operation of the steps, without those that it contains."""
    for plane in ProfileData.from_file(str(profile)).planes:
        for line in plane.lines:
            events = sorted(line.events, key=lambda event: (event.start_ns, -event.end_ns))
            seconds = [event.duration_ns / 1e9 for event in events]
            open_events: list[int] = []
            for i, event in enumerate(events):
                while open_events and events[open_events[-1]].end_ns <= event.start_ns:
                    open_events.pop()
                if open_events:
                    seconds[open_events[-1]] -= event.duration_ns / 1e9
                open_events.append(i)
            for event, own in zip(events, seconds, strict=True):
                if dict(event.stats).get("hlo_module") == STEP:
                    yield re.sub(r"[.\d]+(clone)?$", "", event.name), own


def class_of(kind: str) -> str:
    """Returns what a kind of operation does."""
    if MATRIX_PRODUCTS.fullmatch(kind):
        return "matrix products"
    return "moving data" if MOVES.fullmatch(kind) else "element by element, and sums"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the model and the data")
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder (default: a random decoder)")
    parser.add_argument("--queries", type=int, default=16, help="queries per step (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=512, help="maximum length of a text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps (default: %(default)s)")
    parser.add_argument("--kinds", type=int, default=12, help="kinds of operations to show (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    options.model = options.model or options.work / "decoder"
    options.dtype, options.row_tokens = "float32", None
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.model.exists():
        write_model(options.model)
    write_data(options.work / "data.jsonl", options.model, options.queries * options.steps, options.max_tokens, False)
    os.environ["NPROC"] = "1"  # XLA reads it when it starts, which it has not yet
    profiler = ProfileOptions()
    profiler.python_tracer_level = 0
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        with jax.profiler.trace(folder, profiler_options=profiler):
            run_codiemb_jax(options, packing=True)
        (profile,) = Path(folder).rglob("*.xplane.pb")
        seconds: Counter[str] = Counter()
        calls: Counter[str] = Counter()
        for kind, own in operations(profile):
            seconds[kind] += own
            calls[kind] += 1
    total = seconds.total()
    table = Table("operations", "class", "calls", "share")
    for kind, value in seconds.most_common(options.kinds):
        table.add_row(kind, class_of(kind), f"{calls[kind]:,}", f"{value / total:.1%}")
    classes: Counter[str] = Counter()
    for kind, value in seconds.items():
        classes[class_of(kind)] += value
    for name, value in classes.most_common():
        table.add_row("[bold]all", name, "", f"[bold]{value / total:.1%}")
    Console().print(table)
    if options.json:
        content = {"classes": classes, "operations": seconds, "calls": calls}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
