"""A file of vectors that is written block by block, and continued where it was interrupted.

Unfinished output is in a folder `.NAME.partial` beside the output: the vectors so far, and how many are complete.
"""

import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Literal

import numpy as np
from filelock import FileLock, Timeout

from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import check_new_file, read_json, write_json

ROWS_PER_GROUP = 4096
"""Vectors per row group of a Parquet file."""

NAMES = ("vectors.npy", "vectors.parquet", "state.json", "lock")
"""Names of the files in the folder of unfinished output."""
TEMPORARY_STATE = re.compile(r"\.state\.json\.[0-9a-f]{8}\.tmp")
"""Name of state.json while it is being written, see `write_atomically`."""

Precision = Literal["float32", "int8", "binary"]


class VectorFile:
    """A .npy file [vectors, width] that is being written. Use `open_vectors` to open one."""

    def __init__(self, folder: Path, inputs: Mapping[str, object], shape: tuple[int, int], precision: Precision):
        """Opens new or unfinished output.

        Args:
          folder: The folder of unfinished output.
          inputs: What the vectors depend on. Only output with the same inputs is continued.
          shape: Numbers of vectors, and of numbers in each.
          precision: The precision of the vectors.

        Raises:
          UserError: If the output is from other inputs, or damaged.
        """
        self.path, self._state, self._inputs = folder / "vectors.npy", folder / "state.json", dict(inputs)
        dtype = np.dtype(np.float32 if precision == "float32" else np.int8)
        self.done, self._checksum = self._completed(shape[0])
        header = _header(shape, dtype)
        if not self.done:
            self._file: IO[bytes] = self.path.open("wb")
            self._write(header)
            return
        complete = len(header) + self.done * shape[1] * dtype.itemsize
        found = _checksum(self.path, complete) if self.path.is_file() else None
        if found is None or found != self._checksum:
            raise UserError(f"{self.path}: is damaged; remove the folder {folder} to start over")
        self._file = self.path.open("r+b")
        self._file.truncate(complete)  # removes what was written after the last record of progress
        self._file.seek(complete)

    def _completed(self, count: int) -> tuple[int, int]:
        """Returns the number of complete vectors, and the checksum of the file up to there."""
        if not self._state.exists():
            return 0, 0
        try:
            found = read_json(self._state, dict)
        except UserError as error:
            raise UserError(f"{error}; remove the folder {self._state.parent} to start over") from error
        done, checksum = found.get("done"), found.get("checksum")
        if found.get("inputs") != self._inputs or type(done) is not int or not 0 < done <= count:
            raise UserError(
                f"{self._state.parent} is left from an interrupted run with other texts or settings, or with a model "
                "whose files have changed since; finish that one with its own command, or remove the folder"
            )
        return done, checksum

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._checksum = zlib.crc32(content, self._checksum)

    def append(self, vectors: np.ndarray) -> None:
        """Writes the next vectors, and waits until they are on disk."""
        self._write(vectors.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += len(vectors)
        write_json(self._state, {"inputs": self._inputs, "done": self.done, "checksum": self._checksum})

    def close(self) -> None:
        self._file.close()

    def move_to(self, output: Path) -> None:
        """Moves the complete file to its place, as a Parquet file if the name says so.

        Raises:
          UserError: If something is there.
        """
        self.close()
        complete = self.path
        if output.suffix == ".parquet":
            complete = self.path.with_suffix(".parquet")
            _write_parquet(self.path, complete)
        check_new_file(output, output.suffix)
        complete.rename(output)
        shutil.rmtree(self.path.parent, ignore_errors=True)


@contextmanager
def open_vectors(
    output: Path, inputs: Mapping[str, object], shape: tuple[int, int], precision: Precision
) -> Iterator[VectorFile]:
    """Opens output that is not finished when the block ends without `move_to`. See `VectorFile`.

    Raises:
      UserError: If the output exists or cannot be written, or another process writes it.
    """
    folder = output.parent.resolve() / f".{output.name}.partial"
    try:
        check_new_file(output, output.suffix)
        if folder.is_symlink():
            raise UserError(f"{folder}: is a link; remove it")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is not a folder; move it away, unfinished output belongs there")
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.is_symlink():
                raise UserError(f"{path}: is a link; remove it")
            if path.name not in NAMES and not TEMPORARY_STATE.fullmatch(path.name):
                raise UserError(f"{folder}: contains other files ({path.name}); move it away")
            if path.exists() and not path.is_file():  # another process may have removed it by now
                raise UserError(f"{path}: is not a file; move it away")
        with FileLock(folder / "lock").acquire(blocking=False):
            vectors = VectorFile(folder, inputs, shape, precision)
            try:
                yield vectors
            finally:
                vectors.close()
    except Timeout as error:
        raise UserError(f"--output {output}: is being written by another process; wait until it ends") from error
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder.parent):
            raise  # an error of reading, not of writing
        raise UserError(f"--output {shorten(str(output))}: cannot be written: {error.strerror or error}") from error


def _checksum(path: Path, size: int) -> int | None:
    """Returns the CRC-32 of the first `size` bytes of a file; None if it has fewer."""
    checksum = 0
    with path.open("rb") as file:
        while size and (content := file.read(min(size, 2**24))):
            checksum = zlib.crc32(content, checksum)
            size -= len(content)
    return None if size else checksum


def _header(shape: tuple[int, int], dtype: np.dtype) -> bytes:
    """Returns the header of a .npy file."""
    content = BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(content, description)
    return content.getvalue()


def _write_parquet(source: Path, target: Path) -> None:
    """Writes vectors as the column `embedding`, a list of fixed size per row."""
    import pyarrow
    from pyarrow import parquet

    vectors = np.load(source, mmap_mode="r", allow_pickle=False)
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(vectors.dtype), vectors.shape[1])
    with parquet.ParquetWriter(target, pyarrow.schema([("embedding", kind)])) as writer:
        for start in range(0, len(vectors), ROWS_PER_GROUP):
            values = pyarrow.array(np.array(vectors[start : start + ROWS_PER_GROUP]).ravel())
            column = pyarrow.FixedSizeListArray.from_arrays(values, type=kind)
            writer.write_table(pyarrow.table({"embedding": column}))
