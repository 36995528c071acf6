"""One-dimensional .npy files that are written in pieces, mapped into memory, and checked block by block when read."""

import zlib
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK_BYTES = 4096
"""Number of bytes that a checksum covers. With larger blocks, reading at random would take longer."""


def checksums_path(path: Path) -> Path:
    """Returns the file with the checksums of a column."""
    return path.with_suffix(".crc32.npy")


class Column:
    """A column of the index. Values are read by an array of indices."""

    def __init__(self, path: Path, dtype: np.dtype, size: int):
        """Maps a column into memory.

        Args:
          path: The .npy file.
          dtype: Its dtype.
          size: Its number of elements.

        Raises:
          ValueError, OSError: If there is no such column.
        """
        self._name = path.name
        self._values = _map(path, dtype, size)
        self._checksums = _map(checksums_path(path), np.dtype("<u4"), -(-self._values.nbytes // BLOCK_BYTES))
        self._unread = np.ones(self._checksums.size, bool)
        self._block = BLOCK_BYTES // dtype.itemsize

    @property
    def size(self) -> int:
        return self._values.size

    @property
    def dtype(self) -> np.dtype:
        return self._values.dtype

    def __getitem__(self, indices: Any) -> np.ndarray:
        """Returns the values at some indices, an array of any shape.

        Raises:
          ValueError: If a block of the file has changed since it was written.
        """
        indices = np.asarray(indices)
        unread = self._unread[indices // self._block]
        if unread.any():
            for block in np.unique(indices[unread] // self._block).tolist():
                content = self._values[block * self._block : (block + 1) * self._block]
                if zlib.crc32(content.data) != self._checksums[block]:
                    raise ValueError(f"{self._name}: block {block} does not match its checksum")
                self._unread[block] = False
        return self._values[indices]


def _map(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path.name}: not a file")
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if values.dtype != dtype or values.shape != (size,):
        raise ValueError(f"{path.name}: expected {dtype} {(size,)}, found {values.dtype} {values.shape}")
    if path.stat().st_size != values.offset + values.nbytes:
        raise ValueError(f"{path.name}: wrong size")
    return np.asarray(values)  # without the slower subclass


class ColumnWriter:
    """Writes a column in pieces. A context manager; the checksums are written at its end."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._dtype, self._size = path, dtype, 0
        self._checksums = array("I")
        self._rest = b""
        """The bytes of the last block, which is not full yet."""

    def __enter__(self) -> "ColumnWriter":
        self._file: BinaryIO = self._path.open("xb")
        self._write_header()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()  # has the same length for any size
        self._file.close()
        if self._rest:
            self._checksums.append(zlib.crc32(self._rest))
        np.save(checksums_path(self._path), np.array(self._checksums, "<u4"))

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._size,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, values: np.ndarray) -> None:
        """Appends values."""
        content = np.ascontiguousarray(values, self._dtype).tobytes()
        self._file.write(content)
        self._size += values.size
        content = self._rest + content
        whole = len(content) // BLOCK_BYTES * BLOCK_BYTES
        self._checksums.extend(
            zlib.crc32(content[start : start + BLOCK_BYTES]) for start in range(0, whole, BLOCK_BYTES)
        )
        self._rest = content[whole:]
