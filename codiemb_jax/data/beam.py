"""Tokenizes a data file with Apache Beam, through the Beam support of TensorFlow Datasets.

Beam's workers must see the data file and the cache. No machine holds all tokens: Beam groups examples by shard, and the
index of each part is a small file that is appended to the whole index at the end.
"""

import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from codiemb_jax.data.tokenize import DataFile, Example, LineTokenizer, Outcome, write_part
from codiemb_jax.errors import UserError
from codiemb_jax.text.records import Lines

SHARD_BYTES = 2**26
"""There is one ArrayRecord file, which a worker holds in memory to sort it, per this many bytes of the data file."""


def check_runner(name: str) -> None:
    """Checks that Beam is installed and has a runner.

    Raises:
      UserError: If not.
    """
    try:
        from apache_beam.runners import create_runner
    except ImportError as error:
        raise UserError('--beam needs Apache Beam, which is not installed; pip install "codiemb-jax[beam]"') from error
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"--beam {name}: no such runner; for example, use DirectRunner") from error


def write_with_beam(file: DataFile, parts: Sequence[Lines], folder: Path, runner: str) -> Generator[Outcome]:
    """Tokenizes parts of a data file and writes their examples as one dataset, in file order.

    Args:
      file: The data file.
      parts: The parts.
      folder: The folder of the dataset.
      runner: Name of Beam's runner.

    Yields:
      The outcome of each part, in order.
    """
    import apache_beam as beam

    outcomes = folder / "outcomes"
    outcomes.mkdir(parents=True)
    examples = (
        beam.Create(list(parts))
        | beam.Reshuffle()  # otherwise, one worker gets all parts
        | beam.FlatMap(_tokenize, file=file, outcomes=outcomes)
    )
    paths = [_outcome_path(outcomes, lines) for lines in parts]
    try:
        shards = -(-file.path.stat().st_size // SHARD_BYTES) or 1
        write_part(examples, folder / "00000", beam_runner=runner, num_shards=shards)
    except Exception:
        # TensorFlow Datasets fails without examples. The reason is in the outcomes, if all parts have been tokenized.
        if not all(path.exists() for path in paths) or any(Outcome.load(path).index is not None for path in paths):
            raise
    for path in paths:
        yield Outcome.load(path)
    shutil.rmtree(outcomes)  # including leftovers of restarted workers


def _outcome_path(folder: Path, lines: Lines) -> Path:
    return folder / f"{lines.start}.npz"


def _tokenize(lines: Any, file: DataFile, outcomes: Path) -> Iterator[tuple[int, Example]]:
    lines = Lines(*lines)
    tokenizer = LineTokenizer(file)
    yield from tokenizer.examples(lines)
    tokenizer.outcome().save(_outcome_path(outcomes, lines))
