"""Mines hard negatives: for each query, corpus texts that a model ranks high, but that are not among its positives.

Writes the records of IR files in the same format and order, with mined negatives. Texts equal to a positive or to the
query are never negatives; --margin, --relative_margin and --max_score drop others that are likely to be unlabeled
positives.
"""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from codiemb_jax.errors import UserError
from codiemb_jax.files import check_new_file
from codiemb_jax.program import (
    Parser,
    count_argument,
    loading_modules,
    path_argument,
    positive_argument,
    run_program,
    text_argument,
)

if TYPE_CHECKING:
    from codiemb_jax.evaluation.mining import MiningReport


def main(arguments: Sequence[str] | None = None, prog: str = "python -m codiemb_jax.mine") -> None:
    """Runs the program.

    Raises:
      UserError: If the arguments, the model or the data are invalid.
    """
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, hub id, checkpoint, or folder of a run")
    add("--ir", required=True, nargs="+", type=path_argument, metavar="FILE", help="IR files, or folders of them")
    add(
        "--corpus",
        type=path_argument,
        metavar="FILE",
        help=".jsonl file (`text`, optionally `title`) or .txt file (one text per line) with the texts to choose from; "
        "default: all passages of the IR files",
    )
    add("--output", required=True, type=path_argument, metavar="FILE", help="the .jsonl file to write")
    add("--negatives", type=positive_argument, default=4, metavar="N", help="negatives per query (default: 4)")
    add("--range_min", type=count_argument, default=10, metavar="N", help="skip the N nearest texts (default: 10)")
    add(
        "--range_max",
        type=positive_argument,
        default=50,
        metavar="N",
        help="consider the N nearest texts (default: 50)",
    )
    add(
        "--margin",
        type=_number,
        metavar="X",
        help="drop texts whose cosine is above that of the query's worst positive minus X",
    )
    add("--relative_margin", type=_number, metavar="X", help="the same with a share X of the positive's cosine")
    add("--max_score", type=_number, metavar="X", help="drop texts whose cosine is above X")
    add(
        "--sampling",
        choices=["top", "random"],
        default="top",
        help="choose the nearest of the remaining texts, or random ones (default: top)",
    )
    add("--seed", type=count_argument, metavar="N", help="seed of --sampling random (default: 0)")
    add("--scores", action="store_true", help="write the cosines as positive_scores and negative_scores")
    add(
        "--instruction",
        type=text_argument,
        metavar="TEXT",
        help="task instruction of all queries for this search, instead of those in the data",
    )
    add("--batch_size", type=positive_argument, default=32, metavar="N", help="rows per batch (default: 32)")
    add("--keep_negatives", action="store_true", help="add to the negatives in the data instead of replacing them")
    options = parser.parse_args(arguments)
    check_new_file(options.output, ".jsonl", ".json")
    if options.seed is None:
        options.seed = 0
    elif options.sampling != "random":
        raise UserError("--seed has no effect without --sampling random")

    with loading_modules():
        from codiemb_jax.compilation import use_compilation_cache
        from codiemb_jax.data.find import find_files
        from codiemb_jax.embedder import Embedder
        from codiemb_jax.evaluation.mining import MiningSettings, ModelEncoder, mine

    names = MiningSettings.__dataclass_fields__
    settings = MiningSettings(**{name: value for name, value in vars(options).items() if name in names})
    find_files(options.ir, "--ir")  # together, to notice a file that is listed twice
    files = [file for path in options.ir for file in find_files([path], "--ir")]
    use_compilation_cache()
    encoder = ModelEncoder(Embedder.from_pretrained(options.model), options.instruction, options.batch_size)
    report = mine(files, options.corpus, options.output, settings, encoder)
    print_report(report, settings.negatives)


def print_report(report: "MiningReport", wanted: int) -> None:
    """Prints what was found."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "number")
    table.columns[1].justify = "right"
    rows = {
        "queries": report.queries,
        "different texts in the corpus": report.corpus,
        "candidates": report.candidates,
        **{f"dropped: {reason}": number for reason, number in report.dropped.items()},
        "negatives": report.negatives,
        f"queries with fewer than {wanted} negatives": report.short,
    }
    for name, number in rows.items():
        table.add_row(name, f"{number:,}")
    Console().print(table)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number")
    return number


if __name__ == "__main__":
    run_program(main)
