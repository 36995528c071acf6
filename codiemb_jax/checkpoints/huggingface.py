"""Reads model folders in Hugging Face format."""

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from codiemb_jax.checkpoints.blueprint import TOKENIZER_FILES
from codiemb_jax.checkpoints.folder import ModelFolder
from codiemb_jax.checkpoints.safetensors import (
    LazyArray,
    WeightFiles,
    check_weights,
    find_prefix,
    passthrough_names,
    read_weights,
    stream_weights,
)
from codiemb_jax.checkpoints.sentence_transformers import DENSE, read_modules, read_prompts
from codiemb_jax.errors import UserError
from codiemb_jax.files import read_json
from codiemb_jax.models.build import Params

HUB_FILES = ["*.safetensors*", "*.json", "*.py", *TOKENIZER_FILES]
"""Files to download from the hub; no pickled weights."""


class HuggingFaceFolder(ModelFolder):
    """config.json, a tokenizer and safetensors, optionally with the files of sentence-transformers."""

    def __init__(self, path: Path):
        """Opens a folder; reads everything but the weights.

        Raises:
          UserError: If a file is missing or invalid.
        """
        self.path = path
        if not (path / "config.json").is_file():
            raise UserError(f"{path}: config.json is missing; give a folder in Hugging Face format")
        self.config = read_json(path / "config.json", dict)
        self._weights = WeightFiles(path)
        self.dtypes = self._weights.dtypes
        modules = read_modules(path)
        self._read_config()
        self.prefix = find_prefix(self.dtypes, self.family)
        self.files = _read_tokenizer_files(path)
        self.code = _read_files(path, sorted(file.name for file in path.glob("*.py")))
        self._dense = WeightFiles(modules.dense) if modules and modules.dense else None
        self.stored_settings = self._read_attention(modules is not None) | (modules.encoding if modules else {})
        text, max_tokens = read_prompts(path, modules.include_prompt if modules else True)
        self.text = text if modules else None
        self.max_tokens = min(max_tokens or self.model_config.max_positions, self.model_config.max_positions)
        self._passthrough = passthrough_names(self.dtypes, self.family, self.prefix, self.model_config.layers)

    def _read_attention(self, has_modules: bool) -> dict[str, Any]:
        """Returns the attention in config.json, if any; with modules.json, it defaults to that of the family."""
        causal = self.config.get("is_causal", self.family.causal if has_modules else None)
        return {"attention": "causal" if causal else "bidirectional"} if isinstance(causal, bool) else {}

    def check(self, abstract: Params) -> None:
        check_weights(self._weights, self.family.weights, self.prefix, abstract, self._passthrough)
        if self._dense:
            check_weights(self._dense, DENSE, "", abstract["projection"])

    def load(self, abstract: Params) -> Params:
        params = read_weights(self._weights, self.family.weights, self.prefix, abstract)
        if self._dense:
            params["projection"] = read_weights(self._dense, DENSE, "", abstract["projection"])
        return params

    def stream(self, abstract: Params) -> Params:
        params = stream_weights(self._weights, self.family.weights, self.prefix, abstract)
        if self._dense:
            params["projection"] = stream_weights(self._dense, DENSE, "", abstract["projection"])
        return params

    def stream_passthrough(self) -> dict[str, LazyArray]:
        return {name: self._weights.lazy(name) for name in self._passthrough}


def _read_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Reads files that are copied into checkpoints and exports.

    Links out of the folder are refused, because they could leak other files of the user.
    """
    files = {}
    own = folder.resolve()
    # In the cache of huggingface_hub, the files below snapshots are links to blobs.
    allowed = [own, *(parent.parent / "blobs" for parent in own.parents if parent.name == "snapshots")]
    for path in (folder / name for name in names):
        if not path.is_file():
            continue
        if not any(path.resolve().is_relative_to(parent) for parent in allowed):
            raise UserError(f"{path}: is a link to a file outside the folder; replace it with a copy")
        try:
            files[path.name] = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return files


def _read_tokenizer_files(folder: Path) -> dict[str, str]:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: tokenizer.json is missing; save a fast tokenizer there "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(FOLDER))"
        )
    return _read_files(folder, TOKENIZER_FILES)
