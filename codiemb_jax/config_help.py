"""Describes settings in plain words, for the help of the programs and for docs/settings.md."""

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from codiemb_jax.config import MAX_INT
from codiemb_jax.remote import Location

NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    Location: "path",
    bool: "`true` or `false`",
    type(None): "`null`",
}
PLURALS = {"path": "paths", "number": "numbers", "integer": "integers", "string": "strings"}
COUNTS = {2: "two", 3: "three"}
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def describe_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Returns a type in plain words: `integer, at least 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            part for entry in arguments[1:] for part in (entry.metadata if isinstance(entry, FieldInfo) else [entry])
        ]
        return describe_type(arguments[0], [*inner, *metadata])
    if origin is Literal:
        *most, last = [f"`{to_yaml(value)}`" for value in arguments]
        return f"{', '.join(most)} or {last}" if most else last
    if annotation == Location:
        return NAMES[annotation]
    if origin in (Union, types.UnionType):
        return ", or ".join(describe_type(part, metadata) for part in arguments)
    if origin is list:
        item = describe_type(arguments[0])
        return f"{item}, or list of {PLURALS[item]}"
    if origin is tuple:
        name, *rest = describe_type(arguments[0]).split(", ", 1)
        return ", ".join([f"{COUNTS[len(arguments)]} {PLURALS[name]}", *(f"each {bounds}" for bounds in rest)])
    bounds = " and ".join(describe_bounds(annotation, metadata))
    return f"{NAMES[annotation]}, {bounds}" if bounds else NAMES[annotation]


def describe_bounds(annotation: Any, metadata: Sequence[Any]) -> Iterator[str]:
    """Yields the bounds of a type: `at least 1`."""
    for bound in metadata:
        for name, text in BOUNDS.items():
            limit = getattr(bound, name, None)
            if limit is None or limit == MAX_INT:  # given in the introduction
                continue
            # For integers, `at least 1` is clearer than `above 0`.
            is_integer_bound = annotation is int and name == "gt"
            yield BOUNDS["ge"].format(limit + 1) if is_integer_bound else text.format(limit)
        if (limit := getattr(bound, "max_length", None)) is not None:
            yield f"at most {limit} characters"


def to_yaml(value: Any) -> str:
    """Returns a value as written in a YAML file."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def describe_default(field: FieldInfo) -> str:
    """Returns the default of a setting, as written in a YAML file, or `required`."""
    return "required" if field.is_required() else f"`{to_yaml(field.default)}`"
