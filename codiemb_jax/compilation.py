"""The persistent compilation cache, in which programs find what an earlier process compiled."""

import grp
import hashlib
import os
import platform
import pwd
import stat
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from codiemb_jax.cache import cache_folder

ROOT = 0
"""User id of the administrator, who can change everything in any case."""


def use_compilation_cache() -> None:
    """Makes JAX keep what it compiles, unless a folder for that is configured or its cache is disabled.

    JAX runs what it finds there, so only a folder that no other user can write is used; otherwise prints why it is not.

    Raises:
      UserError: If there is no cache folder.
    """
    config: Any = jax.config  # its attributes have no static types
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return
    folder = cache_folder() / "compiled" / _processor()
    try:
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()  # a link could be changed after the check
        problem = _problem(folder)
    except FileExistsError as error:
        problem = f"{error.filename} is not a folder; move it away"
    except OSError as error:
        problem = f"{folder} cannot be used ({error.strerror})"
    if problem:
        note = f"note: compiled programs are not cached, because {problem}"
        Console(stderr=True).print(note, soft_wrap=True, markup=False)
        return
    config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor() -> str:
    """Returns a name for the processor and its cores.

    XLA uses all instructions, which another machine may not have, and splits loops into as many parts as there are
    cores, or as NPROC says. JAX distinguishes neither.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:  # not Linux
        features = [platform.processor()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features.append(os.environ.get("NPROC", str(cores)))
    return hashlib.sha256("\n".join(features).encode()).hexdigest()[:12]


def _problem(folder: Path) -> str | None:
    """Returns who else could put files into a folder, and the fix; None if nobody."""
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"other users can write to {folder}; delete it, because its content cannot be trusted"
    user = os.getuid()
    for part in (folder, *folder.parents):
        status = part.stat()
        if status.st_uid != user and (part == folder or status.st_uid != ROOT):
            return f"{part} belongs to another user; set CODIEMB_JAX_CACHE to a folder of your own"
        others = stat.S_IWOTH | (0 if _is_private_group(status.st_gid, user) else stat.S_IWGRP)
        if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
            return f"other users can replace folders in {part}; run chmod go-w {part}"
    return None


def _is_private_group(group: int, user: int) -> bool:
    """Whether only the user is in a group: many systems give each user a group of the same name."""
    try:
        entry, name = grp.getgrgid(group), pwd.getpwuid(user).pw_name
        return entry.gr_name == name and set(entry.gr_mem) <= {name}
    except KeyError:
        return False
