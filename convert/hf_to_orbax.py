"""Converts a Hugging Face folder to an Orbax checkpoint that training can start from.

Pooling, prompts and length limits of a sentence-transformers folder are kept. Other folders get the defaults.
"""

from collections.abc import Sequence

from codiemb_jax.errors import UserError
from codiemb_jax.program import Parser, loading_modules, path_argument, run_program


def main(arguments: Sequence[str] | None = None, prog: str = "python -m convert.hf_to_orbax") -> None:
    parser = Parser(prog, __doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder in Hugging Face format, or a hub id")
    parser.add_argument("--output", required=True, type=path_argument, metavar="DIR", help="checkpoint to write")
    options = parser.parse_args(arguments)

    with loading_modules():
        import jax

        from codiemb_jax.checkpoints.export import sentence_prompts
        from codiemb_jax.checkpoints.model import open_folder, open_with_stored_settings, resolve_model_path
        from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint, save_model
        from codiemb_jax.config import PromptSettings
        from codiemb_jax.files import check_new_folder
        from codiemb_jax.sharding import cpu_mesh
        from codiemb_jax.text.prompts import PromptTokenizer

    path = resolve_model_path(options.model)
    check_new_folder(options.output, "--output", path)
    folder = open_folder(path)
    if isinstance(folder, OrbaxCheckpoint):
        raise UserError(f"--model {path}: is already an Orbax checkpoint; give a folder in Hugging Face format")
    mesh = cpu_mesh()
    model = open_with_stored_settings(folder, mesh, PromptSettings())
    if model.blueprint.prompt is not None:
        PromptTokenizer(model.blueprint.tokenizer(), model.blueprint.prompt)  # fails early if the tokenizer is invalid
    save_model(options.output, model.stream(), model.stream_passthrough(), model.blueprint)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract))
    print(f"wrote {count:,} parameters to {options.output}")
    print("prompts of its exports (a training run uses those in its settings):")
    for name, prompt in sentence_prompts(model.blueprint).prompts.items():
        print(f"  {name}: {prompt!r}")


if __name__ == "__main__":
    run_program(main)
