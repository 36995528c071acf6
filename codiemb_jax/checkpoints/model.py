"""A model folder, whatever its kind -> graph, parameters, blueprint."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from pydantic import ValidationError

from codiemb_jax.checkpoints.blueprint import ENCODING, Blueprint
from codiemb_jax.checkpoints.families import Family
from codiemb_jax.checkpoints.folder import ModelFolder, naming
from codiemb_jax.checkpoints.huggingface import HUB_FILES, HuggingFaceFolder
from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint, is_checkpoint, steps_of
from codiemb_jax.checkpoints.safetensors import LazyArray
from codiemb_jax.config import ModelSettings, PromptSettings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.models.build import Params, abstract_model, new_projection
from codiemb_jax.models.decoder import DecoderConfig
from codiemb_jax.models.encoder import Encoder, EncoderConfig
from codiemb_jax.sharding import cpu_mesh
from codiemb_jax.text.prompts import tokenizing
from codiemb_jax.text.sentence import SentencePrompts


@dataclass(frozen=True)
class PretrainedModel:
    """A model that a folder holds, checked but not loaded."""

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
        """The parameters, each device reading its own part; `seed` is that of a new projection."""
        params = self.folder.load(self.abstract)
        if "projection" in self.abstract and "projection" not in params:
            params["projection"] = new_projection(self.abstract["projection"], seed)
        return params

    def stream(self) -> Params:
        """The parameters in the dtypes in which they are stored, each read when it is asked for."""
        return self.folder.stream(self.abstract)

    def stream_passthrough(self) -> dict[str, LazyArray]:
        """Weights of the folder that an encoder does not use, each read when it is asked for."""
        return self.folder.stream_passthrough()


def open_model(
    settings: ModelSettings,
    text: PromptSettings | SentencePrompts,
    mesh: jax.sharding.Mesh,
    max_tokens: int | None = None,
    folder: ModelFolder | None = None,
) -> PretrainedModel:
    """Opens the model in `folder`, by default that of `settings.path` (see `locate`), to encode as the settings say.

    text: how texts become tokens.  max_tokens: longest text; None: as many as the model has positions.
    Weights are compared with config.json before any is read.

    Raises:
      UserError: something in the folder cannot be used.
    """
    folder = folder or open_folder(locate(settings.path))
    path, family, config = folder.path, folder.family, folder.model_config
    if settings.dropout is not None:
        config = config.with_dropout(settings.dropout)
    if max_tokens and max_tokens > config.max_positions:
        raise UserError(
            f"data.query_max_tokens and data.passage_max_tokens may be at most {config.max_positions}, the positions "
            f"of the model (max_position_embeddings in {path / 'config.json'})"
        )
    if settings.attention == "causal" and family.model is Encoder:
        raise UserError(f"model.attention: causal needs a decoder; a {family.model_type} model is bidirectional")
    stored_dim = folder.stored.get("projection_dim")
    if stored_dim and stored_dim != settings.projection_dim:
        raise UserError(
            f"model.projection_dim {settings.projection_dim}: {path} was trained with a projection to {stored_dim}; "
            f"set it to {stored_dim}"
        )
    graph, abstract = abstract_model(family.model, config, settings, mesh)
    held = {name: leaf for name, leaf in abstract.items() if name != "projection" or stored_dim}
    folder.check(held)
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


def open_as_stored(
    folder: ModelFolder, mesh: jax.sharding.Mesh, otherwise: PromptSettings | SentencePrompts, **settings: Any
) -> PretrainedModel:
    """Opens the model in a folder to encode as the folder says; texts become tokens as `otherwise` says where it does
    not.  `settings` are fields of `ModelSettings`, and defaults for what the folder does not say.

    Raises:
      UserError: something in the folder cannot be used.
    """
    try:
        model_settings = ModelSettings.model_validate({"path": str(folder.path), **settings, **folder.stored})
    except ValidationError as error:
        problems = [
            f"{problem['loc'][0]}: {problem['msg']}, found {shorten(repr(problem['input']))}"
            for problem in error.errors()
        ]
        raise UserError(f"{folder.path}: cannot be used:\n" + format_problems(problems)) from error
    return open_model(model_settings, folder.text or otherwise, mesh, folder.max_tokens, folder)


def open_checkpoint(path: Path) -> PretrainedModel:
    """A checkpoint with the attention, prompts and lengths that it was trained with, on one CPU device, in float32."""
    return open_as_stored(OrbaxCheckpoint(path), cpu_mesh(), PromptSettings(), compute_dtype="float32")


def open_folder(path: Path) -> ModelFolder:
    """A folder of either kind."""
    return OrbaxCheckpoint(path) if is_checkpoint(path) else HuggingFaceFolder(path)


def _check_tokenizer(path: Path, blueprint: Blueprint, config: DecoderConfig | EncoderConfig) -> None:
    """UserError if tokenizer and model disagree."""
    try:
        tokenizer = blueprint.tokenizer()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if isinstance(config, EncoderConfig) and config.first_position not in (0, (tokenizer.pad_token_id or 0) + 1):
        raise UserError(
            f"{path}: the positions of this model start after the padding id, which is "
            f"{config.first_position - 1} in config.json (pad_token_id) but {tokenizer.pad_token_id} in the tokenizer; "
            "make them agree"
        )
    with naming(path), tokenizing():
        added = tokenizer.backend_tokenizer.encode("").ids  # by the post-processor, which has ids of its own
    largest = max([*tokenizer.get_vocab().values(), *added], default=0)
    if largest >= config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has a token with id {largest}, but the model only {config.vocab_size} embeddings "
            "(vocab_size in config.json); a special token named in tokenizer_config.json must be one of tokenizer.json"
        )


def locate(path: str) -> Path:
    """The folder of a model: a model folder, the export of a run's folder, or a hub id's download.

    Raises:
      UserError: there is none.
    """
    folder = Path(path)
    try:
        exists = folder.exists()
    except OSError as error:
        raise UserError(f"{shorten(path)} cannot be a folder: {error.strerror}") from error
    if folder.is_dir():
        steps = steps_of(folder)
        if steps and is_checkpoint(folder / str(steps[-1])):
            raise UserError(
                f"{folder} holds several checkpoints; give one of them, for example {folder / str(steps[-1])}"
            )
        of_run = (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
        if of_run and not (folder / "config.json").is_file():
            if not (folder / "export").is_dir():
                raise UserError(f"{folder} is the folder of a run that has no export; give one of its checkpoints")
            return folder / "export"
        return folder
    if exists or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise UserError(f"{path} is neither a folder nor a hub id (owner/name)")
    return _download(path)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download  # not needed for a folder
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise UserError(f"{name} is not a folder, and cannot be downloaded from the hub: {error}") from error
