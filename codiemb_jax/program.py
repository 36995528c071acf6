"""Running a program: its arguments, its interruption, and how it ends."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from codiemb_jax.errors import UserError, shorten


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments as `UserError`, and takes no abbreviated flags."""

    def __init__(self, prog: str | None = None, description: str | None = None, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(shorten(message, 300))


@contextmanager
def loading_modules() -> Iterator[None]:
    """While a program's modules load, an interrupt ends it at once: raised inside a module's C code, it may crash."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers, and are not interrupted
        yield
        return

    def stop(*_: object) -> None:
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_program(main: Callable[[], None]) -> None:
    """Runs a program's `main`; a `UserError` ends it with one message on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # all files are closed; threads of native code may crash while the interpreter shuts down
