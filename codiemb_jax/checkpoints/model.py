"""Opens a model folder of either format and returns its graph, parameters and blueprint."""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
from etils import epath
from pydantic import ValidationError

from codiemb_jax.cache import cache_folder
from codiemb_jax.checkpoints.blueprint import ENCODING, Blueprint
from codiemb_jax.checkpoints.families import Family
from codiemb_jax.checkpoints.folder import ModelFolder, prefix_errors
from codiemb_jax.checkpoints.huggingface import HUB_FILES, HuggingFaceFolder
from codiemb_jax.checkpoints.orbax import REQUIRED_ITEMS, OrbaxCheckpoint, is_checkpoint
from codiemb_jax.checkpoints.run_checkpoints import saved_steps
from codiemb_jax.checkpoints.safetensors import LazyArray
from codiemb_jax.config import ModelSettings, PromptSettings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import local_path
from codiemb_jax.models.build import Params, abstract_model, new_projection
from codiemb_jax.models.decoder import DecoderConfig
from codiemb_jax.models.encoder import Encoder, EncoderConfig
from codiemb_jax.remote import Location, fetch, is_remote, list_files, remote_path
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
    config = adapt_config(config, family, settings, max_tokens, path / "config.json")
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


def adapt_config(
    config: DecoderConfig | EncoderConfig,
    family: Family,
    settings: ModelSettings,
    max_tokens: int | None,
    path: Location,
) -> DecoderConfig | EncoderConfig:
    """Returns the config of a model with the dropout of `settings`, which it checks.

    Args:
      config: The config of the model.
      family: Its family.
      settings: The model settings.
      max_tokens: Maximum number of tokens per text, if there is one.
      path: The path of its config.json, for messages.

    Raises:
      UserError: If the model cannot be used with the settings.
    """
    if max_tokens and max_tokens > config.max_positions:
        raise UserError(
            f"data.query_max_tokens and data.passage_max_tokens may be at most {config.max_positions}, the model's "
            f"number of positions (max_position_embeddings in {path})"
        )
    if settings.attention == "causal" and family.model is Encoder:
        raise UserError(f"model.attention: causal needs a decoder; a {family.model_type} model is bidirectional")
    return config if settings.dropout is None else config.with_dropout(settings.dropout)


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

    Copies a remote folder into the cache.

    Raises:
      UserError: If `path` is none of these or cannot be downloaded.
    """
    try:
        folder = _fetch(remote_path(path)) if is_remote(path) else local_path(path)
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


def _fetch(path: epath.Path) -> Path:
    """Copies what is needed of a remote model, checkpoint or run."""
    files = list_files(path)
    if not files:
        raise UserError(f"{path}: no such folder, or it is empty")
    if "config.yaml" in files and "config.json" not in files:  # a run
        path, files = path / "export", {
            name.removeprefix("export/"): file for name, file in files.items() if name.startswith("export/")
        }  # fmt: skip
        if not files:
            raise UserError(f"{path.parent} is a run without an export; give one of its checkpoints")
    if REQUIRED_ITEMS[0] in files:
        if missing := [name for name in REQUIRED_ITEMS if not any(file.startswith(name) for file in files)]:
            raise UserError(f"{path}: the checkpoint is incomplete ({', '.join(missing)} missing)")
        wanted = {name: file for name, file in files.items() if not name.startswith("optimizer/")}
    else:
        wanted = {name: file for name, file in files.items() if _is_model_file(name)}
        if not wanted:
            checkpoints = [name.rpartition("/")[0] for name in files if name.endswith(f"/{REQUIRED_ITEMS[0]}")]
            newest = max(checkpoints, key=lambda name: (len(name), name), default=None)  # names are numbers
            hint = f"; give a checkpoint, for example {path / newest}" if newest else ""
            raise UserError(f"{path}: contains no model{hint}")
    return fetch(path, wanted, cache_folder())


def _is_model_file(name: str) -> bool:
    """Whether a file belongs to a Hugging Face folder, or to one of its modules, such as 1_Pooling/config.json."""
    *folders, file = name.split("/")
    is_module = len(folders) == 1 and re.fullmatch(r"\d+_\w+", folders[0]) is not None
    return (not folders or is_module) and any(fnmatch(file, pattern) for pattern in HUB_FILES)


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
