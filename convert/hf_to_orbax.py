"""python -m convert.hf_to_orbax --model DIR --output DIR

Writes a Hugging Face model as an Orbax checkpoint that training starts from.  Pooling, normalisation and a linear layer
are those of its modules.json; prompts are the default settings (with the weighted mean: none).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
from pydantic import ValidationError

from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.data.prompts import PromptEncoder
from codiemb_jax.errors import UserError, listed, run_program
from codiemb_jax.export import export_prompts
from codiemb_jax.files import check_new
from codiemb_jax.training.checkpoint import is_checkpoint, save_model
from codiemb_jax.training.mesh import make_mesh
from codiemb_jax.training.model import find_model, open_model, read_blueprint


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.hf_to_orbax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="folder in Hugging Face format, or a hub id")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="checkpoint to write")
    options = parser.parse_args(arguments)
    check_new(options.output, "--output")
    path = find_model(options.model)
    if is_checkpoint(path):
        raise UserError(f"--model {path}: is an Orbax checkpoint already; give a folder in Hugging Face format")
    mesh = make_mesh(MeshSettings(), jax.devices("cpu")[:1])
    settings = encoding_of(path)
    # The weighted mean cannot be exported with a prompt.
    prompt = PromptSettings(query="") if settings.pooling == "weighted_mean" else PromptSettings()
    model = open_model(settings, prompt, mesh)
    PromptEncoder(model.blueprint.tokenizer(), prompt)  # finds a tokenizer that cannot be used
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_model(options.output, model.stream(), model.stream_untrained(), model.blueprint)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
    print(f"wrote {count:,} parameters to {options.output}")
    print(f"an export of it would have the prompts {export_prompts(prompt)}; a run sets its own")


def encoding_of(path: Path) -> ModelSettings:
    """Settings under which a Hugging Face folder encodes: what its modules.json says, else the defaults."""
    try:
        return ModelSettings.model_validate({"path": str(path), **read_blueprint(path).encoding})
    except ValidationError as error:
        problems = [f"{problem['loc'][0]}: {problem['msg']}, found {problem['input']!r}" for problem in error.errors()]
        raise UserError(f"{path}: modules.json and what it names cannot be used:\n" + listed(problems)) from error


if __name__ == "__main__":
    run_program(main)
