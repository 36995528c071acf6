"""Encodes the texts of a file into a file of vectors, in bounded memory, and continues where it was interrupted.

Unfinished output is in a folder `.NAME.partial` beside the output: the vectors so far, and how many are complete.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Literal

import numpy as np
from filelock import FileLock, Timeout
from rich.progress import Progress

from codiemb_jax.distributed import log_console
from codiemb_jax.embedder import Embedder, count_truncated, unit_vectors
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import check_new_file, read_json, write_json
from codiemb_jax.text.plain import parse_text

TEXTS_PER_BLOCK = 4096
"""Texts that are encoded between two records of progress."""

Precision = Literal["float32", "int8", "binary"]


@dataclass(frozen=True)
class EncodeSettings:
    """How to encode texts."""

    prompt: str
    """Put before each text."""
    dim: int | None = None
    """Number of dimensions to keep; the shorter vectors are normalized. None keeps all."""
    precision: Precision = "float32"
    batch_size: int = 32
    """Rows per batch."""


def read_texts(path: Path, problems: list[str]) -> Iterator[str]:
    """Yields the texts of a .txt file, one per line, or of a .jsonl file, one object with `text` per line.

    Args:
      path: The file.
      problems: Problems of lines are added to this list; such lines yield nothing.

    Raises:
      UserError: If the file cannot be read.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise UserError(f"--input {path}: is not a file")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode().rstrip("\r\n")
                    if path.suffix == ".jsonl":
                        text = parse_text(text).text
                    if not text.strip():
                        raise ValueError("empty text; every line needs a text, because vectors have no line numbers")
                    yield text
                except (ValueError, RecursionError) as error:
                    reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else shorten(str(error), 200)
                    problems.append(f"{path}:{number}: {reason}")
    except OSError as error:
        raise UserError(f"--input {shorten(str(path))}: cannot be read: {error.strerror}") from error


def check_texts(path: Path) -> tuple[int, str]:
    """Checks all texts of a file. Returns their number and a hash of them.

    Raises:
      UserError: If a text is invalid, or there is none.
    """
    problems: list[str] = []
    count, digest = 0, hashlib.blake2b(digest_size=16)
    for text in read_texts(path, problems):
        count += 1
        digest.update(f"{len(text)} {text}".encode())
    if problems:
        raise UserError(f"invalid texts:\n{format_problems(problems)}")
    if not count:
        raise UserError(f"--input {path}: contains no texts")
    return count, digest.hexdigest()


def encode_file(
    embedder: Embedder, source: Path, output: Path, settings: EncodeSettings, model: dict[str, list[int]]
) -> tuple[int, int]:
    """Encodes the texts of a file, or continues to do so.

    Args:
      embedder: The model.
      source: A .txt or .jsonl file, see `read_texts`.
      output: The .npy or .parquet file to write.
      settings: How to encode.
      model: What identifies the model: only a run with the same model is continued.

    Returns:
      The number of texts, and how many of those encoded now were longer than the model's maximum, and truncated.

    Raises:
      UserError: If a text or a setting is invalid, or a file cannot be read or written.
    """
    full = embedder.get_embedding_dimension()
    dim = full if settings.dim is None else settings.dim
    if not 1 <= dim <= full:
        raise UserError(f"--dim {dim}: the model's vectors have {full} dimensions; give at most {full}")
    if settings.precision == "binary" and dim % 8:
        raise UserError(f"--dim {dim}: binary vectors have 8 dimensions per byte; give a multiple of 8")
    count, digest = check_texts(source)
    inputs = {"texts": digest, "model": model, **asdict(settings), "dim": dim}
    del inputs["batch_size"]
    truncated = 0
    with _unfinished(output) as folder, Progress(console=log_console(), transient=True) as progress:
        vectors, state = folder / "vectors.npy", folder / "state.json"
        done = _completed(state, inputs, count)
        header = _header(count, dim, settings.precision)
        width = dim // 8 if settings.precision == "binary" else dim
        row_bytes = width * _dtype(settings.precision).itemsize
        with vectors.open("r+b" if done else "wb") as file:
            if not done:
                file.write(header)
            complete = len(header) + done * row_bytes
            if file.seek(0, os.SEEK_END) < complete:
                raise UserError(f"{vectors}: is damaged; remove the folder {folder} to start over")
            file.truncate(complete)  # removes what was written after the last record of progress
            file.seek(complete)
            task = progress.add_task("encoding", total=count, completed=done)
            texts = islice(read_texts(source, []), done, None)
            while block := list(islice(texts, TEXTS_PER_BLOCK)):
                found, over = _embed(embedder, block, settings)
                truncated += over
                file.write(_convert(found, dim, settings.precision).tobytes())
                _sync(file)
                done += len(block)
                write_json(state, {"inputs": inputs, "done": done})
                progress.update(task, completed=done)
        if done != count:
            raise UserError(f"--input {source}: has changed while it was read; start again")
        if output.suffix == ".parquet":
            _write_parquet(vectors, folder / "vectors.parquet")
            vectors = folder / "vectors.parquet"
        check_new_file(output, output.suffix)
        vectors.rename(output)
    shutil.rmtree(folder, ignore_errors=True)
    return count, truncated


def _embed(embedder: Embedder, texts: list[str], settings: EncodeSettings) -> tuple[np.ndarray, int]:
    """Returns the vectors of texts, and how many texts were truncated."""
    tokenizer, limit = embedder.tokenizer, embedder.max_seq_length
    tokens = tokenizer.tokenize(texts, settings.prompt, limit)
    over = count_truncated(tokenizer, texts, tokens, settings.prompt, limit)
    vectors = embedder.embed_tokens(tokens, settings.batch_size, show_progress_bar=False)
    if not np.isfinite(vectors).all():
        raise UserError("the model's vectors are NaN or infinite")
    return vectors, over


def _convert(vectors: np.ndarray, dim: int, precision: Precision) -> np.ndarray:
    """Cuts vectors to `dim` dimensions and converts them to a precision.

    int8: the vector is normalized and multiplied by 127. binary: one bit per dimension, set where it is positive, as in
    sentence-transformers (bytes minus 128).
    """
    if dim < vectors.shape[1] or precision == "int8":
        vectors = unit_vectors(vectors[:, :dim])
    if precision == "int8":
        return np.rint(vectors * 127).astype(np.int8)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=1).astype(np.int16) - 128).astype(np.int8)
    return vectors.astype(np.float32)


def _dtype(precision: Precision) -> np.dtype:
    return np.dtype(np.float32 if precision == "float32" else np.int8)


def _header(count: int, dim: int, precision: Precision) -> bytes:
    """Returns the header of a .npy file."""
    shape = (count, dim // 8 if precision == "binary" else dim)
    content = BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(_dtype(precision)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, description)
    return content.getvalue()


def _completed(state: Path, inputs: dict[str, object], count: int) -> int:
    """Returns how many texts an interrupted run has encoded."""
    if not state.exists():
        return 0
    found = read_json(state, dict)
    done = found.get("done")
    if found.get("inputs") != inputs or type(done) is not int or not 0 <= done <= count:
        raise UserError(
            f"{state.parent} is left from an interrupted run with other texts, settings or another model; run the same "
            "command to finish it, or remove the folder"
        )
    return done


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _write_parquet(source: Path, target: Path) -> None:
    """Writes vectors as the column `embedding`, a list of fixed size per row."""
    import pyarrow
    from pyarrow import parquet

    vectors = np.load(source, mmap_mode="r", allow_pickle=False)
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    with parquet.ParquetWriter(target, pyarrow.schema([("embedding", kind)])) as writer:
        for start in range(0, len(vectors), TEXTS_PER_BLOCK):
            values = pyarrow.array(np.array(vectors[start : start + TEXTS_PER_BLOCK]).ravel())
            column = pyarrow.FixedSizeListArray.from_arrays(values, type=kind)
            writer.write_table(pyarrow.table({"embedding": column}))


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """Yields the folder of the unfinished output, which no other process uses meanwhile.

    Raises:
      UserError: If the output exists or cannot be written, or another process writes it.
    """
    folder = output.parent.resolve() / f".{output.name}.partial"
    try:
        check_new_file(output, output.suffix)
        if folder.is_symlink():
            raise UserError(f"{folder}: is a link; remove it")
        folder.mkdir(exist_ok=True)
        for name in ("vectors.npy", "vectors.parquet", "state.json", "lock"):
            if (folder / name).is_symlink():
                raise UserError(f"{folder / name}: is a link; remove it")
        with FileLock(folder / "lock").acquire(blocking=False):
            yield folder
    except Timeout as error:
        raise UserError(f"--output {output}: is being written by another process; wait until it ends") from error
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder.parent):
            raise  # an error of reading, not of writing
        raise UserError(f"--output {shorten(str(output))}: cannot be written: {error.strerror or error}") from error
