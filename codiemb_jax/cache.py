"""The cache: prepared datasets, compiled programs and copies of remote files."""

import os
from pathlib import Path

from etils import epath

from codiemb_jax.errors import UserError
from codiemb_jax.files import local_path
from codiemb_jax.remote import is_remote, original, remote_path

VARIABLE = "CODIEMB_JAX_CACHE"
DEFAULT = "~/.cache/codiemb_jax"


def cache_folder() -> Path:
    """Returns the local cache folder: $CODIEMB_JAX_CACHE, or ~/.cache/codiemb_jax if that is not set or is remote.

    Raises:
      UserError: If it is not a valid path, or there is no home directory.
    """
    setting = os.environ.get(VARIABLE) or DEFAULT
    try:
        return local_path(DEFAULT if is_remote(setting) else setting).absolute()
    except (ValueError, OSError) as error:  # OSError: the working directory of a relative path was deleted
        raise UserError(f"{VARIABLE}: {error}; set it to the folder of the cache") from error


def shown(path: Path) -> str:
    """Returns a path for messages: of a copy in the cache, the address of the original."""
    return str(original(path, cache_folder()))


def remote_cache() -> epath.Path | None:
    """Returns the remote folder from which machines take prepared datasets; None if $CODIEMB_JAX_CACHE is local.

    Raises:
      UserError: If the address is invalid.
    """
    setting = os.environ.get(VARIABLE, "")
    try:
        return remote_path(setting) if is_remote(setting) else None
    except ValueError as error:
        raise UserError(f"{VARIABLE}: {error}") from error
