"""The training program, with changes for tests.

    python -m tests.recorded_train RECORD [--ring] [--heartbeat SECONDS] [--connect SECONDS] [training arguments]

Writes the examples that this process reads to RECORD, with a line [step, examples] for each of its devices. --ring
computes InfoNCE tile by tile for any batch. --heartbeat sets the time after which a silent process is considered dead,
and --connect how long processes wait for each other at the start.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from codiemb_jax.program import loading_modules, run_program


def main(arguments: Sequence[str]) -> None:
    with loading_modules():
        from codiemb_jax import distributed
        from codiemb_jax.data import loader
        from codiemb_jax.objectives import contrastive
        from codiemb_jax.train import main as train

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("record", type=Path)
    parser.add_argument("--ring", action="store_true")
    parser.add_argument("--heartbeat", type=int, default=distributed.HEARTBEAT_SECONDS)
    parser.add_argument("--connect", type=int, default=distributed.CONNECT_SECONDS)
    options, rest = parser.parse_known_args(arguments)
    distributed.HEARTBEAT_SECONDS = options.heartbeat
    distributed.CONNECT_SECONDS = options.connect
    if options.ring:
        contrastive.DENSE_BYTES = 0
    read = loader.StepSource._batch

    def recorded(self, plan, start, stop):
        with options.record.open("a") as file:
            file.write(json.dumps([plan.number, plan.examples[start:stop].tolist()]) + "\n")
        return read(self, plan, start, stop)

    loader.StepSource._batch = recorded
    train(rest)


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
