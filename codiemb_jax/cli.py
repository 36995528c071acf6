"""The console command `codiemb`, with one subcommand per program."""

import sys
from collections.abc import Sequence
from importlib import import_module

from codiemb_jax.program import Parser, run_program
from codiemb_jax.version import __version__

PROGRAMS = {
    "train": ("codiemb_jax.train", "fine-tune a model, or continue a run that was stopped"),
    "convert-data": ("codiemb_jax.convert_data", "convert tables and BEIR folders into training data"),
    "prepare": ("codiemb_jax.prepare", "tokenize the data of a configuration ahead of time"),
    "preflight": ("codiemb_jax.preflight", "check whether a configuration fits on the given devices"),
    "evaluate": ("codiemb_jax.evaluate", "evaluate a model on held-out data"),
    "encode": ("codiemb_jax.encode", "encode the texts of a file"),
    "mine": ("codiemb_jax.mine", "mine hard negatives for retrieval data"),
    "hf-to-orbax": ("convert.hf_to_orbax", "convert a Hugging Face folder to an Orbax checkpoint"),
    "orbax-to-hf": ("convert.orbax_to_hf", "export an Orbax checkpoint as a Hugging Face folder"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand.

    Raises:
      UserError: If the subcommand is unknown or its arguments are invalid.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser("codiemb", "Fine-tunes text-embedding models in JAX.")
    parser.add_argument("--version", action="version", version=f"codiemb_jax {__version__}")
    subcommands = parser.add_subparsers(title="subcommands", metavar="COMMAND", dest="command", required=True)
    for name, (_, help_text) in PROGRAMS.items():
        subcommands.add_parser(name, help=help_text, add_help=False)
    if not arguments:
        parser.print_help()
        return
    options = parser.parse_args(arguments[:1])
    module, _ = PROGRAMS[options.command]
    import_module(module).main(arguments[1:], prog=f"codiemb {options.command}")


def run() -> None:
    """Entry point of the installed command."""
    run_program(main)
