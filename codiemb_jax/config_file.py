"""Settings from a YAML file and flags (`--optimizer.learning_rate 1e-5`); flags win over the file."""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from codiemb_jax.config import Settings
from codiemb_jax.errors import UserError, format_problems, shorten

MAX_NODES = 10_000
"""Values that a file may hold once its anchors are expanded: far more than there are settings."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as in YAML 1.2 and JSON."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_settings(path: Path, flags: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file and flags (`--section.key VALUE`), which win.

    Raises:
      UserError: naming file, line and setting of everything that is wrong.
    """
    given = vars(flags_parser().parse_args(flags))
    values, node = _read(path)
    problems = [f"--{name}: given {len(texts)} times" for name, texts in given.items() if _repeated(name, texts)]
    if problems:
        raise UserError("invalid settings:\n" + format_problems(problems))
    for name, texts in given.items():
        *sections, key = name.split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):  # an error of the file's own, reported below
                break
        else:
            target[key] = _flag_value(name, texts)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = [_problem(problem, node, path, set(given)) for problem in error.errors()]
        raise UserError("invalid settings:\n" + format_problems(problems)) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def flags_parser() -> argparse.ArgumentParser:
    """A parser of every setting as a flag."""
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for name, _, description in _settings(Settings):
        section = name.rpartition(".")[0]
        group = groups.setdefault(section, parser.add_argument_group(section or "the run"))
        text = " ".join(description.split()).replace("%", "%%")
        group.add_argument(f"--{name}", action="append", metavar="VALUE", help=text)
    return parser


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Name, type and description of every setting."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation, field.description or ""


def _types(annotation: Any) -> Iterator[Any]:
    """The plain types that an annotation is made of; of a literal, those of its values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from map(type, arguments)
    elif origin is Annotated:
        yield from _types(arguments[0])
    elif arguments:
        yield origin
        for argument in arguments:
            yield from _types(argument)
    else:
        yield annotation


TYPES = {name: set(_types(annotation)) for name, annotation, _ in _settings(Settings)}


def _repeated(name: str, texts: list[str]) -> bool:
    return len(texts) > 1 and list not in TYPES[name]


def _flag_value(name: str, texts: list[str]) -> Any:
    """What one setting's flags say: a text as it is, all else as YAML; of a list, items between commas."""
    types, text = TYPES[name], texts[0]
    if list in types and not text.startswith("["):
        return None if texts == ["null"] else [part for text in texts for part in text.split(",")]
    if text == "null" and (type(None) in types or list in types):
        return None
    if str in types or (Path in types and list not in types):
        return text
    if tuple in types and not text.startswith("["):
        text = f"[{text}]"
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: plain values only
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _read(path: Path) -> tuple[dict[str, Any], yaml.Node]:
    """The file's values, and where each is."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        problems = [f"{path}:{line}: {problem}" for line, problem in _malformed(node)]
        if problems:
            raise UserError("invalid settings:\n" + format_problems(problems))
        values = yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict) or node is None:
        raise UserError(f"{path}: expected settings (`output_dir: …`), found {type(values).__name__}")
    return values, node


def _malformed(root: yaml.Node | None) -> Iterator[tuple[int, str]]:
    """Line and problem of what YAML allows and settings do not: duplicate keys, of which it would take the last, keys
    that are no text, and anchors that contain themselves or expand without end."""
    count = 0
    waiting: list[tuple[yaml.Node, tuple[int, ...]]] = [(root, ())] if root else []
    while waiting:
        node, above = waiting.pop(0)
        line = node.start_mark.line + 1
        count += 1
        if id(node) in above:
            yield line, "the anchor contains itself"
            continue
        if count > MAX_NODES:
            yield line, f"more than {MAX_NODES} values once anchors are expanded"
            return
        inner = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, inner) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    yield key.start_mark.line + 1, "a key must be the name of a setting"
                elif key.value in seen:
                    yield key.start_mark.line + 1, f"{key.value}: duplicate key"
                else:
                    seen.add(key.value)
                waiting.append((value, inner))


def _problem(problem: Any, node: yaml.Node, path: Path, flags: set[str]) -> str:
    """One invalid setting: where it is, what is wrong, what was found."""
    field = ".".join(str(part) for part in problem["loc"])
    line = _line(node, problem["loc"])
    is_flag = any(field == flag or field.startswith(flag + ".") for flag in flags)
    place = "--" if is_flag else f"{path}:{line}: " if line else ""
    if problem["type"] == "extra_forbidden":
        return f"{place}{field}: unknown setting"
    if problem["type"] == "missing":
        return f"{path}: {field}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict | BaseModel) else f", found {shorten(repr(problem['input']))}"
    return f"{place}{field + ': ' if field else ''}{message}{given}"


def _line(node: yaml.Node, location: Sequence[Any]) -> int | None:
    """The line of a setting in the file, from 1; None if the file does not have it."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return None
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
