"""Errors caused by invalid user input."""

from collections.abc import Sequence


class UserError(Exception):
    """Invalid user input. The message names the file, line and field, and how to fix the problem.

    Programs print it without a traceback and exit with code 2 (see `program.run_program`).
    """


def format_problems(problems: Sequence[str], limit: int = 20) -> str:
    """Formats the first `limit` problems as an indented block, followed by the total number if there are more."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … {len(problems)} in total")
    return "\n".join(lines)


def shorten(text: str, limit: int = 60) -> str:
    """Shortens a value for an error message to `limit` characters and escapes unprintable ones."""
    text = text[: limit + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
