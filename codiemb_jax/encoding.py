"""Encodes the texts of a file into a file of vectors, in bounded memory, and continues where it was interrupted.

All processes encode together. Only the first one writes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import Progress

from codiemb_jax.distributed import check_same, exchange, first_value, is_first_process, log_console
from codiemb_jax.embedder import Embedder, check_room, count_truncated, unit_vectors
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.text.plain import decode_line, parse_text
from codiemb_jax.text.prompts import EmptyContentError
from codiemb_jax.vector_file import Precision, VectorFile, open_vectors

TEXTS_PER_BLOCK = 4096
"""Texts that are encoded between two records of progress."""


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
                    text = decode_line(line, number).rstrip("\r\n")
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
    digest = hashlib.blake2b(digest_size=16)
    count = sum(1 for _ in _hashed(read_texts(path, problems), digest))
    if problems:
        raise UserError(f"invalid texts:\n{format_problems(problems)}")
    if not count:
        raise UserError(f"--input {path}: contains no texts")
    return count, digest.hexdigest()


def _hashed(texts: Iterable[str], digest: hashlib.blake2b) -> Iterator[str]:
    """Yields texts and adds them to a hash."""
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
        yield text


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
    # Not the model, whose files may have been copied to each machine at another time.
    shared = {name: json.dumps(value) for name, value in (inputs | asdict(settings)).items() if name != "model"}
    check_same(shared, "give all of them the same texts and flags")
    width = dim // 8 if settings.precision == "binary" else dim
    truncated = 0
    with ExitStack() as stack:
        vectors: VectorFile | None = None
        if is_first_process():
            vectors = stack.enter_context(open_vectors(output, inputs, (count, width), settings.precision))
        done = first_value(vectors.done if vectors else 0)
        progress = stack.enter_context(Progress(console=log_console(), transient=True))
        task = progress.add_task("encoding", total=count, completed=done)
        encoded = hashlib.blake2b(digest_size=16)
        texts = islice(_hashed(read_texts(source, []), encoded), done, None)
        while block := list(islice(texts, TEXTS_PER_BLOCK)):
            try:
                found, over = _embed(embedder, block, settings)
            except EmptyContentError as error:
                places = [f"{source}:{done + i + 1}" for i in range(len(block))]
                problems = error.problems_at(places, "a longer limit")
                raise UserError(f"texts without a token:\n{format_problems(problems)}") from error
            truncated += over
            done += len(block)
            if vectors:
                vectors.append(_convert(found, dim, settings.precision))
            progress.update(task, completed=done)
        if done != count or encoded.hexdigest() != digest:
            raise UserError(f"--input {source}: has changed while it was read; start again")
        if vectors:
            vectors.move_to(output)
    exchange(None)  # the others wait for the first process
    return count, truncated


def _embed(embedder: Embedder, texts: list[str], settings: EncodeSettings) -> tuple[np.ndarray, int]:
    """Returns the vectors of texts, and how many texts were truncated."""
    tokenizer, limit = embedder.tokenizer, embedder.max_seq_length
    tokens = tokenizer.tokenize(texts, settings.prompt, limit)
    check_room(tokenizer, tokens, settings.prompt, limit)
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
