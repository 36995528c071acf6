"""Errors caused by invalid user input."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Input that cannot be used.  The message names file, line and field and says what would be right.

    Programs print it without a traceback and exit with code 2 (see `run_program`).
    """


def format_problems(problems: Sequence[str], limit: int = 20) -> str:
    """Joins problems into one indented block: the first `limit`, then their total number."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … {len(problems)} in all")
    return "\n".join(lines)


def shorten(text: str, limit: int = 60) -> str:
    """A value for a message: safe to print, and at most `limit` characters."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 3] + "..."


STOPPED = "\nstopped; start the same command again to continue"


@contextmanager
def loading_modules() -> Iterator[None]:
    """While a program's modules load, an interrupt ends it at once: raised inside a module's C code, it may crash."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers, and are not interrupted
        yield
        return

    def stop(*_: object) -> None:
        print(STOPPED, file=sys.stderr, flush=True)
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
        print(STOPPED, file=sys.stderr)
        sys.exit(130)
