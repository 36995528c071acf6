"""All of a model folder but the values of its weights: enough to build the model and to write it again."""

import base64
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from codiemb_jax.errors import UserError
from codiemb_jax.files import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model",
    "chat_template.jinja",
)  # fmt: skip

ENCODING = ("attention", "pooling", "normalize", "projection_dim")
"""Settings of a model without which its vectors could not be made again."""


@dataclass(frozen=True)
class Blueprint:
    """Kept inside every Orbax checkpoint, so that a checkpoint alone can be exported."""

    config: dict[str, Any]
    """config.json as it came."""
    prefix: str
    """What stands before the base model's weight names in the checkpoint: the family's prefix, or nothing."""
    dtypes: dict[str, str]
    """Type of each weight as it came, by its full name in the checkpoint (safetensors' spelling)."""
    files: dict[str, str]
    """The tokenizer's files, base64."""
    code: dict[str, str]
    """Python files of the checkpoint, base64: carried along for those who want them, never run."""
    max_tokens: int
    """Longest text in tokens."""
    encoding: dict[str, Any]
    """How the model encodes: the fields of `ModelSettings` that `ENCODING` names."""
    prompt: dict[str, str]
    """The fields of `PromptSettings`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Blueprint":
        """UserError for what another version of this project wrote."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise UserError("was written by another version of codiemb_jax; convert the model anew") from error

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, without any code of the checkpoint being looked at."""
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), self.files)
            try:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
            except Exception as error:  # the tokenizers library raises plain Exception on a malformed file
                raise UserError(f"tokenizer.json, tokenizer_config.json: cannot be read: {error}") from error
        if not isinstance(longest := tokenizer.model_max_length, int | float):
            raise UserError(f"tokenizer_config.json: model_max_length: expected a number, found {longest!r}")
        return tokenizer


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Writes files that were kept as base64."""
    for name, content in files.items():
        (folder / name).write_bytes(base64.b64decode(content))


def _read_files(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: base64.b64encode(path.read_bytes()).decode() for path in paths if path.is_file()}


def read_code_files(folder: Path) -> dict[str, str]:
    """The Python files of a Hugging Face folder, base64."""
    return _read_files(sorted(folder.glob("*.py")))


def read_tokenizer_files(folder: Path) -> dict[str, str]:
    """The tokenizer's files of a Hugging Face folder, base64."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: tokenizer.json is missing; save a fast tokenizer there "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER))"
        )
    return _read_files(folder / name for name in TOKENIZER_FILES)


def read_config_file(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: config.json is missing; give a folder in Hugging Face format")
    return read_json(path, dict)
