"""Evaluates a model on held-out data: IR and STS files of this project, data in the format of BEIR, and tasks of MTEB.

Prints a table with nDCG@10, MRR@10, Recall@10, Recall@100 and MAP of retrieval, and Spearman and Pearson correlation of
similarity; and one with the means of the main scores of MTEB's tasks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from codiemb_jax.errors import UserError
from codiemb_jax.files import check_new_file
from codiemb_jax.program import (
    Parser,
    loading_modules,
    path_argument,
    positive_argument,
    run_program,
    text_argument,
)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m codiemb_jax.evaluate") -> None:
    """Runs the program.

    Raises:
      UserError: If the arguments, the model or the data are invalid.
    """
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, hub id, checkpoint, or folder of a run")
    for flag, metavar, help_text in (
        ("--ir", "PATH", "IR files, or folders of them"),
        ("--sts", "PATH", "STS files, or folders of them"),
        ("--beir", "DIR", "folders with corpus.jsonl, queries.jsonl and qrels"),
    ):
        add(flag, nargs="+", action="extend", default=[], type=path_argument, metavar=metavar, help=help_text)
    add(
        "--mteb",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="tasks of MTEB, whose data sets are downloaded; cmteb means the 31 tasks of MTEB(cmn, v1)",
    )
    add("--mteb_results", type=path_argument, metavar="DIR", help="keep MTEB's results here, and continue from them")
    add("--output", type=path_argument, metavar="FILE", help="the .json file to write")
    add(
        "--instruction",
        type=text_argument,
        metavar="TEXT",
        help="task instruction of all queries, instead of those in the data",
    )
    add(
        "--query_prompt",
        type=text_argument,
        metavar="TEXT",
        help="whole prompt of queries, instead of the model's; {instruction} is replaced by the task instruction",
    )
    add(
        "--max_tokens",
        type=positive_argument,
        metavar="N",
        help="maximum tokens per text (default: the model's maximum)",
    )
    add("--batch_size", type=positive_argument, default=32, metavar="N", help="rows per batch (default: 32)")
    options = parser.parse_args(arguments)
    if not (options.ir or options.sts or options.beir or options.mteb):
        raise UserError("no data; give --ir, --sts, --beir or --mteb")
    if options.mteb_results and not options.mteb:
        raise UserError("--mteb_results has no effect without --mteb")
    if options.mteb and options.max_tokens:
        raise UserError("--max_tokens does not apply to --mteb, which uses the model's maximum; leave it out")
    if options.output:
        check_new_file(options.output, ".json")

    with loading_modules():
        from codiemb_jax.compilation import use_compilation_cache
        from codiemb_jax.distributed import log_console
        from codiemb_jax.embedder import Embedder
        from codiemb_jax.evaluation.held_out import HeldOutTexts, read_files
        from codiemb_jax.evaluation.mteb_tasks import MtebEncoder, find_tasks, mteb_table, run_mteb
        from codiemb_jax.files import write_json

    use_compilation_cache()
    instructions = {}
    if options.mteb:
        names = [task.metadata.name for task in find_tasks(options.mteb)]
        if options.instruction is not None:
            instructions = dict.fromkeys(names, options.instruction)
    embedder = Embedder.from_pretrained(options.model)
    if options.mteb:
        MtebEncoder(embedder, query_prompt=options.query_prompt, instructions=instructions)  # checks the prompt
    max_tokens = options.max_tokens or embedder.max_seq_length
    if max_tokens > embedder.max_seq_length:
        raise UserError(f"--max_tokens {max_tokens}: the model's maximum is {embedder.max_seq_length}")
    texts = HeldOutTexts(
        embedder.tokenizer,
        max_tokens,
        instruction=options.instruction,
        query_prompt=options.query_prompt,
        limit_setting="--max_tokens",
        count_truncated=True,
    )
    held_out = read_files(options.ir, options.sts, options.beir, texts, "--")
    console = log_console()
    if texts.unused_instructions:
        console.print(
            "note: the instructions in the data are not used, because this model's prompts have no placeholder for "
            "them; --query_prompt sets a prompt with {instruction}",
            soft_wrap=True,
            markup=False,
        )
    content: dict[str, Any] = {"model": options.model, "results": {}}
    if options.mteb:  # first, because its data sets may turn out to be unavailable
        mteb_results = run_mteb(
            embedder,
            names,
            query_prompt=options.query_prompt,
            instructions=instructions,
            model_name=options.model,
            results_folder=options.mteb_results,
            batch_size=options.batch_size,
        )
        table, means = mteb_table(mteb_results)
        Console().print(table)
        content["mteb"] = {"tasks": {score.task: score.value for score in mteb_results.scores}, "means": means}
    results: dict[str, dict[str, float]] = content["results"]
    for data in held_out:
        results.setdefault(data.name, {}).update(data.score(embedder, options.batch_size))
    if texts.truncated:
        console.print(
            f"warning: {texts.truncated:,} texts have more than {max_tokens} tokens and were truncated", soft_wrap=True
        )
    if results:
        print_table(results)
    if options.output:
        check_new_file(options.output, ".json")
        try:
            write_json(options.output, content)
        except OSError as error:
            raise UserError(f"--output {options.output}: cannot be written: {error.strerror}") from error


def print_table(results: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the metrics, with a row for each name of data."""
    metrics = list(dict.fromkeys(metric for values in results.values() for metric in values))
    table = Table("data", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)  # 80 characters are enough for all metrics
    for metric in metrics:
        table.add_column(metric, justify="right", overflow="fold")
    for name, values in results.items():
        table.add_row(escape(name), *(f"{values[metric]:.4f}" if metric in values else "" for metric in metrics))
    Console().print(table)


if __name__ == "__main__":
    run_program(main)
