"""Errors caused by invalid user input."""

from collections.abc import Sequence


class UserError(Exception):
    """Input that cannot be used.  The message names file, line and field and says what would be right.

    Programs print it without a traceback and exit with code 2 (see `program.run_program`).
    """


def format_problems(problems: Sequence[str], limit: int = 20) -> str:
    """Joins problems into one indented block: the first `limit`, then their total number."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … {len(problems)} in all")
    return "\n".join(lines)


def shorten(text: str, limit: int = 60) -> str:
    """A value for a message: safe to print, and at most `limit` characters."""
    text = text[: limit + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
