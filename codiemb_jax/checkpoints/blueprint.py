"""Everything in a model folder except the weights: enough to build the model and to export it."""

import base64
import binascii
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from transformers import PreTrainedTokenizerFast

from codiemb_jax.checkpoints.safetensors import NUMPY_DTYPES
from codiemb_jax.config import ModelSettings, PositiveInt, PromptSettings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import is_bare_name, is_unicode
from codiemb_jax.text.prompts import tokenizer_errors
from codiemb_jax.text.sentence import SentencePrompts

VERSION: Literal[2] = 2
"""Increased when the fields of a blueprint change."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model",
    "chat_template.jinja",
)  # fmt: skip

ENCODING = ("attention", "pooling", "normalize", "projection_dim")
"""Model settings on which the embeddings depend."""


def _tokenizer_file(name: str) -> str:
    if name not in TOKENIZER_FILES:
        raise ValueError(f"is not a tokenizer file; expected one of {', '.join(TOKENIZER_FILES)}")
    return name


def _code_file(name: str) -> str:
    if not is_bare_name(name) or not name.endswith(".py"):
        raise ValueError("is not the name of a Python file in this folder")
    return name


def _dtype(name: str) -> str:
    if name not in NUMPY_DTYPES:
        raise ValueError(f"is not one of {', '.join(NUMPY_DTYPES)}")
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
    """Stored in every Orbax checkpoint, so that a checkpoint can be exported on its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = VERSION
    config: dict[str, Any]
    """The original config.json."""
    prefix: str
    """Prefix of the base model's weight names in the folder: that of the family, or empty."""
    dtypes: dict[str, Annotated[str, AfterValidator(_dtype)]]
    """Original dtype of each weight as safetensors spells it, by its full name in the folder."""
    files: dict[Annotated[str, AfterValidator(_tokenizer_file)], Content]
    """The tokenizer files, base64."""
    code: dict[Annotated[str, AfterValidator(_code_file)], Content]
    """Python files of the folder, base64. They are passed through and never run."""
    max_tokens: PositiveInt
    """Maximum number of tokens per text."""
    encoding: dict[str, Any]
    """The fields of `ModelSettings` in `ENCODING`."""
    prompt: PromptSettings | None
    """How training tokenizes texts; None if `sentence` applies."""
    sentence: SentencePrompts | None
    """How sentence-transformers tokenizes texts in a folder with its files; None if `prompt` applies."""

    @model_validator(mode="after")
    def _consistent(self) -> "Blueprint":
        if (self.prompt is None) == (self.sentence is None):
            raise ValueError("exactly one of prompt and sentence must be null")
        if "tokenizer.json" not in self.files:
            raise ValueError("files must contain tokenizer.json")
        if set(self.encoding) != set(ENCODING):
            raise ValueError(f"encoding must contain exactly {', '.join(ENCODING)}")
        ModelSettings.model_validate({"path": "-", **self.encoding})
        return self

    @classmethod
    def from_json(cls, fields: Any) -> "Blueprint":
        """Validates the fields of a blueprint.

        Raises:
          UserError: If it was written by another version of this project, or a field is invalid.
        """
        if not isinstance(fields, Mapping) or fields.get("version") != VERSION:
            raise UserError("was written by another version of codiemb_jax")
        if not is_unicode(fields):
            raise UserError("the blueprint contains an unpaired surrogate (\\ud800 to \\udfff)")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}, found "
                f"{shorten(repr(problem['input']))}"
                for problem in error.errors()
            ]
            raise UserError("invalid blueprint:\n" + format_problems(problems)) from error

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Loads the tokenizer, without running any code of the folder.

        Raises:
          UserError: If its files are invalid.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_files(Path(folder), self.files)
                with tokenizer_errors("tokenizer.json or tokenizer_config.json"):
                    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        except OSError as error:
            raise UserError(
                f"temporary files cannot be written ({error.strerror or error}); set TMPDIR to a folder with more space"
            ) from error
        if not isinstance(max_length := tokenizer.model_max_length, int | float):
            raise UserError(f"tokenizer_config.json: model_max_length: expected a number, found {max_length!r}")
        return tokenizer


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Writes files stored as base64."""
    for name, content in files.items():
        (folder / name).write_bytes(base64.b64decode(content))
