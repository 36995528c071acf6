"""Opens a model folder of either format and returns its graph, parameters and blueprint."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from pydantic import ValidationError

from codiemb_jax.checkpoints.blueprint import ENCODING, Blueprint
from codiemb_jax.checkpoints.families import Family
from codiemb_jax.checkpoints.folder import ModelFolder, prefix_errors
from codiemb_jax.checkpoints.huggingface import HUB_FILES, HuggingFaceFolder
from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint, is_checkpoint, saved_steps
from codiemb_jax.checkpoints.safetensors import LazyArray
from codiemb_jax.config import ModelSettings, PromptSettings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import local_path
from codiemb_jax.models.build import Params, abstract_model, new_projection
from codiemb_jax.models.decoder import DecoderConfig
from codiemb_jax.models.encoder import Encoder, EncoderConfig
from codiemb_jax.sharding import cpu_mesh
from codiemb_jax.text.prompts import tokenizer_errors
from codiemb_jax.text.sentence import SentencePrompts


@dataclass(frozen=True)
class PretrainedModel:
    """The model in a folder, checked but not loaded."""

    folder: ModelFolder
    blueprint: Blueprint
    config: DecoderConfig | EncoderConfig
    graph: Any
    abstract: Params
    """Shape, dtype and sharding of each parameter."""

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return jax.tree.leaves(self.abstract)[0].sharding.mesh

    @property
    def family(self) -> Family:
        return self.folder.family

    def load(self, seed: int = 0) -> Params:
        """Loads the parameters; each device reads only its own shards. `seed` initializes a new projection."""
        params = self.folder.load(self.abstract)
        if "projection" in self.abstract and "projection" not in params:
            params["projection"] = new_projection(self.abstract["projection"], seed)
        return params

    def stream(self) -> Params:
        """Returns the parameters in their stored dtypes, each read on demand."""
        return self.folder.stream(self.abstract)

    def stream_passthrough(self) -> dict[str, LazyArray]:
        """Returns the weights of the folder that the model does not use, each read on demand."""
        return self.folder.stream_passthrough()


def open_model(
    settings: ModelSettings,
    text: PromptSettings | SentencePrompts,
    mesh: jax.sharding.Mesh,
    max_tokens: int | None = None,
    folder: ModelFolder | None = None,
) -> PretrainedModel:
    """Opens a model to encode as `settings` say. Its weights are compared with config.json before any is read.

    Args:
      settings: The model settings.
      text: How to tokenize texts.
      mesh: The mesh over which to shard the parameters.
      max_tokens: Maximum number of tokens per text. Defaults to the model's number of positions.
      folder: The folder of the model. Defaults to that of `settings.path` (see `resolve_model_path`).

    Raises:
      UserError: If something in the folder cannot be used.
    """
    folder = folder or open_folder(resolve_model_path(settings.path))
    path, family, config = folder.path, folder.family, folder.model_config
    if settings.dropout is not None:
        config = config.with_dropout(settings.dropout)
    if max_tokens and max_tokens > config.max_positions:
        raise UserError(
            f"data.query_max_tokens and data.passage_max_tokens may be at most {config.max_positions}, the model's "
            f"number of positions (max_position_embeddings in {path / 'config.json'})"
        )
    if settings.attention == "causal" and family.model is Encoder:
        raise UserError(f"model.attention: causal needs a decoder; a {family.model_type} model is bidirectional")
    stored_dim = folder.stored_settings.get("projection_dim")
    if stored_dim and stored_dim != settings.projection_dim:
        raise UserError(
            f"model.projection_dim {settings.projection_dim}: {path} was trained with a projection to {stored_dim}; "
            f"set it to {stored_dim}"
        )
    graph, abstract = abstract_model(family.model, config, settings, mesh)
    in_folder = {name: leaf for name, leaf in abstract.items() if name != "projection" or stored_dim}
    folder.check(in_folder)
    blueprint = Blueprint(
        config=folder.config,
        prefix=folder.prefix,
        dtypes=folder.dtypes,
        files=folder.files,
        code=folder.code,
        max_tokens=max_tokens or config.max_positions,
        encoding=settings.model_dump(include=set(ENCODING)),
        prompt=text if isinstance(text, PromptSettings) else None,
        sentence=text if isinstance(text, SentencePrompts) else None,
    )
    _check_tokenizer(path, blueprint, config)
    return PretrainedModel(folder, blueprint, config, graph, abstract)


def open_with_stored_settings(
    folder: ModelFolder, mesh: jax.sharding.Mesh, default_text: PromptSettings | SentencePrompts, **settings: Any
) -> PretrainedModel:
    """Opens the model in a folder to encode with the settings stored there.

    Args:
      folder: The model folder.
      mesh: The mesh over which to shard the parameters.
      default_text: How to tokenize texts if the folder does not specify it.
      **settings: Fields of `ModelSettings` to use where the folder does not specify them.

    Raises:
      UserError: If something in the folder cannot be used.
    """
    try:
        model_settings = ModelSettings.model_validate({"path": str(folder.path), **settings, **folder.stored_settings})
    except ValidationError as error:
        problems = [
            f"{problem['loc'][0]}: {problem['msg']}, found {shorten(repr(problem['input']))}"
            for problem in error.errors()
        ]
        raise UserError(f"{folder.path}: invalid model settings:\n" + format_problems(problems)) from error
    return open_model(model_settings, folder.text or default_text, mesh, folder.max_tokens, folder)


def open_checkpoint(path: Path) -> PretrainedModel:
    """Opens a checkpoint with the settings it was trained with, on one CPU device, in float32."""
    return open_with_stored_settings(OrbaxCheckpoint(path), cpu_mesh(), PromptSettings(), compute_dtype="float32")


def open_folder(path: Path) -> ModelFolder:
    """Opens an Orbax checkpoint or a Hugging Face folder."""
    return OrbaxCheckpoint(path) if is_checkpoint(path) else HuggingFaceFolder(path)


def _check_tokenizer(path: Path, blueprint: Blueprint, config: DecoderConfig | EncoderConfig) -> None:
    """Raises `UserError` if the tokenizer does not match the model."""
    try:
        tokenizer = blueprint.tokenizer()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if isinstance(config, EncoderConfig) and config.first_position not in (0, (tokenizer.pad_token_id or 0) + 1):
        raise UserError(
            f"{path}: positions of this model start after the padding id, which is "
            f"{config.first_position - 1} in config.json (pad_token_id) but {tokenizer.pad_token_id} in the tokenizer; "
            "they must be equal"
        )
    with prefix_errors(path), tokenizer_errors():
        added = tokenizer.backend_tokenizer.encode("").ids  # the post-processor may add ids outside the vocabulary
    largest = max([*tokenizer.get_vocab().values(), *added], default=0)
    if largest >= config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has a token with id {largest}, but the model has only "
            f"{config.vocab_size} embeddings (vocab_size in config.json); "
            "special tokens in tokenizer_config.json must exist in tokenizer.json"
        )


def resolve_model_path(path: str) -> Path:
    """Returns the folder of a model, given a model folder, the folder of a run (its export) or a hub id (a download).

    Raises:
      UserError: If `path` is none of these or cannot be downloaded.
    """
    try:
        folder = local_path(path)
    except ValueError as error:
        raise UserError(f"{shorten(path)}: {error}") from error
    try:
        exists = folder.exists()
    except OSError as error:
        raise UserError(f"{shorten(path)} is not a valid path: {error.strerror}") from error
    if folder.is_dir():
        steps = saved_steps(folder)
        if steps and is_checkpoint(folder / str(steps[-1])):
            raise UserError(
                f"{folder} is a folder of checkpoints; give one of them, for example {folder / str(steps[-1])}"
            )
        is_run = (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
        if is_run and not (folder / "config.json").is_file():
            if not (folder / "export").is_dir():
                raise UserError(f"{folder} is a run without an export; give one of its checkpoints")
            return folder / "export"
        return folder
    if exists or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"{path} is neither a folder nor a hub id (owner/name)")
    return _download(path)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow, and not needed for local folders
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = shorten(" ".join(str(error).split()), 200)
        raise UserError(
            f"{name}: no such folder in {Path.cwd()}, and the model cannot be downloaded from the hub: {reason}"
        ) from error
