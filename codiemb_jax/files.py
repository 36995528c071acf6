"""Writing files so that they are there whole or not at all."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name and renames it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
