"""Settings from a YAML file and flags (`--optimizer.learning_rate 1e-5`); flags win over the file."""

import argparse
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from codiemb_jax.config import Settings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.program import Parser

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
"""The configurations that this package includes, by name."""
MERGE = "tag:yaml.org,2002:merge"
"""Tag of the key `<<`."""
MAX_NODES = 10_000
"""Values that a file may hold once its anchors are expanded: far more than there are settings."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-5 is a number, as in YAML 1.2 and JSON; a SafeLoader makes plain values only."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # `!!bool maybe`, or a number of 5000 digits
            kind = node.tag.rpartition(":")[2]
            problem = f"{shorten(repr(node.value))} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
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
        _set(values, name.split("."), _flag_value(name, texts))
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = [_problem(problem, node, path, set(given)) for problem in error.errors()]
        raise UserError("invalid settings:\n" + format_problems(problems)) from error


def find_config(name: str) -> Path:
    """The path of a settings file, which can be given as the name of a configuration of this package."""
    return CONFIGS[name] if name in CONFIGS and not Path(name).exists() else Path(name)


def _set(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets a value in nested dicts, which are copied on the way: anchors let a file use one in several places."""
    key, *rest = keys
    if not rest:
        values[key] = value
    elif isinstance(section := values.get(key, {}), dict):  # else an error of the file's own, reported later
        values[key] = dict(section)
        _set(values[key], rest, value)


def flags_parser() -> argparse.ArgumentParser:
    """A parser of every setting as a flag."""
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for name, _, description in _settings(Settings):
        section = name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "the run")
        text = " ".join(description.split()).replace("%", "%%")
        groups[section].add_argument(f"--{name}", action="append", metavar="VALUE", help=text)
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
    if list in types:
        return None if texts == ["null"] else [item for text in texts for item in _items(text)]
    if text == "null" and type(None) in types:
        return None
    if str in types or Path in types:
        return text
    return _value(f"[{text}]" if tuple in types and not text.startswith("[") else text)


def _items(text: str) -> list[Any]:
    found = _value(text) if text.startswith("[") else None
    return found if isinstance(found, list) else text.split(",")


def _value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        return text


def _read(path: Path) -> tuple[dict[str, Any], yaml.Node]:
    """The file's values, and where each is."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        root = loader.get_single_node()
        problems = [f"{path}:{line}: {problem}" for line, problem in sorted(_malformed(root))] if root else []
        if problems:
            raise UserError("invalid settings:\n" + format_problems(problems))
        values = loader.construct_document(root) if root else None
    except OSError as error:
        hint = "" if path.suffix else f"; configurations of this package: {', '.join(CONFIGS)}"
        raise UserError(f"{path}: cannot be read: {error.strerror}{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        message = "\n".join(shorten(line, 200) for line in str(error).splitlines())
        raise UserError(f"{path}: not valid YAML: {message}") from error
    if not isinstance(values, dict) or root is None:
        raise UserError(f"{path}: expected settings (`output_dir: …`), found {type(values).__name__}")
    return values, root


def _malformed(root: yaml.Node) -> Iterator[tuple[int, str]]:
    """Line and problem of what YAML allows and settings do not: duplicate keys, of which it would take the last, keys
    that cannot be names, and anchors that contain themselves or expand without end.

    Keys that YAML takes for numbers and the like become text on the way.
    """
    count = 0
    waiting: deque[tuple[str, yaml.Node, tuple[int, ...]]] = deque([("", root, ())])
    while waiting:
        name, node, above = waiting.popleft()
        line = node.start_mark.line + 1
        count += 1
        if id(node) in above:
            yield line, f"{_name(name)}: the anchor contains itself"
            continue
        if count > MAX_NODES:
            yield line, f"{_name(name)}: more than {MAX_NODES} values once anchors are expanded"
            return
        inner = (*above, id(node))
        prefix = f"{name}." if name else ""
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{prefix}{number}", item, inner) for number, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for place, (key, value) in enumerate(node.value):
                line = key.start_mark.line + 1
                if not (isinstance(key, yaml.ScalarNode) and key.value and key.value.isprintable()):
                    where = f"{_name(name)}: " if name else ""
                    yield line, f"{where}a key must be the name of a setting"
                    continue
                if key.value in seen:
                    yield line, f"{_name(prefix + key.value)}: duplicate key"
                seen.add(key.value)
                if key.tag != MERGE:
                    text = yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)
                    node.value[place] = (text, value)
                waiting.append((prefix + key.value, value, inner))


def _name(name: str) -> str:
    return shorten(name, 100)


def _problem(problem: Any, node: yaml.Node, path: Path, flags: set[str]) -> str:
    """One invalid setting: where it is, what is wrong, what was found."""
    field = ".".join(str(part) for part in problem["loc"])
    line = _line(node, problem["loc"])
    is_flag = any(field == flag or field.startswith(flag + ".") for flag in flags)
    place = "--" if is_flag else f"{path}:{line}: " if line else ""
    if problem["type"] == "extra_forbidden":
        return f"{place}{_name(field)}: unknown setting"
    if problem["type"] == "missing":
        return f"{place or f'{path}: '}{field}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict | BaseModel) else f", found {_found(problem['input'])}"
    return f"{place}{field + ': ' if field else ''}{message}{given}"


def _found(value: Any) -> str:
    try:
        return shorten(repr(value))
    except ValueError:  # Python writes no integers of thousands of digits
        return "a huge number"


def _line(node: yaml.Node, location: Sequence[Any]) -> int | None:
    """The line of a setting in the file, from 1; None if the file does not have it."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return None
            key, node = found[-1]  # what a merge key (`<<`) brings stands before the mapping's own
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
