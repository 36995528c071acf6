"""A model folder, whatever its format -> graph, parameters, blueprint."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from codiemb_jax.config import ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.models.blueprint import (
    TOKENIZER_FILES,
    Blueprint,
    read_code_files,
    read_config_file,
    read_tokenizer_files,
)
from codiemb_jax.models.decoder import DecoderConfig
from codiemb_jax.models.families import family_of
from codiemb_jax.models.families.family import Family
from codiemb_jax.models.weights import Params, WeightFiles, check_weights, find_prefix, read_weights
from codiemb_jax.training.checkpoint import is_checkpoint, restore_blueprint, restore_params, restore_untrained
from codiemb_jax.training.state import abstract_model


@dataclass(frozen=True)
class ModelFolder:
    """A model as it lies on disk, checked but not loaded."""

    path: Path
    blueprint: Blueprint
    family: Family
    config: DecoderConfig
    graph: Any
    abstract: Params
    """Shape, type and sharding of each parameter."""
    untrained: list[str]
    """Names in a Hugging Face folder of the weights that an encoder does not use."""

    def load(self) -> Params:
        """The parameters, each device reading its own part."""
        if is_checkpoint(self.path):
            return restore_params(self.path, self.abstract)
        with WeightFiles(self.path) as files:
            return read_weights(files, self.family, self.blueprint.prefix, self.abstract)

    def load_untrained(self) -> dict[str, np.ndarray]:
        """Weights of the folder that an encoder does not use."""
        if is_checkpoint(self.path):
            return restore_untrained(self.path)
        with WeightFiles(self.path) as files:
            return {name: files.read(name) for name in self.untrained}


def open_model(
    settings: ModelSettings, prompt: PromptSettings, mesh: jax.sharding.Mesh, max_tokens: int | None = None
) -> ModelFolder:
    """Opens `settings.path`: an Orbax folder of ours, a Hugging Face folder, or a hub id (downloaded).

    max_tokens: longest text that the exported model shall take; None: as many as the model has positions.
    UserError for whatever in the folder cannot be used; weights are compared with config.json before any is read.
    """
    path = _find(settings.path)
    blueprint = restore_blueprint(path) if is_checkpoint(path) else _read_blueprint(path)
    family = family_of(blueprint.config)
    config = family.read_config(blueprint.config)
    if max_tokens and max_tokens > config.max_positions:
        raise UserError(
            f"data.query_max_tokens and data.passage_max_tokens may be at most {config.max_positions}, the positions "
            f"of the model (max_position_embeddings in {path / 'config.json'})"
        )
    largest = max(blueprint.tokenizer().get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has a token with id {largest}, but the model only {config.vocab_size} embeddings "
            "(vocab_size in config.json); a special token named in tokenizer_config.json must be one of tokenizer.json"
        )
    graph, abstract = abstract_model(config, settings, mesh)
    untrained: list[str] = []
    if not is_checkpoint(path):
        with WeightFiles(path) as files:
            untrained = check_weights(files, family, blueprint.prefix, abstract)
    blueprint = replace(
        blueprint,
        max_tokens=max_tokens or config.max_positions,
        attention=settings.attention,
        prompt=prompt.model_dump(),
    )
    return ModelFolder(path, blueprint, family, config, graph, abstract, untrained)


def _read_blueprint(folder: Path) -> Blueprint:
    """The blueprint of a Hugging Face folder; how it encodes is for the settings to say."""
    with WeightFiles(folder) as files:
        dtypes = files.dtypes()
    return Blueprint(
        config=read_config_file(folder),
        prefix=find_prefix(dtypes),
        dtypes=dtypes,
        files=read_tokenizer_files(folder),
        code=read_code_files(folder),
        max_tokens=0,
        attention="",
        prompt={},
    )


def _find(path: str) -> Path:
    folder = Path(path)
    if folder.is_dir():
        steps = sorted((int(child.name) for child in folder.iterdir() if child.name.isdigit()), reverse=True)
        if steps and is_checkpoint(folder / str(steps[0])):
            raise UserError(
                f"{folder} holds several checkpoints; give one of them, for example {folder / str(steps[0])}"
            )
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"model.path: {path} is neither a folder nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors*", "config.json", "*.py", *TOKENIZER_FILES]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"model.path: {path} is not a folder, and cannot be had from the hub: {error}") from error
