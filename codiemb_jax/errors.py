"""Errors caused by invalid user input."""

import sys
from collections.abc import Callable, Sequence


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


def run_program(main: Callable[[], None]) -> None:
    """Runs a program's `main`; a `UserError` ends it with one message on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; start the same command again to continue", file=sys.stderr)
        sys.exit(130)
