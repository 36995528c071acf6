"""Command-line programs: argument parsing, interrupts and exit codes."""

import argparse
import errno
import gc
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import is_unicode, local_path


class Parser(argparse.ArgumentParser):
    """Argument parser that raises `UserError` for invalid arguments, and accepts -1e-3 but no abbreviated flags."""

    def __init__(self, prog: str | None = None, description: str | None = None, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=formatter, **options)
        # argparse takes -1e-3 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def error(self, message: str) -> NoReturn:
        raise UserError(shorten(message, 300))


def path_argument(text: str) -> Path:
    """Parses the value of a flag that is a path."""
    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shorten(text)}: {error}") from error


def text_argument(text: str) -> str:
    """Parses the value of a flag that is a text."""
    if not is_unicode(text):
        raise argparse.ArgumentTypeError(f"{ascii(text)}: is not valid UTF-8")
    return text


def positive_argument(text: str) -> int:
    """Parses the value of a flag that is a positive integer."""
    return _integer(text, 1)


def count_argument(text: str) -> int:
    """Parses the value of a flag that is 0 or a positive integer."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from {least} to 999999999")
    return int(text)


class Terminated(KeyboardInterrupt):
    """The process has received SIGTERM: a scheduler stops it, to start it again later."""


INTERRUPTS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
"""The exception for each signal that stops a program."""


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a program that ends with an error."""
    if isinstance(error, UserError) or _is_output_error(error):
        return 2
    if isinstance(error, SystemError) and isinstance(error.__cause__, KeyboardInterrupt):
        return exit_code(error.__cause__)  # C code has raised it in place of the interrupt
    if isinstance(error, Terminated):
        return 0
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _is_output_error(error: BaseException) -> bool:
    """Whether stdout or stderr cannot be written. Errors of files have names."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EPIPE) and error.filename is None


@contextmanager
def loading_modules() -> Iterator[None]:
    """Exits at once on a signal while modules are imported: an exception in their C code may crash.

    Garbage collection is off meanwhile: it would take a seventh of the time, and find next to nothing. What exists
    after the first imports of a program is not looked at again.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return

    def stop(number: int, _: object) -> None:
        print("\nstopped", file=sys.stderr, flush=True)
        os._exit(exit_code(INTERRUPTS[number]()))

    previous = {number: signal.signal(number, stop) for number in INTERRUPTS}
    # A process that already uses JAX may have garbage that holds arrays, which freezing would keep.
    freezes, collects = "jax" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        yield
        if freezes:
            gc.freeze()
    finally:
        if collects:
            gc.enable()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _send_again(ignored: Any) -> None:
    """Sends a signal again whose exception was raised where Python ignores exceptions, such as in a callback."""
    for number, interrupt in INTERRUPTS.items():
        if ignored.exc_type is interrupt:
            # From another thread, because exceptions in this function are ignored as well.
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
            return
    sys.__unraisablehook__(ignored)


def run_program(main: Callable[[], None]) -> NoReturn:
    """Runs the `main` of a program and exits.

    The exit code is 0 after success and after SIGTERM, 2 after a `UserError`, whose message is printed to stderr, 130
    after an interrupt, and 1 after any other error.
    """
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _send_again
    code: Any = 0
    try:
        main()
    except SystemExit as error:  # from argparse
        code = error.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        code = exit_code(error)
        with suppress(OSError):
            if isinstance(error, UserError) or code == 2:
                print(f"error: {error}", file=sys.stderr)
            elif code in (0, 130):
                print("\nstopped; run the same command again to continue", file=sys.stderr)
            else:
                traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # nobody reads the output any more, or it was closed from the start
            stream.flush()
    # All files are closed. Native threads may crash while the interpreter shuts down, or wait for other processes.
    os._exit(code)
