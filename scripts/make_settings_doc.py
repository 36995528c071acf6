"""Writes docs/settings.md from the settings in codiemb_jax/config.py.

python scripts/make_settings_doc.py
"""

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from codiemb_jax.config import Settings

TARGET = Path(__file__).parent.parent / "docs" / "settings.md"
INTRODUCTION = """# Settings

Made by `python scripts/make_settings_doc.py` from `codiemb_jax/config.py`; change it there.

Settings stand in a YAML file. Every setting is also a flag, and a flag wins over the file:

```
python -m codiemb_jax.train --config configs/quickstart.yaml --optimizer.learning_rate 1e-4 --output_dir runs/other
```

A list is given with commas (`--data.ir a.jsonl,b.jsonl`), nothing at all as `null` (`--objective.sts_list_size null`).
A setting that does not exist, or has a value that cannot be used, ends the program with exit code 2 and a message that
names file, line and setting. Relative paths start from the folder in which you start the program. Environment
variables set nothing.

Some settings must fit each other:

- `data.ir` or `data.sts` names at least one path.
- Each `data.*_global_batch_size` in use is a multiple of `mesh.data` x `mesh.fsdp` x `encode_chunks`.
- `objective.ir_pool_size` divides `data.ir_global_batch_size`; `objective.sts_list_size` divides
  `data.sts_global_batch_size`.
- `mesh.data` x `mesh.fsdp` x `mesh.tensor` is the number of devices.
- `data.query_max_tokens` and `data.passage_max_tokens` are at most the positions of the model.
"""
NAMES = {
    str: "text",
    int: "whole number",
    float: "number",
    Path: "path",
    bool: "`true` or `false`",
    type(None): "`null`",
}
PLURALS = {"path": "paths", "number": "numbers", "whole number": "whole numbers", "text": "texts"}
COUNTS = {2: "two", 3: "three"}
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in plain words: `whole number, at least 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            part for entry in arguments[1:] for part in (entry.metadata if isinstance(entry, FieldInfo) else [entry])
        ]
        return words(arguments[0], [*inner, *metadata])
    if origin is Literal:
        return " or ".join(f"`{shown(value)}`" for value in arguments) + (" only" if len(arguments) == 1 else "")
    if origin in (Union, types.UnionType):
        return ", or ".join(words(part, metadata) for part in arguments)
    if origin is list:
        return "list of " + PLURALS[words(arguments[0])]
    if origin is tuple:
        name, *rest = words(arguments[0]).split(", ", 1)
        return ", ".join([f"{COUNTS[len(arguments)]} {PLURALS[name]}", *(f"each {bounds}" for bounds in rest)])
    if annotation is type(None) or annotation is None:
        return "`null` only"
    return ", ".join([NAMES[annotation], *bounds_of(annotation, metadata)]).replace(", below", " and below")


def bounds_of(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    for bound in metadata:
        for name, text in BOUNDS.items():
            if (limit := getattr(bound, name, None)) is not None:
                # `at least 1` is plainer than `above 0` where there is nothing between them.
                whole = annotation is int and name == "gt"
                yield BOUNDS["ge"].format(limit + 1) if whole else text.format(limit)
        if getattr(bound, "min_length", None):
            yield "not empty"


def shown(value: Any) -> str:
    """A value as it would stand in the YAML file."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    rows = ["| setting | value | default | what it is |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{shown(field.default)}`"
        text = " ".join((field.description or "").split())
        cells = (f"`{prefix}{name}`", optional(field), default, text)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def optional(field: FieldInfo) -> str:
    return words(field.annotation, field.metadata).replace(", or `null` only", ", or `null`")


def document() -> str:
    """The whole page."""
    sections = {name: field.annotation for name, field in Settings.model_fields.items() if is_section(field.annotation)}
    single = {name: field for name, field in Settings.model_fields.items() if name not in sections}
    parts = [INTRODUCTION, "## The run\n", table("", single)]
    for name, section in sections.items():
        parts.append(f"## {name}\n")
        if section.__doc__:
            parts.append(section.__doc__.strip() + "\n")
        parts.append(table(f"{name}.", section.model_fields))
    return "\n".join(parts)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(document(), encoding="utf-8")
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
