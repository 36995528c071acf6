"""Writes a Hugging Face model as an Orbax checkpoint that training starts from.

A folder that sentence-transformers describes keeps its pooling, prompts and lengths.  Others get the default settings.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from codiemb_jax.errors import UserError, loading_modules, run_program


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.hf_to_orbax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder in Hugging Face format, or a hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="checkpoint to write")
    options = parser.parse_args(arguments)

    with loading_modules():
        import jax

        from codiemb_jax.checkpoints.export import sentence_prompts
        from codiemb_jax.checkpoints.model import locate, open_as_stored, open_folder
        from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint, save_model
        from codiemb_jax.config import MeshSettings, PromptSettings
        from codiemb_jax.files import check_new
        from codiemb_jax.sharding import make_mesh
        from codiemb_jax.text.prompts import PromptTokenizer

    path = locate(options.model)
    check_new(options.output, "--output", path)
    folder = open_folder(path)
    if isinstance(folder, OrbaxCheckpoint):
        raise UserError(f"--model {path}: is an Orbax checkpoint already; give a folder in Hugging Face format")
    mesh = make_mesh(MeshSettings(), jax.devices("cpu")[:1])
    model = open_as_stored(folder, mesh, PromptSettings())
    if model.blueprint.prompt is not None:
        PromptTokenizer(model.blueprint.tokenizer(), model.blueprint.prompt)  # finds a tokenizer that cannot be used
    save_model(options.output, model.stream(), model.stream_passthrough(), model.blueprint)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
    print(f"wrote {count:,} parameters to {options.output}")
    print(f"an export of it has the prompts {sentence_prompts(model.blueprint).prompts}; a run sets its own")


if __name__ == "__main__":
    run_program(main)
