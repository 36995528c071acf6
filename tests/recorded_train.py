"""The training program, which also records the examples that its process reads.

    python -m tests.recorded_train RECORD [--ring] [arguments of the training program]

Each line of RECORD is [step, examples]. --ring computes InfoNCE tile by tile for any batch.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from codiemb_jax.data import loader
from codiemb_jax.objectives import contrastive
from codiemb_jax.program import run_program
from codiemb_jax.train import main as train


def main(arguments: Sequence[str]) -> None:
    record, *arguments = arguments
    if "--ring" in arguments:
        arguments.remove("--ring")
        contrastive.DENSE_BYTES = 0
    read = loader.StepSource._batch

    def recorded(self, plan, start, stop):
        with Path(record).open("a") as file:
            file.write(json.dumps([plan.number, plan.examples[start:stop].tolist()]) + "\n")
        return read(self, plan, start, stop)

    loader.StepSource._batch = recorded
    train(arguments)


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
