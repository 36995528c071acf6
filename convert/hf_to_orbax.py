"""python -m convert.hf_to_orbax --model DIR --output DIR

Writes a Hugging Face model as an Orbax checkpoint that training starts from.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax

from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError, run_program
from codiemb_jax.training.checkpoint import save_model
from codiemb_jax.training.mesh import make_mesh
from codiemb_jax.training.model import open_model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.hf_to_orbax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder in Hugging Face format, or a hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="checkpoint to write")
    options = parser.parse_args(arguments)
    if options.output.exists():
        raise UserError(f"--output {options.output}: already exists; give a folder that does not")
    mesh = make_mesh(MeshSettings(), jax.devices("cpu")[:1])
    model = open_model(ModelSettings(path=options.model), PromptSettings(), mesh)
    save_model(options.output, model.stream(), model.stream_untrained(), model.blueprint)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
    print(f"wrote {count:,} parameters to {options.output}")


if __name__ == "__main__":
    run_program(main)
