"""Converts data into the format of this project: tables of pairs and triplets, and BEIR folders.

Reads .csv, .tsv, .jsonl, .json and .parquet files, folders of datasets' save_to_disk, and BEIR folders. Writes
train.jsonl, and with --held_out also heldout.jsonl, to a new folder.
"""

import argparse
import math
from collections.abc import Sequence

from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import check_new_folder, new_folder
from codiemb_jax.program import Parser, count_argument, loading_modules, path_argument, run_program, text_argument


def main(arguments: Sequence[str] | None = None, prog: str = "python -m codiemb_jax.convert_data") -> None:
    """Runs the program.

    Raises:
      UserError: If the arguments or the data are invalid.
    """
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    add("--input", required=True, type=path_argument, metavar="PATH", help="file or folder to convert")
    add("--output", required=True, type=path_argument, metavar="DIR", help="folder to write; must not exist")
    add(
        "--query",
        type=text_argument,
        metavar="COLUMN",
        help="queries, or first texts of pairs (default: query)",
    )
    add(
        "--positive",
        nargs="+",
        type=text_argument,
        metavar="COLUMN",
        help="relevant passages, or second texts of pairs (default: positive)",
    )
    add("--negative", nargs="+", type=text_argument, metavar="COLUMN", help="hard negatives")
    add(
        "--score",
        type=text_argument,
        metavar="COLUMN",
        help="similarity scores of pairs; without it, the data is for retrieval",
    )
    add(
        "--max_score",
        type=_positive_number,
        metavar="X",
        help="highest possible score; scores are divided by it (default: 1)",
    )
    add("--instruction", type=text_argument, default="", metavar="TEXT", help="task instruction of the queries")
    add("--split", type=text_argument, metavar="NAME", help="split of a folder (default: train)")
    add(
        "--held_out", type=_share, default=0.0, metavar="SHARE", help="share of the queries for evaluation, such as 0.1"
    )
    add("--seed", type=count_argument, metavar="N", help="seed of the choice of these queries (default: 0)")
    options = parser.parse_args(arguments)
    for flag in ("query", "score", "positive", "negative"):
        if "" in (value if isinstance(value := getattr(options, flag), list) else [value]):
            raise UserError(f"--{flag}: give the name of a column")
    if options.score is None and options.max_score is not None:
        raise UserError("--max_score has no effect without --score")
    if options.score is not None and (options.negative or len(options.positive or []) > 1):
        raise UserError("--score: similarity pairs have one --positive column and no --negative columns")
    if options.seed is not None and not options.held_out:
        raise UserError("--seed has no effect without --held_out")
    try:
        is_folder = options.input.is_dir()
    except OSError as error:  # too long
        raise UserError(f"--input {shorten(str(options.input))}: cannot be read: {error.strerror}") from error
    if options.split is not None and not is_folder:
        raise UserError("--split has no effect for a file")
    check_new_folder(options.output, "--output", *[options.input] * is_folder)

    with loading_modules():
        from rich.console import Console

        from codiemb_jax.conversion import ConversionSettings, convert, is_beir

    if is_beir(options.input):
        for flag in ("query", "positive", "negative", "score"):
            if getattr(options, flag) is not None:
                raise UserError(f"--{flag}: {options.input} is a BEIR folder, which has no such columns; leave it out")
    settings = ConversionSettings(
        task="ir" if options.score is None else "sts",
        query=options.query or "query",
        positives=tuple(options.positive or ["positive"]),
        negatives=tuple(options.negative or []),
        score=options.score or "",
        max_score=1.0 if options.max_score is None else options.max_score,
        instruction=options.instruction,
        split=options.split or "train",
        held_out=options.held_out,
        seed=options.seed or 0,
    )
    with new_folder(options.output) as folder:
        report = convert(options.input, folder, settings)
    console = Console()
    console.print(f"read {report.rows:,} rows")
    for name, number in report.examples.items():
        path = options.output / name
        console.print(f"wrote {number:,} {settings.task} examples to {path}", soft_wrap=True, markup=False)


def _positive_number(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number between 0 and 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    run_program(main)
