"""All of a model folder but the values of its weights: enough to build the model and to write it again."""

import base64
import binascii
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from transformers import PreTrainedTokenizerFast

from codiemb_jax.checkpoints.safetensors import NUMPY_TYPES
from codiemb_jax.config import ModelSettings, Positive, PromptSettings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import is_bare_name, is_unicode
from codiemb_jax.text.prompts import tokenizing
from codiemb_jax.text.sentence import SentencePrompts

VERSION: Literal[2] = 2
"""Raised when what a blueprint holds changes."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model",
    "chat_template.jinja",
)  # fmt: skip

ENCODING = ("attention", "pooling", "normalize", "projection_dim")
"""Settings of a model without which its vectors could not be made again."""


def _tokenizer_file(name: str) -> str:
    if name not in TOKENIZER_FILES:
        raise ValueError(f"is none of a tokenizer's files, {', '.join(TOKENIZER_FILES)}")
    return name


def _code_file(name: str) -> str:
    if not is_bare_name(name) or not name.endswith(".py"):
        raise ValueError("is not the name of a Python file in this folder")
    return name


def _dtype(name: str) -> str:
    if name not in NUMPY_TYPES:
        raise ValueError(f"is none of {', '.join(NUMPY_TYPES)}")
    return name


def _base64(content: str) -> str:
    try:
        base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise ValueError("is not base64") from error
    return content


Content = Annotated[str, AfterValidator(_base64)]
EncodingFields = {name: ModelSettings.model_fields[name] for name in ENCODING}


class Blueprint(BaseModel):
    """Kept inside every Orbax checkpoint, so that a checkpoint alone can be exported."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = VERSION
    config: dict[str, Any]
    """config.json as it came."""
    prefix: str
    """What stands before the base model's weight names in the folder: the family's prefix, or nothing."""
    dtypes: dict[str, Annotated[str, AfterValidator(_dtype)]]
    """Type of each weight as it came, by its full name in the folder (safetensors' spelling)."""
    files: dict[Annotated[str, AfterValidator(_tokenizer_file)], Content]
    """The tokenizer's files, base64."""
    code: dict[Annotated[str, AfterValidator(_code_file)], Content]
    """Python files of the folder, base64: carried along for those who want them, never run."""
    max_tokens: Positive
    """Longest text in tokens."""
    encoding: dict[str, Any]
    """How the model encodes: the fields of `ModelSettings` that `ENCODING` names."""
    prompt: PromptSettings | None
    """How training makes tokens of texts; None: as `sentence` says."""
    sentence: SentencePrompts | None
    """How sentence-transformers makes tokens of texts, in a folder that it describes; None: as `prompt` says."""

    @model_validator(mode="after")
    def _consistent(self) -> "Blueprint":
        if (self.prompt is None) == (self.sentence is None):
            raise ValueError("exactly one of prompt and sentence must be null")
        if "tokenizer.json" not in self.files:
            raise ValueError("files must hold tokenizer.json")
        if set(self.encoding) != set(ENCODING):
            raise ValueError(f"encoding must hold {', '.join(ENCODING)} and nothing else")
        ModelSettings.model_validate({"path": "-", **self.encoding})
        return self

    @classmethod
    def from_json(cls, fields: Any) -> "Blueprint":
        """
        Raises:
          UserError: another version of this project wrote it, or a field cannot be used.
        """
        if not isinstance(fields, Mapping) or fields.get("version") != VERSION:
            raise UserError("was written by another version of codiemb_jax")
        if not is_unicode(fields):
            raise UserError("the blueprint holds half a surrogate pair (\\ud800 to \\udfff)")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}, found "
                f"{shorten(repr(problem['input']))}"
                for problem in error.errors()
            ]
            raise UserError("the blueprint cannot be used:\n" + format_problems(problems)) from error

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; no code of the folder is looked at.

        Raises:
          UserError: its files cannot be used.
        """
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), self.files)
            with tokenizing():
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if not isinstance(longest := tokenizer.model_max_length, int | float):
            raise UserError(f"tokenizer_config.json: model_max_length: expected a number, found {longest!r}")
        return tokenizer


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Writes files that were kept as base64."""
    for name, content in files.items():
        (folder / name).write_bytes(base64.b64decode(content))
