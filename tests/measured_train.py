"""The training program, which measures the memory of each step.

    python -m tests.measured_train RECORD [training arguments]

Writes the bytes that the process needed during each step, beyond those before it, to RECORD, one line per step. Linux
only.
"""

import ctypes
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from codiemb_jax.program import loading_modules, run_program

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)[1])


def main(arguments: Sequence[str]) -> None:
    with loading_modules():
        import jax

        from codiemb_jax.train import main as train
        from codiemb_jax.training import loop

    record, *rest = arguments
    make_step = loop.make_step

    def measured(*values):
        step = make_step(*values)

        def run(*inputs):
            compiled = step.lower(*inputs).compile()  # needs memory of its own
            ctypes.CDLL(None).malloc_trim(0)  # gives back to the system what is free
            before = resident_bytes("VmRSS")
            CLEAR_REFS.write_text("5")  # the peak starts again from the current value
            outputs = jax.block_until_ready(compiled(*inputs))
            with Path(record).open("a") as file:
                file.write(f"{resident_bytes('VmHWM') - before}\n")
            return outputs

        return run

    loop.make_step = measured
    train(rest)


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
