"""python -m convert.orbax_to_hf --checkpoint DIR --output DIR [--architecture stock] [--verify]

Writes an Orbax checkpoint as a Hugging Face folder for sentence-transformers.  --architecture stock writes the
architecture that transformers itself knows, so that no remote code is needed (utu becomes Qwen3).  --verify loads
the folder in sentence-transformers and compares its token ids and vectors with ours.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError, run_program
from codiemb_jax.export import write_export
from codiemb_jax.files import check_new
from codiemb_jax.training.checkpoint import restore_blueprint
from codiemb_jax.training.mesh import make_mesh
from codiemb_jax.training.model import ModelFolder, open_model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.orbax_to_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="Orbax checkpoint of ours")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--architecture", choices=["stock"], help="default: config.json as it came")
    parser.add_argument("--verify", action="store_true", help="compare with sentence-transformers")
    options = parser.parse_args(arguments)
    check_new(options.output, "--output")
    if options.verify and importlib.util.find_spec("sentence_transformers") is None:
        raise UserError("--verify needs sentence-transformers: pip install sentence-transformers")
    model = open_checkpoint(options.checkpoint)
    stock = options.architecture == "stock"
    config = model.blueprint.config
    if options.verify and not stock and model.family.stock(config)["model_type"] != config["model_type"]:
        raise UserError(
            f"--verify: sentence-transformers would need the remote code of a {config['model_type']} model, which is "
            "never run; add --architecture stock"
        )
    write_export(options.output, model.stream(), model.stream_untrained(), model.blueprint, stock=stock)
    print(f"wrote {options.output}")
    if options.verify:
        from convert.verify import verify  # PyTorch is loaded only where it is asked for

        if not verify(options.output, model):
            sys.exit(f"verification failed; {options.output} is left for you to look at")


def open_checkpoint(path: Path) -> ModelFolder:
    """A checkpoint with the attention, prompts and lengths that it was trained with."""
    blueprint = restore_blueprint(path)
    settings = ModelSettings.model_validate({"path": str(path), "compute_dtype": "float32", **blueprint.encoding})
    mesh = make_mesh(MeshSettings(), jax.devices("cpu")[:1])
    return open_model(settings, PromptSettings(**blueprint.prompt), mesh, blueprint.max_tokens)


if __name__ == "__main__":
    run_program(main)
