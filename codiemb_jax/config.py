"""Every setting of a run: typed, documented, validated.  Unknown keys are errors.

A run's settings are a YAML file plus flags (`--optimizer.learning_rate 1e-5`); a flag wins over the file.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from codiemb_jax.errors import UserError, listed


def _path(value: Any) -> Any:
    if value in ("", None):
        raise ValueError("a path must not be empty; for no path at all give []")
    return Path(value).expanduser() if isinstance(value, str) else value


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Paths = list[Annotated[Path, BeforeValidator(_path)]]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelSettings(Section):
    path: Annotated[str, Field(min_length=1)]
    """Folder in Hugging Face format, an Orbax folder of this project, or a hub id."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a token sees its whole text or only what stands before it."""
    pooling: Literal["mean", "weighted_mean", "cls", "last_token"] = "mean"
    """How a text's tokens become one vector.  The means leave the prompt out; weighted_mean weighs the content's tokens
    1, 2, 3 …; cls and last_token take the first or last of all tokens."""
    normalize: bool = True
    """Give vectors of length 1.  The objectives compare directions either way."""
    projection_dim: Annotated[int, Field(gt=0, le=65536)] | None = None
    """Dimension of a learned linear layer on the vectors; null: none."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout in training, for all of the model's dropouts; null: each as config.json says."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matrix products.  On a CPU the default is float32."""
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    """Type of the master weights and of the optimizer's moments."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again: nothing, all but the matrix products, or all of a layer."""
    attention_backend: Literal["auto", "xla"] = "auto"
    """Which kernel computes attention."""


class PromptSettings(Section):
    begin: str = ""
    """Literal special tokens before every text; none are added otherwise."""
    query: str = "Instruction: {instruction} Query: "
    """Before a query with an instruction; left out when the example has none."""
    passage: str = ""
    """Before an IR passage."""
    end: str = ""
    """Literal special tokens after every text; truncation keeps them."""
    default_instruction: str = "Given a search query, retrieve passages that answer the question"
    """Instruction of the exported query prompt."""

    @model_validator(mode="after")
    def _placeholder(self) -> "PromptSettings":
        if self.query and self.query.count("{instruction}") != 1:
            raise ValueError("query must hold the placeholder {instruction} exactly once")
        return self


class DataSettings(Section):
    ir: Paths = []
    """Retrieval data: .json/.jsonl files or folders of them; each file is one data set."""
    sts: Paths = []
    """Similarity data, likewise."""
    sampler: Literal["dynamic", "single", "mixed"] = "dynamic"
    """dynamic: each task has its own batch size; single: one batch size for both; mixed: likewise, but each device
    takes its part of a step from a data set of its own and compares only what it holds (an ablation)."""
    ir_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of retrieval steps, kept at every step count; null: as the batches of the data sets fall.  An epoch has as
    many steps either way: one task's data are then seen more often, the other's less."""
    ir_global_batch_size: Positive = 224
    """Queries in a retrieval step, over all devices."""
    sts_global_batch_size: Positive = 256
    """Pairs in a similarity step, over all devices."""
    positives_per_query: Positive = 2
    """Positives drawn for each query."""
    negatives_per_query: Annotated[int, Field(ge=0)] = 4
    """Hard negatives drawn for each query."""
    query_max_tokens: Positive = 1024
    """Longest query in tokens, prompt and special tokens included."""
    passage_max_tokens: Positive = 1024
    """Longest passage, likewise."""

    @model_validator(mode="after")
    def _consistent(self) -> "DataSettings":
        if not self.ir and not self.sts:
            raise ValueError("give at least one path under data.ir or data.sts")
        alike = self.ir_global_batch_size == self.sts_global_batch_size
        if self.sampler != "dynamic" and self.ir and self.sts and not alike:
            raise ValueError(
                f"sampler: {self.sampler} has one batch size: set ir_global_batch_size and sts_global_batch_size alike"
            )
        if self.ir_share is not None and not (self.ir and self.sts):
            raise ValueError("ir_share needs data of both tasks: give paths under data.ir and data.sts")
        if self.ir_share is not None and self.sampler == "mixed":
            raise ValueError("ir_share needs steps of one task each: set sampler to dynamic or single")
        return self


class ObjectiveSettings(Section):
    ir: Literal["info_nce"] = "info_nce"
    """Objective of retrieval steps."""
    sts: Literal["codi"] = "codi"
    """Objective of similarity steps: mid-layer InfoNCE, Pearson, rank KL and PRO, weighted."""
    temperature: AboveZero = 0.02
    """Temperature of both InfoNCE losses."""
    ir_pool_size: Positive | None = None
    """Queries compared with each other; null: the whole global batch."""
    sts_list_size: Positive | None = 32
    """Pairs ranked with each other; null: the whole global batch."""
    list_temperature: AboveZero = 0.05
    """Temperature of rank KL and PRO."""
    pearson_weight: NonNegative = 2.0
    """Weight of the Pearson loss."""
    rank_kl_weight: NonNegative = 5.0
    """Weight of the rank KL loss."""
    pro_weight: NonNegative = 0.5
    """Weight of the PRO loss."""
    mid_info_nce_weight: NonNegative = 1.0
    """Weight of InfoNCE on the middle layer; 0: off."""
    mid_info_nce_threshold: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Pairs with at least this score are positives of the middle layer's InfoNCE."""


class OptimizerSettings(Section):
    learning_rate: NonNegative = 4.0e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of all steps (rounded up) over which the rate rises from 0."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Overrides warmup_ratio."""
    epochs: Positive = 4
    """Passes over the data."""
    max_steps: Positive | None = None
    """Overrides epochs."""
    weight_decay: NonNegative = 0.0
    """AdamW's decay of matrices; norms and biases are never decayed."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: AboveZero = 1.0e-8
    """AdamW's epsilon."""
    clip_norm: AboveZero | None = None
    """Longest gradient; null: not clipped."""


class MeshSettings(Section):
    data: Annotated[int, Field(ge=-1)] = -1
    """Devices that hold different rows and the same weights; -1: all that are left."""
    fsdp: Positive = 1
    """Devices that hold different rows and share one copy of the weights."""
    tensor: Positive = 1
    """Devices that share the heads and the MLP of each layer."""

    @model_validator(mode="after")
    def _data(self) -> "MeshSettings":
        if self.data == 0:
            raise ValueError("data must be -1 (all devices that are left) or at least 1")
        return self


class DistributedSettings(Section):
    """Training on several hosts: not there yet."""

    coordinator: None = None
    """Address of the first host."""
    num_processes: None = None
    """Number of hosts."""
    process_id: None = None
    """This host's number."""


class CheckpointSettings(Section):
    every_steps: Positive | None = None
    """Save after this many steps."""
    every_epochs: Positive | None = 1
    """Save after this many epochs."""
    keep: Positive = 3
    """How many of the newest checkpoints stay."""


class EvaluationSettings(Section):
    ir: Paths = []
    """Held-out retrieval data, unified format: nDCG@10 over all its passages."""
    sts: Paths = []
    """Held-out similarity data: Spearman correlation."""


class Settings(BaseSettings):
    """All settings of a run, checked."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_parse_none_str="null",
        cli_exit_on_error=False,
        cli_prog_name="python -m codiemb_jax.train --config FILE",
    )

    output_dir: Path
    """Folder of everything the run leaves."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 49
    """Seed of the data order, of every choice, of dropout and of a new projection."""
    model: ModelSettings
    prompt: PromptSettings = PromptSettings()
    data: DataSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    encode_chunks: Positive = 1
    """Encode a batch in this many chunks: the same gradient at the memory of one chunk."""
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    export: bool = True
    """Write a Hugging Face folder to output_dir/export at the end."""

    @model_validator(mode="after")
    def _pools(self) -> "Settings":
        batch, pool = self.data.ir_global_batch_size, self.objective.ir_pool_size
        if self.data.ir and pool and batch % pool:
            raise ValueError(f"objective.ir_pool_size {pool} must divide data.ir_global_batch_size {batch}")
        batch, size = self.data.sts_global_batch_size, self.objective.sts_list_size
        if self.data.sts and size and batch % size:
            raise ValueError(f"objective.sts_list_size {size} must divide data.sts_global_batch_size {batch}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # the file and the flags, never the environment


def load_settings(path: Path, flags: Sequence[str] = ()) -> Settings:
    """Settings from a YAML file and flags (`--section.key VALUE`), which win.

    UserError that names file, line and field of everything that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected settings (`output_dir: …`), found {type(values).__name__}")
    problems = [f"{path}:{line}: {field}: stands twice" for field, line in _twice(node)]
    # Told here, for some of them are also names of arguments of what reads the flags.
    unknown = [name for name in values if name not in Settings.model_fields]
    problems += [f"{path}:{_line(node, [name])}: {name}: there is no such setting" for name in unknown]
    if problems:
        raise UserError("settings cannot be used:\n" + listed(problems))
    try:
        return CliApp.run(Settings, cli_args=list(flags), **values)
    except SettingsError as error:
        raise UserError(str(error).removeprefix("error parsing CLI: ")) from error
    except ValidationError as error:
        given = {flag.split("=")[0].removeprefix("--") for flag in flags}
        problems = [_problem(problem, node, path, given) for problem in error.errors()]
        raise UserError("settings cannot be used:\n" + listed(problems)) from error


def _problem(problem: Any, node: yaml.Node | None, path: Path, flags: set[str]) -> str:
    """One thing that is wrong with the settings: where it stands, what is wrong, what is there."""
    field = ".".join(str(part) for part in problem["loc"])
    line = _line(node, problem["loc"])
    is_flag = any(field == flag or field.startswith(flag + ".") for flag in flags)
    place = "--" if is_flag else f"{path}:{line}: " if line else ""
    if problem["type"] == "extra_forbidden":
        return f"{place}{field}: there is no such setting"
    if problem["type"] == "missing":
        return f"{path}: {field}: is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict | BaseModel) else f", found {problem['input']!r}"
    return f"{place}{field + ': ' if field else ''}{message}{given}"


def _twice(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that stand twice in a mapping, of which YAML would take the last, and the line of the second."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen.add(key.value)
            yield from _twice(value)


def _line(node: yaml.Node | None, location: Sequence[Any]) -> int | None:
    """The line of a setting in the file, from 1; None if it does not stand there."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return None
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
