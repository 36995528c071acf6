"""Loads settings from a YAML file and flags (`--optimizer.learning_rate 1e-5`). Flags override the file."""

import argparse
import difflib
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from codiemb_jax.config import Settings
from codiemb_jax.config_help import describe_default, describe_type
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.program import Parser

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}
"""Paths of the configurations in this package, by name."""
MERGE_TAG = "tag:yaml.org,2002:merge"
"""YAML tag of the merge key `<<`."""
MAX_NODES = 10_000
"""Maximum number of values in a file after expanding its anchors. There are far fewer settings."""


class _Loader(yaml.SafeLoader):
    """YAML loader that constructs only plain values.

    It reads 1e-5 as a number, and 010 and 2:8 as text. YAML 1.1 reads 1e-5 as text, 010 as 8 and 2:8 as 128.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # `!!bool maybe`, or an integer of 5000 digits
            kind = node.tag.rpartition(":")[2]
            problem = f"{shorten(repr(node.value))} cannot be read as {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes what `_Loader` would read as a number."""


INTEGER, NUMBER = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
"""YAML tags."""
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INTEGER, NUMBER)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        NUMBER,
        re.compile(
            r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
            r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
        ),
        list("-+.0123456789"),
    )


def load_settings(path: Path, flags: Sequence[str] = ()) -> Settings:
    """Loads settings from a YAML file, overridden by flags (`--section.key VALUE`).

    Raises:
      UserError: If settings are invalid. Names the file, line and setting of every problem.
    """
    flag_texts = vars(parse_flags(flags))
    values, node = read_values(path)
    problems = [
        f"--{name}: given {len(texts)} times" for name, texts in flag_texts.items() if _is_repeated(name, texts)
    ]
    if problems:
        raise UserError("invalid settings:\n" + format_problems(problems))
    for name, texts in flag_texts.items():
        _set_nested(values, name.split("."), _parse_flag(name, texts))
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = [_format_problem(problem, node, path, set(flag_texts)) for problem in error.errors()]
        raise UserError("invalid settings:\n" + format_problems(problems)) from error


def dump_settings(settings: Settings) -> str:
    """Returns settings as YAML that `load_settings` reads."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def find_config(name: str) -> Path:
    """Returns the path of a settings file, given as a path or as the name of a configuration in this package."""
    # A link whose target is missing is a user's file, too, and a folder is not.
    is_own_file = os.path.lexists(name) and not Path(name).is_dir()
    return CONFIGS[name] if name in CONFIGS and not is_own_file else Path(name)


def _set_nested(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets a value in nested dicts. Copies the inner dicts, because YAML anchors can share them between sections."""
    key, *rest = keys
    if not rest:
        values[key] = value
    elif isinstance(section := values.get(key, {}), dict):  # otherwise the file is invalid, which is reported later
        values[key] = dict(section)
        _set_nested(values[key], rest, value)


def flags_parser() -> argparse.ArgumentParser:
    """Returns a parser with one flag per setting."""
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    groups: dict[str, Any] = {}
    for name, field in all_settings(Settings):
        section = name.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "the run")
        kind, default = describe_type(field.annotation, field.metadata), describe_default(field)
        default = default if field.is_required() else f"default: {default}"
        text = f"{' '.join((field.description or '').split())} ({kind}; {default})".replace("%", "%%").replace("`", "")
        groups[section].add_argument(f"--{name}", action="append", metavar="VALUE", help=text)
    return parser


def parse_flags(flags: Sequence[str]) -> argparse.Namespace:
    """Returns the values of flags, as lists of texts.

    Raises:
      UserError: If a flag is not a setting.
    """
    values, unknown = flags_parser().parse_known_args(flags)
    if unknown:
        hint = _suggest(unknown[0].removeprefix("--").partition("=")[0])
        if unknown[0].endswith((".yaml", ".yml")):
            hint = f"; to use a settings file, give --config {unknown[0]}"
        raise UserError(f"unrecognized arguments: {shorten(' '.join(unknown), 200)}{hint}")
    return values


def all_settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields the name and definition of every setting."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_settings(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _plain_types(annotation: Any) -> Iterator[Any]:
    """Yields the plain types in an annotation. A Literal has the types of its values."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from map(type, arguments)
    elif origin is Annotated:
        yield from _plain_types(arguments[0])
    elif arguments:
        yield origin
        for argument in arguments:
            yield from _plain_types(argument)
    else:
        yield annotation


TYPES = {name: set(_plain_types(field.annotation)) for name, field in all_settings(Settings)}


def _is_repeated(name: str, texts: list[str]) -> bool:
    return len(texts) > 1 and list not in TYPES[name]


def _parse_flag(name: str, texts: list[str]) -> Any:
    """Parses the values of a flag: strings verbatim, lists as comma-separated items, everything else as YAML."""
    types, text = TYPES[name], texts[0]
    if list in types:
        return None if texts == ["null"] else [item for text in texts for item in _parse_items(text)]
    if text == "null" and type(None) in types:
        return None
    if str in types or Path in types:
        return text
    return _parse_yaml(f"[{text}]" if tuple in types and not text.startswith("[") else text)


def _parse_items(text: str) -> list[Any]:
    parsed = _parse_yaml(text) if text.startswith("[") else None
    return parsed if isinstance(parsed, list) else text.split(",")


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        return text


def read_values(path: Path) -> tuple[dict[str, Any], yaml.Node]:
    """Reads the values of a settings file, which are not checked, and its YAML nodes with line numbers.

    Raises:
      UserError: If it cannot be read, or is not valid YAML.
    """
    if path.exists() and not path.is_file():  # reading a named pipe would block
        raise UserError(f"{path}: is not a file")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        loader.name = str(path)
        root = loader.get_single_node()
        problems = [f"{path}:{line}: {problem}" for line, problem in sorted(_check_nodes(root))] if root else []
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


def _check_nodes(root: yaml.Node) -> Iterator[tuple[int, str]]:
    """Yields line and problem of everything that YAML allows but settings do not, and converts all keys to strings.

    The problems are duplicate keys (YAML uses the last one), keys that cannot be names, and anchors that contain
    themselves or expand to a huge number of values.
    """
    count = 0
    queue: deque[tuple[str, yaml.Node, tuple[int, ...]]] = deque([("", root, ())])
    while queue:
        name, node, ancestors = queue.popleft()
        line = node.start_mark.line + 1
        count += 1
        if id(node) in ancestors:
            yield line, f"{_shorten_name(name)}: the anchor contains itself"
            continue
        if count > MAX_NODES:
            yield line, f"{_shorten_name(name)}: more than {MAX_NODES} values after expanding anchors"
            return
        path = (*ancestors, id(node))
        prefix = f"{name}." if name else ""
        if isinstance(node, yaml.SequenceNode):
            queue += [(f"{prefix}{i}", item, path) for i, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for i, (key, value) in enumerate(node.value):
                line = key.start_mark.line + 1
                if not (isinstance(key, yaml.ScalarNode) and key.value and key.value.isprintable()):
                    section = f"{_shorten_name(name)}: " if name else ""
                    yield line, f"{section}a key must be the name of a setting"
                    continue
                if key.value in seen:
                    yield line, f"{_shorten_name(prefix + key.value)}: duplicate key"
                seen.add(key.value)
                if key.tag != MERGE_TAG:
                    text = yaml.ScalarNode("tag:yaml.org,2002:str", key.value, key.start_mark, key.end_mark)
                    node.value[i] = (text, value)
                queue.append((prefix + key.value, value, path))


def _suggest(name: str) -> str:
    """Suggests the setting that an unknown name was probably meant to be."""
    section, _, last = name.rpartition(".")
    in_section = [setting for setting in TYPES if setting.rpartition(".")[0] == section]
    full_names = {setting.rpartition(".")[2]: setting for setting in (*TYPES, *in_section)}
    close = difflib.get_close_matches(last, full_names, n=1, cutoff=0.7)
    return f"; did you mean {full_names[close[0]]}?" if close else ""


def _shorten_name(name: str) -> str:
    return shorten(name, 100)


def _format_problem(problem: Any, node: yaml.Node, path: Path, flags: set[str]) -> str:
    """Formats a pydantic error as `FILE:LINE: setting: problem, found value`, or `--setting: …` for flags."""
    field = ".".join(str(part) for part in problem["loc"])
    line = _find_line(node, problem["loc"])
    is_flag = any(field == flag or field.startswith(flag + ".") for flag in flags)
    location = "--" if is_flag else f"{path}:{line}: " if line else ""
    if problem["type"] == "extra_forbidden":
        return f"{location}{_shorten_name(field)}: unknown setting{_suggest(field)}"
    if problem["type"] == "missing":
        return f"{location or f'{path}: '}{field}: missing (required)"
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if isinstance(problem["input"], dict | BaseModel) else f", found {_format_value(problem['input'])}"
    return f"{location}{field + ': ' if field else ''}{message}{found}"


def _format_value(value: Any) -> str:
    try:
        return shorten(repr(value))
    except ValueError:  # repr() rejects integers with thousands of digits
        return "a huge number"


def _find_line(node: yaml.Node, location: Sequence[Any]) -> int | None:
    """Returns the line of a setting in the file, from 1, or None if the file does not contain it."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return None
            key, node = found[-1]  # keys from a merge (`<<`) come first, and the mapping's own keys override them
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
