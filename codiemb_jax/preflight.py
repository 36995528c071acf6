"""Checks whether the training steps of a configuration fit on the given devices, and how fast they could be at most.

Compiles the steps for the devices of this machine or, with --topology, for a TPU slice, which needs the extra
`preflight` but no TPU. Reads neither weights nor data: texts are assumed to be as long as in retrieval data (queries
of about 40 tokens, passages of 250 on average and 1,000 at most). If the steps do not fit, looks for the smallest
change of the settings with which they do.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from codiemb_jax.program import loading_modules, run_program

if TYPE_CHECKING:
    from codiemb_jax.training.preflight import Report


def main(arguments: Sequence[str] | None = None, prog: str = "python -m codiemb_jax.preflight") -> None:
    """Runs the program.

    Raises:
      UserError: If the arguments or settings are invalid, or TPU programs cannot be compiled.
    """
    with loading_modules():
        from codiemb_jax.options import config_parser, read_options

    parser = config_parser(prog, __doc__)
    parser.add_argument(
        "--topology", metavar="SLICE", help="compile for a TPU slice, such as v5e:4x4, instead of the devices here"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    found = read_options(parser, arguments)
    if found is None:
        return
    options, settings = found
    if options.topology is not None:
        # There is no TPU to use, to lock, or to ask for its metadata.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

    with loading_modules():
        from rich.console import Console

        from codiemb_jax.sharding import find_devices
        from codiemb_jax.training.ahead import tpu_devices
        from codiemb_jax.training.preflight import Preflight

    devices = find_devices() if options.topology is None else tpu_devices(options.topology)
    preflight = Preflight(settings, devices)
    console = Console(stderr=True)
    with console.status("compiling"):
        report = preflight.report()
    change = None
    if report.fits is False:
        with console.status("looking for settings that fit"):
            change = preflight.smallest_change(report)
    if options.json:
        print(json.dumps(as_json(report) | {"change": change and change[0], "changed": change and as_json(change[1])}))
        return
    print_report(report)
    if change:
        flags = " ".join(f"--{name} {str(value).lower()}" for name, value in change[0].items())
        Console().print(f"It fits with {flags}:", soft_wrap=True)
        print_report(change[1])
    elif report.fits is False:
        Console().print("Nothing that was tried fits; use more or larger devices, or a smaller batch.")


def as_json(report: "Report") -> dict[str, Any]:
    """Returns a report as JSON."""
    return {
        "fits": report.fits,
        "devices": report.devices,
        "device_kind": report.device_kind,
        "device_memory": report.chip.memory,
        "parameters": report.parameters,
        "state_bytes": report.state_bytes,
        "host_state_bytes": report.host_bytes,
        "steps": {
            task: asdict(step)
            | {
                "rows": report.shapes[task].layout.rows,
                "row_tokens": report.shapes[task].layout.row_length,
                "tokens": report.shapes[task].tokens,
                "computed_tokens": report.shapes[task].computed_tokens,
            }
            for task, step in report.steps.items()
        },
    }


def print_report(report: "Report") -> None:
    """Prints a report as a table."""
    from rich.console import Console
    from rich.table import Table

    memory = f", {size(report.chip.memory)} of memory each" if report.chip.memory else ""
    host = f", and {size(report.host_bytes)} in host memory" if report.host_bytes else ""
    console = Console()
    if not console.is_terminal:
        console.width = 120  # rich assumes 80, which cuts numbers
    console.print(
        f"{report.devices} x {report.device_kind}{memory}; {report.parameters:,} parameters; weights and moments: "
        f"{size(report.state_bytes)} per device{host}",
        soft_wrap=True,
        highlight=False,
    )
    table = Table("step")
    for column in ("rows", "memory", "FLOPs", "traffic", "exposed", "shortest", "tokens/s"):
        table.add_column(column, justify="right")
    for task, step in report.steps.items():
        shapes = report.shapes[task]
        row = [task, f"{shapes.layout.rows} x {shapes.layout.row_length}", size(step.needed), f"{step.flops:.2g}"]
        row += [size(step.collective_bytes), size(step.exposed_collective_bytes)]
        if step.seconds:
            row += [f"{step.seconds:.2g} s", f"{shapes.tokens / step.seconds:,.0f}"]
        table.add_row(*row)
        if report.chip.memory:
            free = report.chip.memory - step.needed
            verdict = f"fits, {size(free)} free" if step.fits else f"does not fit, {size(-free)} too much"
            console.print(f"{task} steps: {verdict}", highlight=False)
    console.print(table)
    console.print(
        "All per device and step. Traffic is what it exchanges with others; exposed, while it computes nothing. The "
        "shortest time assumes peak rates; tokens per second, over all devices, are those of that time.",
        highlight=False,
    )


def size(count: float | None) -> str:
    """Formats a number of bytes."""
    if count is None:
        return ""
    return f"{count / 1e9:,.1f} GB" if abs(count) >= 1e9 else f"{count / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_program(main)
