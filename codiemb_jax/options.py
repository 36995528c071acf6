"""Command lines of programs that take a configuration: `--config FILE [--section.key VALUE ...]`."""

import argparse
from collections.abc import Sequence

from pydantic import ValidationError

from codiemb_jax.config import DistributedSettings, Settings
from codiemb_jax.config_file import find_config, flags_parser, load_settings, parse_flags
from codiemb_jax.errors import UserError, format_problems
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


def add_distributed_flags(parser: Parser) -> None:
    """Adds the settings in `distributed` as flags of a program without a configuration."""
    for name, field in DistributedSettings.model_fields.items():
        kind = str if name == "coordinator" else int
        text = " ".join((field.description or "").split())
        parser.add_argument(f"--distributed.{name}", type=kind, metavar="VALUE", help=text)


def distributed_settings(options: argparse.Namespace) -> DistributedSettings:
    """Returns the values of the flags of `add_distributed_flags`.

    Raises:
      UserError: If they are invalid.
    """
    values = {name: getattr(options, f"distributed.{name}") for name in DistributedSettings.model_fields}
    try:
        return DistributedSettings.model_validate(values)
    except ValidationError as error:
        problems = [
            f"--distributed{''.join(f'.{part}' for part in problem['loc'])}: "
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
        raise UserError("invalid flags:\n" + format_problems(problems)) from error


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
