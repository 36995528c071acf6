"""Finds data files, local and remote, and names them."""

import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from codiemb_jax.cache import cache_folder, shown
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.files import is_unicode
from codiemb_jax.remote import Location, fetch, fetch_file, list_files, original

EXTENSIONS = (".json", ".jsonl")


def find_files(locations: Sequence[Location], setting: str) -> list[Path]:
    """Finds data files and returns them sorted by path, in the same order on every host. Copies remote ones.

    Args:
      locations: .json and .jsonl files, or folders to search recursively for such files.
      setting: Name of the setting with the paths, for error messages.

    Raises:
      UserError: If a path does not exist, is not a data file, or is a folder without any, or if a file is found twice.
    """
    files: list[Path] = []
    problems: list[str] = []
    cache = cache_folder()
    for location in locations:
        try:
            if not isinstance(location, Path):
                files += _fetch_files(location, cache)
                continue
            path = location
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                found, found_problems = _search(path)
                if not found and not found_problems:
                    problems.append(f"{path}: the folder contains no .json or .jsonl files")
                files += found
                problems += found_problems
            elif not stat.S_ISREG(status.st_mode):  # reading a pipe would block, and works only once
                problems.append(f"{path}: not a file or folder")
            elif not _is_data_file(path.name):
                problems.append(
                    f"{path}: expected a .json or .jsonl file, or a folder (the data guide shows how to convert CSV)"
                )
            else:
                files.append(path)
        except UserError as error:  # of remote files
            problems.append(str(error))
        except FileNotFoundError:
            problems.append(f"{path}: no such file or folder")
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror}")
    problems += [
        f"{ascii(str(file))}: the name is not valid UTF-8; rename the file"
        for file in files
        if not is_unicode(str(file))
    ]
    problems += [f"{file}: permission denied; make the file readable" for file in files if not os.access(file, os.R_OK)]
    by_inode: dict[tuple[int, int], list[Path]] = {}
    for file in files:
        status = file.stat()  # symbolic and hard links have the inode of their target
        by_inode.setdefault((status.st_dev, status.st_ino), []).append(file)
    for names in by_inode.values():
        if len(names) > 1:
            problems.append(
                f"{' and '.join(map(shown, names))}: the same file is listed {len(names)} times; list it once"
            )
    if problems:
        raise UserError(f"{setting}:\n{format_problems(problems)}")
    # By their addresses, so that the order does not depend on where the cache is.
    return sorted(files, key=lambda file: original(file, cache).parts)


def _search(folder: Path) -> tuple[list[Path], list[str]]:
    """Finds data files in a folder and those below it, linked ones included. Nothing is skipped silently.

    Returns:
      The files, and what is wrong with files and folders that cannot be read.
    """
    files: list[Path] = []
    problems: list[str] = []
    visited: set[tuple[int, int]] = set()  # a link may lead back to a folder above it

    def add_error(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be read: {error.strerror}")

    for name, folders, names in os.walk(folder, followlinks=True, onerror=add_error):
        # The same order on every host, so that a folder that is also linked has its own name.
        folders.sort(key=lambda inner: (Path(name, inner).is_symlink(), inner))
        status = Path(name).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        for path in (Path(name, file) for file in names):
            if not path.exists():  # it may be that of a folder
                problems.append(f"{path}: broken link")
            elif _is_data_file(path.name) and not path.is_file():
                problems.append(f"{path}: not a file")
            elif _is_data_file(path.name):
                files.append(path)
    return files, problems


def _fetch_files(location: epath.Path, cache: Path) -> list[Path]:
    """Copies a remote data file, or all in a remote folder, into the cache."""
    listed = list_files(location)
    if not listed and _is_data_file(location.name):
        return [fetch_file(location, cache)]
    found = {name: file for name, file in listed.items() if _is_data_file(name)}
    if not found:
        raise UserError(f"{location}: {'the folder contains' if listed else 'there are'} no .json or .jsonl files")
    # One by one, so that only those are copied again that have changed, and each has one copy wherever it is listed.
    paths = [(location / name, file) for name, file in found.items()]
    return [fetch(path.parent, {path.name: file}, cache) / path.name for path, file in paths]


def _is_data_file(name: str) -> bool:
    return Path(name).suffix in EXTENSIONS


def dataset_names(paths: Sequence[Path]) -> list[str]:
    """Returns unique names of files for metrics: their stems, file names or paths, whichever is the first to differ.

    Copies of remote files have the names of the originals, whatever the cache.
    """
    files = [original(path, cache_folder()) for path in paths]
    for name in (lambda file: file.stem, lambda file: file.name):
        counts = Counter(map(name, files))
        if max(counts.values(), default=0) <= 1:
            return [name(file) for file in files]
    return [str(file) for file in files]
