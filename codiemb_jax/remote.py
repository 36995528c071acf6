"""Remote files and folders (gs://bucket/folder): their addresses, copies in the cache, and uploads."""

import hashlib
import logging
import re
import shutil
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from etils import epath
from filelock import FileLock
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import is_bare_name

SCHEME = "gs://"
Location: TypeAlias = Path | epath.Path
"""A local path or a remote one."""

BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
BUFFER_BYTES = 2**24


class RemoteFile(NamedTuple):
    """A file in a remote folder."""

    size: int
    version: str
    """Changes whenever the file is written."""
    checksum: str
    """MD5 or CRC32C of the content, base64."""


def is_remote(text: str) -> bool:
    """Whether a text starts like a remote address."""
    return text.startswith(SCHEME)


def remote_path(address: str) -> epath.Path:
    """Returns the path at a valid address.

    Raises:
      ValueError: If it is not valid.
    """
    bucket, *names = address.removeprefix(SCHEME).rstrip("/").split("/")
    if not BUCKET.fullmatch(bucket):
        raise ValueError(f"{shorten(address)} is not a valid address; expected gs://bucket/folder")
    # Some characters have a meaning in patterns of names.
    if not all(is_bare_name(name) and not set(name) & set("*?[]#") for name in names):
        raise ValueError(f"{shorten(address)}: folders must have names, without any of * ? [ ] #")
    return epath.Path(f"{SCHEME}{'/'.join([bucket, *names])}")


@contextmanager
def remote_errors(path: Location) -> Iterator[None]:
    """Raises `UserError` if something remote cannot be read or written in this block."""
    for name in ("gcsfs", "google.auth"):  # they log errors that they also raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    except (MemoryError, UserError):
        raise
    except ImportError as error:
        raise UserError(f'{path}: remote files need another package: pip install "codiemb-jax[gcs]"') from error
    except Exception as error:  # the libraries for storage, authentication and HTTP have errors of many types
        reason = shorten(" ".join(str(error).split()), 300) or type(error).__name__
        raise UserError(f"{path}: cannot be read or written: {reason}") from error


def _storage() -> Any:
    import fsspec  # only for remote files

    return fsspec.filesystem("gs", use_listings_cache=False)


def list_files(folder: epath.Path) -> dict[str, RemoteFile]:
    """Returns all files in a remote folder, by their path relative to it, sorted; none if it does not exist.

    Raises:
      UserError: If the folder cannot be read, or a name would lead out of it.
    """
    prefix = f"{str(folder).removeprefix(SCHEME)}/"
    with remote_errors(folder):
        found = _storage().find(prefix.rstrip("/"), detail=True)
    files = {}
    for path, info in sorted(found.items()):
        name = path.removeprefix(prefix)
        if name == path or not name or name.endswith("/"):
            continue  # the address of a file, or an empty object that stands for a folder
        if "\\" in name or not all(map(is_bare_name, name.split("/"))):
            raise UserError(f"{folder}: contains a file with an invalid name, {ascii(shorten(name))}; remove it")
        files[name] = _describe(info)
    return files


def _describe(info: Mapping[str, Any]) -> RemoteFile:
    version = str(info.get("generation") or info.get("etag"))
    return RemoteFile(int(info["size"]), version, str(info.get("md5Hash") or info["crc32c"]))


def list_names(folder: epath.Path) -> list[str]:
    """Returns the names of everything in a remote folder, sorted; none if it does not exist.

    Raises:
      UserError: If the folder cannot be read.
    """
    path = str(folder).removeprefix(SCHEME)
    with remote_errors(folder):
        try:
            found = _storage().ls(path, detail=False)
        except FileNotFoundError:
            return []
    return sorted(name for child in found if (name := child.rstrip("/").removeprefix(path).strip("/")))


def exists(path: epath.Path) -> bool:
    """Whether there is a file or folder.

    Raises:
      UserError: If that cannot be found out.
    """
    with remote_errors(path):
        return _storage().exists(str(path))


def fetch_file(path: epath.Path, cache: Path) -> Path:
    """Copies a remote file into the cache, unless the copy there is up to date.

    Args:
      path: The remote file.
      cache: The local cache folder.

    Returns:
      The path of the copy, which is read-only.

    Raises:
      UserError: If there is no such file, or it cannot be copied.
    """
    return fetch(path.parent, {path.name: find_file(path)}, cache) / path.name


def find_file(path: epath.Path) -> RemoteFile:
    """Returns the description of a remote file.

    Raises:
      UserError: If there is no such file.
    """
    with remote_errors(path):
        try:
            return _describe(_storage().info(str(path)))
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such file or folder") from error


def fetch(folder: epath.Path, files: Mapping[str, RemoteFile], cache: Path) -> Path:
    """Copies some files of a remote folder into the cache, unless they are there.

    Each version of the files has a folder of its own, which never changes: other processes may be reading it.

    Args:
      folder: The remote folder.
      files: The files, from `list_files`.
      cache: The local cache folder.

    Returns:
      The local folder.

    Raises:
      UserError: If a file cannot be copied, or has changed since it was listed.
    """
    copies = cache / "remote"
    digest = sha256(repr((str(folder), sorted(files.items()))).encode()).hexdigest()[:16]
    local = copies / digest / str(folder).removeprefix(SCHEME)
    try:
        copies.mkdir(parents=True, exist_ok=True)
        with FileLock(copies / f"{digest}.lock"):
            if not _is_whole(local, files):
                if (copies / digest).exists():
                    shutil.rmtree(copies / digest)  # somebody has deleted a file, or cut it short
                unfinished = copies / f".{digest}.unfinished"
                if unfinished.exists():  # left by a program that was killed
                    shutil.rmtree(unfinished)
                copy = unfinished / local.relative_to(copies / digest)
                try:
                    download(folder, files, copy)
                    for name in files:  # read-only, as changes would not reach the original
                        (copy / name).chmod(0o444)
                    unfinished.rename(copies / digest)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(f"the cache {cache} cannot be written ({error}); set CODIEMB_JAX_CACHE") from error
    return local


def _is_whole(copy: Path, files: Mapping[str, RemoteFile]) -> bool:
    """Whether a copy has all its files. That their content has not changed either is the task of the disk."""
    return all((copy / name).is_file() and (copy / name).stat().st_size == file.size for name, file in files.items())


def original(path: Path, cache: Path) -> Location:
    """Returns the remote path of a copy in the cache, and any other path as it is."""
    copies = cache / "remote"
    if not path.is_relative_to(copies):
        return path
    return epath.Path(f"{SCHEME}{'/'.join(path.relative_to(copies).parts[1:])}")


def download(folder: epath.Path, files: Mapping[str, RemoteFile], local: Path) -> None:
    """Copies files of a remote folder to a local one, and shows a progress bar on stderr if it is a terminal.

    Raises:
      UserError: If a file cannot be copied, or has changed since it was listed.
      OSError: If a local file cannot be written.
    """
    local.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("downloading", total=sum(file.size for file in files.values()))
        for name, file in files.items():
            (local / name).parent.mkdir(parents=True, exist_ok=True)
            checksum = _new_checksum(file)
            with (local / name).open("xb") as target:
                for block in _read_blocks(folder / name):
                    target.write(block)
                    checksum.update(block)
                    progress.advance(bar, len(block))
            if find_file(folder / name) != file or (local / name).stat().st_size != file.size:
                raise UserError(f"{folder / name}: changed while it was read; run again")
            if b64encode(checksum.digest()).decode() != file.checksum:
                raise UserError(f"{folder / name}: was damaged on its way; run again")


def _new_checksum(file: RemoteFile) -> Any:
    """Starts computing the checksum that the storage has for a file: MD5, or for composed files CRC32C."""
    if len(b64decode(file.checksum)) == 16:
        return hashlib.md5(usedforsecurity=False)
    import google_crc32c  # a dependency of gcsfs

    return google_crc32c.Checksum()


def _read_blocks(path: epath.Path) -> Iterator[bytes]:
    with remote_errors(path):
        source = _storage().open(str(path), "rb")
    with source:
        while True:
            with remote_errors(path):
                block = source.read(BUFFER_BYTES)
            if not block:
                return
            yield block


def upload(local: Path, path: epath.Path) -> None:
    """Copies a local file to a remote path, where it appears only when it is complete.

    Raises:
      UserError: If it cannot be copied.
    """
    with remote_errors(path):
        _storage().put_file(str(local), str(path))


def upload_new(local: Path, path: epath.Path) -> None:
    """Like `upload`, but does nothing if there is a file already."""
    with remote_errors(path), suppress(FileExistsError):
        _storage().put_file(str(local), str(path), mode="create")


def upload_folder(local: Path, path: epath.Path, last: Sequence[str] = (), replace: bool = True) -> None:
    """Copies a local folder to a remote path.

    Args:
      local: The folder.
      path: The remote path.
      last: Names of the files to copy last.
      replace: Whether to replace files that are there.

    Raises:
      UserError: If it cannot be copied.
    """
    names = sorted(file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file())
    for name in sorted(names, key=lambda name: (name in last, name)):
        (upload if replace else upload_new)(local / name, path / name)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small remote file.

    Raises:
      UserError: If it cannot be written.
    """
    with remote_errors(path):
        _storage().pipe_file(str(path), text.encode())


def read_text(path: epath.Path) -> str | None:
    """Reads a small remote file; None if there is none.

    Raises:
      UserError: If it cannot be read.
    """
    with remote_errors(path):
        try:
            return _storage().cat_file(str(path)).decode(errors="replace")
        except FileNotFoundError:
            return None


def remove_folder(path: epath.Path) -> None:
    """Removes a remote folder, if there is one.

    Raises:
      UserError: If it cannot be removed.
    """
    with remote_errors(path):
        storage = _storage()
        if storage.exists(str(path)):
            storage.rm(str(path), recursive=True)
