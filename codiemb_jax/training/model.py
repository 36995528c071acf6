"""A model folder, whatever its format -> graph, parameters, blueprint."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import PreTrainedTokenizerFast

from codiemb_jax.config import ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.models.blueprint import (
    ENCODING,
    TOKENIZER_FILES,
    Blueprint,
    read_code_files,
    read_config_file,
    read_tokenizer_files,
)
from codiemb_jax.models.decoder import DecoderConfig
from codiemb_jax.models.encoder import Encoder, EncoderConfig
from codiemb_jax.models.families import family_of
from codiemb_jax.models.families.family import Family
from codiemb_jax.models.sentence import DENSE, read_modules
from codiemb_jax.models.weights import (
    LazyArray,
    Params,
    WeightFiles,
    check_weights,
    find_prefix,
    read_weights,
    stream_weights,
    weight_names,
)
from codiemb_jax.training.checkpoint import (
    is_checkpoint,
    restore_blueprint,
    restore_params,
    stream_params,
    stream_untrained,
)
from codiemb_jax.training.state import abstract_model, new_projection

HUB_FILES = ["*.safetensors*", "config.json", "modules.json", "*/config.json", "*.py", *TOKENIZER_FILES]
"""What is downloaded of a model: no pickled weights."""


@dataclass(frozen=True)
class ModelFolder:
    """A model as it lies on disk, checked but not loaded."""

    path: Path
    blueprint: Blueprint
    family: Family
    config: DecoderConfig | EncoderConfig
    graph: Any
    abstract: Params
    """Shape, type and sharding of each parameter."""
    stored: Mapping[str, Any]
    """How the folder says that it encodes (fields of `ModelSettings`), as far as it does.  The settings decide, but for
    the projection: that is a weight."""
    _untrained: list[str]
    """Names of the weights that an encoder does not use, as in the Hugging Face folder."""
    _dense: Path | None
    """Where a Hugging Face folder holds the projection."""

    def load(self, seed: int = 0) -> Params:
        """The parameters, each device reading its own part; `seed` is that of a new projection."""
        stored = bool(self.stored.get("projection_dim"))
        if is_checkpoint(self.path):
            wanted = {name: leaf for name, leaf in self.abstract.items() if stored or name != "projection"}
            params = restore_params(self.path, wanted)
        else:
            params = read_weights(WeightFiles(self.path), self.family.weights, self.blueprint.prefix, self.abstract)
            if self._dense:
                params["projection"] = read_weights(WeightFiles(self._dense), DENSE, "", self.abstract["projection"])
        if "projection" in self.abstract and not stored:
            params["projection"] = new_projection(self.abstract["projection"], seed)
        return params

    def stream(self) -> Params:
        """The parameters in the types in which they are stored, each read when it is asked for."""
        if is_checkpoint(self.path):
            return stream_params(self.path)
        params = stream_weights(WeightFiles(self.path), self.family.weights, self.blueprint.prefix, self.abstract)
        if self._dense:
            params["projection"] = stream_weights(WeightFiles(self._dense), DENSE, "", self.abstract["projection"])
        return params

    def stream_untrained(self) -> dict[str, LazyArray]:
        """Weights of the folder that an encoder does not use, each read when it is asked for."""
        if is_checkpoint(self.path):
            weights = stream_untrained(self.path)
            if missing := sorted(set(self._untrained) - set(weights)):
                raise UserError(f"{self.path}: the checkpoint is not whole, it lacks {', '.join(missing)}")
            return weights
        files = WeightFiles(self.path)
        return {name: files.lazy(name) for name in self._untrained}


def open_model(
    settings: ModelSettings, prompt: PromptSettings, mesh: jax.sharding.Mesh, max_tokens: int | None = None
) -> ModelFolder:
    """Opens `settings.path`: an Orbax folder of ours, a Hugging Face folder, or a hub id (downloaded).

    max_tokens: longest text that the exported model shall take; None: as many as the model has positions.
    UserError for whatever in the folder cannot be used; weights are compared with config.json before any is read.
    """
    path = find_model(settings.path)
    blueprint = read_blueprint(path)
    with _named(path):
        family = family_of(blueprint.config)
        config = family.read_config(blueprint.config)
        tokenizer = blueprint.tokenizer()
    if settings.dropout is not None:
        config = config.with_dropout(settings.dropout)
    if max_tokens and max_tokens > config.max_positions:
        raise UserError(
            f"data.query_max_tokens and data.passage_max_tokens may be at most {config.max_positions}, the positions "
            f"of the model (max_position_embeddings in {path / 'config.json'})"
        )
    if settings.attention == "causal" and family.model is Encoder:
        raise UserError(f"model.attention: causal needs a decoder; a {family.model_type} model is bidirectional")
    _check_tokenizer(path, tokenizer, config)
    stored = blueprint.encoding
    stored_dim = stored.get("projection_dim")
    if stored_dim and stored_dim != settings.projection_dim:
        raise UserError(
            f"model.projection_dim {settings.projection_dim}: {path} was trained with a projection to {stored_dim}; "
            f"set it to {stored_dim}"
        )
    graph, abstract = abstract_model(family, config, settings, mesh)
    dense = None
    if is_checkpoint(path):
        names = (weight_names(weight, blueprint.prefix, config.layers) for weight in family.weights)
        untrained = sorted(set(blueprint.dtypes).difference(*names))
    else:
        untrained = check_weights(WeightFiles(path), family.weights, blueprint.prefix, abstract, family.untrained)
        modules = read_modules(path)
        dense = modules.dense if modules else None
        if dense:
            check_weights(WeightFiles(dense), DENSE, "", abstract["projection"])
    blueprint = replace(
        blueprint,
        max_tokens=max_tokens or config.max_positions,
        encoding=settings.model_dump(include=set(ENCODING)),
        prompt=prompt.model_dump(),
    )
    return ModelFolder(path, blueprint, family, config, graph, abstract, stored, untrained, dense)


def read_blueprint(path: Path) -> Blueprint:
    """The blueprint of a checkpoint, or of a Hugging Face folder: that one knows no prompts, no longest text, and of
    its encoding what its modules.json says."""
    if is_checkpoint(path):
        return restore_blueprint(path)
    config = read_config_file(path)
    dtypes = WeightFiles(path).dtypes
    modules = read_modules(path)
    with _named(path):
        family = family_of(config)
    return Blueprint(
        config=config,
        prefix=find_prefix(dtypes, family),
        dtypes=dtypes,
        files=read_tokenizer_files(path),
        code=read_code_files(path),
        max_tokens=0,
        encoding=_direction(config) | (modules.encoding if modules else {}),
        prompt={},
    )


def _direction(config: Mapping[str, Any]) -> dict[str, str]:
    """The direction of attention of a decoder, if config.json says it; exports do."""
    causal = config.get("is_causal")
    return {"attention": "causal" if causal else "bidirectional"} if isinstance(causal, bool) else {}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts a folder's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerFast, config: DecoderConfig | EncoderConfig) -> None:
    """UserError if tokenizer and model disagree."""
    if isinstance(config, EncoderConfig) and config.first_position not in (0, (tokenizer.pad_token_id or 0) + 1):
        raise UserError(
            f"{path}: the positions of this model start after the padding id, which is "
            f"{config.first_position - 1} in config.json (pad_token_id) but {tokenizer.pad_token_id} in the tokenizer; "
            "make them agree"
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has a token with id {largest}, but the model only {config.vocab_size} embeddings "
            "(vocab_size in config.json); a special token named in tokenizer_config.json must be one of tokenizer.json"
        )


def find_model(path: str) -> Path:
    """The folder of a model: a path, or a hub id (downloaded)."""
    folder = Path(path)
    try:
        folder.exists()
    except OSError as error:
        raise UserError(f"model.path: {path} cannot be a folder: {error.strerror}") from error
    if folder.is_dir():
        steps = sorted((int(child.name) for child in folder.iterdir() if child.name.isdecimal()), reverse=True)
        if steps and is_checkpoint(folder / str(steps[0])):
            raise UserError(
                f"{folder} holds several checkpoints; give one of them, for example {folder / str(steps[0])}"
            )
        of_run = (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
        if of_run and not (folder / "config.json").is_file():
            raise UserError(f"{folder} is the folder of a run; give {folder / 'export'} or one of its checkpoints")
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"model.path: {path} is neither a folder nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(path, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"model.path: {path} is not a folder, and cannot be had from the hub: {error}") from error
