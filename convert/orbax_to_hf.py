"""Exports an Orbax checkpoint as a Hugging Face folder for sentence-transformers.

With --architecture stock, the folder uses an architecture that transformers supports natively, so no remote code is
needed (utu becomes Qwen3). --verify loads the folder in sentence-transformers and compares token ids and embeddings.
"""

import importlib.util
import sys
from collections.abc import Sequence

from codiemb_jax.errors import UserError
from codiemb_jax.program import Parser, loading_modules, path_argument, run_program


def main(arguments: Sequence[str] | None = None, prog: str = "python -m convert.orbax_to_hf") -> None:
    parser = Parser(prog, __doc__)
    parser.add_argument(
        "--checkpoint", required=True, type=path_argument, metavar="DIR", help="Orbax checkpoint to export"
    )
    parser.add_argument("--output", required=True, type=path_argument, metavar="DIR", help="folder to write")
    parser.add_argument("--architecture", choices=["stock"], help="default: that of the original config.json")
    parser.add_argument("--verify", action="store_true", help="compare with sentence-transformers")
    parser.add_argument(
        "--mteb",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="also write the query prompts of these tasks of MTEB, or of cmteb, under the names that mteb looks up",
    )
    options = parser.parse_args(arguments)

    with loading_modules():
        from codiemb_jax.checkpoints.export import write_export
        from codiemb_jax.checkpoints.model import open_checkpoint
        from codiemb_jax.files import check_new_folder

    check_new_folder(options.output, "--output", options.checkpoint)
    if options.verify and importlib.util.find_spec("sentence_transformers") is None:
        raise UserError("--verify needs sentence-transformers: pip install sentence-transformers")
    model = open_checkpoint(options.checkpoint)
    stock = options.architecture == "stock"
    config = model.blueprint.config
    if options.verify and not stock and model.family.stock(config)["model_type"] != config["model_type"]:
        raise UserError(
            f"--verify: sentence-transformers would need the remote code of the {config['model_type']} model, which is "
            "never run; add --architecture stock"
        )
    instructions = {}
    if options.mteb:
        with loading_modules():
            from codiemb_jax.evaluation.mteb_tasks import instructions_of
        instructions = instructions_of(options.mteb)
    write_export(
        options.output,
        model.stream(),
        model.stream_passthrough(),
        model.blueprint,
        stock=stock,
        instructions=instructions,
    )
    print(f"wrote {options.output}")
    if options.verify:
        with loading_modules():
            from codiemb_jax.checkpoints.verify import exported_params, verify  # loads PyTorch
            from codiemb_jax.embedder import Embedder

        embedder = Embedder(model.graph, exported_params(model), model.blueprint, model.mesh)
        if not verify(options.output, model, embedder):
            sys.exit(f"verification failed; {options.output} is kept for inspection")


if __name__ == "__main__":
    run_program(main)
