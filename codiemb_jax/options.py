"""Command lines of programs that take a configuration: `--config FILE [--section.key VALUE ...]`."""

import argparse
from collections.abc import Sequence

from codiemb_jax.config import Settings
from codiemb_jax.config_file import find_config, flags_parser, load_settings, parse_flags
from codiemb_jax.errors import UserError
from codiemb_jax.program import Parser


def config_parser(prog: str, description: str | None) -> Parser:
    """Returns the parser of a program, with `--config`. The program may add flags of its own."""
    parser = Parser(prog, description, add_help=False)
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file with settings, or the name of a configuration of this package, such as quickstart",
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    return parser


def read_options(parser: Parser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Settings] | None:
    """Reads the flags of a program and its settings.

    Args:
      parser: The parser, from `config_parser`.
      arguments: The command line.

    Returns:
      The flags and the settings; None if the help was printed instead.

    Raises:
      UserError: If the arguments or the settings are invalid.
    """
    options, flags = parser.parse_known_args(arguments)
    if options.help:
        parents = [parser, flags_parser()]
        usage = "%(prog)s --config FILE [--SETTING VALUE ...]"
        Parser(parser.prog, parser.description, usage=usage, add_help=False, parents=parents).print_help()
        return None
    if not options.config:
        parse_flags(flags)  # an unknown flag may be a misspelled --config
        raise UserError("--config is required; give a settings file, for example --config quickstart")
    if len(options.config) > 1:
        raise UserError(f"--config: given {len(options.config)} times")
    return options, load_settings(find_config(options.config[0]), flags)
