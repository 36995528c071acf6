"""Command-line programs: argument parsing, interrupts and exit codes."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import local_path


class Parser(argparse.ArgumentParser):
    """Argument parser that raises `UserError` for invalid arguments and accepts no abbreviated flags."""

    def __init__(self, prog: str | None = None, description: str | None = None, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(shorten(message, 300))


def path_argument(text: str) -> Path:
    """Parses the value of a flag that is a path."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text)}: {error}") from error


@contextmanager
def loading_modules() -> Iterator[None]:
    """Exits at once on an interrupt while modules are imported: KeyboardInterrupt in their C code may crash."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return

    def stop(*_: object) -> None:
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(130)

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def run_program(main: Callable[[], None]) -> None:
    """Runs the `main` of a program. On a `UserError`, prints its message to stderr and exits with code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # all files are closed, and native threads may crash during interpreter shutdown
