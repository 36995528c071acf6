"""Encodes the texts of a file: a .txt file with one text per line, or a .jsonl file with `text` in each line.

Writes a .npy file [texts, dimensions], or a .parquet file with the column `embedding`. Run the same command again to
continue after an interruption.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from codiemb_jax.errors import UserError
from codiemb_jax.files import check_new_file
from codiemb_jax.program import Parser, loading_modules, path_argument, positive_argument, run_program, text_argument

ENDINGS = (".npy", ".parquet")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m codiemb_jax.encode") -> None:
    """Runs the program.

    Raises:
      UserError: If the arguments, the model or the texts are invalid.
    """
    parser = Parser(prog, __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder, hub id, checkpoint, or folder of a run")
    add("--input", required=True, type=path_argument, metavar="FILE", help="the .txt or .jsonl file with the texts")
    add("--output", required=True, type=path_argument, metavar="FILE", help="the .npy or .parquet file to write")
    add(
        "--kind",
        choices=["query", "document"],
        default="document",
        help="which prompt of the model to use (default: document)",
    )
    add(
        "--instruction",
        type=text_argument,
        metavar="TEXT",
        help="task instruction of the queries, for checkpoints and exports",
    )
    add("--dim", type=positive_argument, metavar="N", help="keep the first N dimensions, normalized again")
    add(
        "--precision",
        choices=["float32", "int8", "binary"],
        default="float32",
        help="float32, int8 (normalized, times 127), or binary (8 dimensions per byte)",
    )
    add("--batch_size", type=positive_argument, default=32, metavar="N", help="rows per batch (default: 32)")
    with loading_modules():
        from codiemb_jax.options import add_distributed_flags, distributed_settings

    add_distributed_flags(parser)
    options = parser.parse_args(arguments)
    distributed = distributed_settings(options)
    if options.input.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--input {options.input}: expected a name that ends in .txt or .jsonl")
    check_new_file(options.output, *ENDINGS)
    if options.output.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UserError("--output: Parquet files need pyarrow; run pip install pyarrow, or give a .npy file")
    if options.instruction is not None and options.kind != "query":
        raise UserError("--instruction is for queries; add --kind query")

    with loading_modules():
        from codiemb_jax.checkpoints.model import resolve_model_path
        from codiemb_jax.compilation import use_compilation_cache
        from codiemb_jax.distributed import connected, is_first_process, log_console
        from codiemb_jax.embedder import Embedder
        from codiemb_jax.encoding import EncodeSettings, encode_file

    with connected(distributed):
        use_compilation_cache()
        embedder = Embedder.from_pretrained(options.model)
        prompt = embedder.prompt(options.kind, options.instruction)
        settings = EncodeSettings(prompt, options.dim, options.precision, options.batch_size)
        model = model_files(resolve_model_path(options.model))
        count, truncated = encode_file(embedder, options.input, options.output, settings, model)
        if truncated:
            log_console().print(
                f"warning: {truncated:,} texts have more than {embedder.max_seq_length} tokens and were truncated"
            )
        if is_first_process():
            print(f"encoded {count:,} texts to {options.output}")


def model_files(folder: Path) -> dict[str, list[int]]:
    """Returns the size and the time of change of each file of a model, by which a changed model is noticed."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        # Not hidden ones: unfinished output may be among them.
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            status = file.stat()
            text = str(name).encode(errors="backslashreplace").decode()  # names need not be UTF-8
            found[text] = [status.st_size, status.st_mtime_ns]
    return found


if __name__ == "__main__":
    run_program(main)
