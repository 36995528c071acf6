"""Tokenizes all training files of a configuration, so that training finds them in the cache.

Training does the same when it starts. Run this ahead of time on a machine without accelerators, with the same cache
($CODIEMB_JAX_CACHE) and the same settings.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from codiemb_jax.program import loading_modules, run_program

if TYPE_CHECKING:
    from codiemb_jax.data.store import PreparedDataset


def main(arguments: Sequence[str] | None = None, prog: str = "python -m codiemb_jax.prepare") -> None:
    """Runs the program.

    Raises:
      UserError: If the arguments, settings, model or data are invalid.
    """
    with loading_modules():
        from codiemb_jax.options import config_parser, read_options

    parser = config_parser(prog, __doc__)
    parser.add_argument(
        "--beam",
        metavar="RUNNER",
        help="tokenize with Apache Beam and this runner, for example DirectRunner, instead of processes on this "
        "machine; its workers must have the same cache folder",
    )
    found = read_options(parser, arguments)
    if found is None:
        return
    options, settings = found

    with loading_modules():
        from codiemb_jax.batch import TASKS
        from codiemb_jax.checkpoints.model import open_model
        from codiemb_jax.data.beam import check_runner
        from codiemb_jax.data.find import dataset_names
        from codiemb_jax.sharding import cpu_mesh
        from codiemb_jax.text.prompts import PromptTokenizer
        from codiemb_jax.training.run import check_cache, find_data, prepare_data

    if options.beam is not None:
        check_runner(options.beam)
    files = find_data(settings)
    check_cache(settings.output_dir, [path for task in TASKS for path in getattr(settings.data, task)])
    max_tokens = settings.data.max_tokens()
    # Nothing is computed here, so this machine need not have what the attention backend needs.
    model_settings = settings.model.model_copy(update={"attention_backend": "auto"})
    model = open_model(model_settings, settings.prompt, cpu_mesh(), max_tokens)
    tokenizer = PromptTokenizer(model.blueprint.tokenizer(), settings.prompt)
    datasets = prepare_data(settings, files, tokenizer, options.beam)
    print_report(datasets, dataset_names([dataset.path for dataset in datasets]))


def print_report(datasets: Sequence["PreparedDataset"], names: Sequence[str]) -> None:
    """Prints the totals of each dataset."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("dataset", "task")
    for column in ("examples", "tokens", "longest text", "texts at the limit"):
        table.add_column(column, justify="right")
    for name, dataset in zip(names, datasets, strict=True):
        totals = dataset.totals
        numbers = (totals.examples, totals.tokens, totals.longest, totals.full)
        table.add_row(escape(name), dataset.task, *(f"{number:,}" for number in numbers))
    console = Console()
    console.print(table)
    console.print("texts at the limit have as many tokens as allowed: nearly all of them have been truncated")


if __name__ == "__main__":
    run_program(main)
