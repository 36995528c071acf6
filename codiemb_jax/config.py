"""Every setting of a run: typed, documented, validated.  Unknown keys are errors."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from codiemb_jax.batch import Task
from codiemb_jax.errors import shorten

MAX_INT = 2**31 - 1
"""Steps, sizes and token ids are int32."""


def _text(value: Any) -> Any:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("must not hold a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError("must be valid Unicode, without lone surrogates") from error
    return value


def _float32(value: float) -> float:
    # Steps compute in float32, and with squares: nobody means a number that is 0, 1 or infinite there.
    if value and not 1e-30 <= abs(value) <= 1e15:
        raise ValueError("must be 0 or between 1e-30 and 1e15 in size")
    if 1 - 1e-7 < value < 1:
        raise ValueError("is 1 in float32; the nearest number below is 0.9999999")
    return value


PACKAGE_SCHEME = "package://"
"""Prefix of paths to files that are installed with this package, such as the quickstart's data."""


def _path(value: Any) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("a path must be a text that is not empty")
    if value.startswith(PACKAGE_SCHEME):
        raise ValueError(f"{PACKAGE_SCHEME} is for what the package includes, which is only read")
    try:
        return Path(_text(value)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"there is no home directory for {shorten(value.split('/')[0])}") from error


def _input_path(value: Any) -> Path:
    if isinstance(value, str) and value.startswith(PACKAGE_SCHEME):
        return Path(__file__).parent / _text(value).removeprefix(PACKAGE_SCHEME)
    return _path(value)


def _paths(value: Any) -> Any:
    if value is None:
        raise ValueError("expected a list of paths; for no path at all give []")
    return [value] if isinstance(value, str | Path) else value


# Strict, because Python takes True for 1; and YAML has numbers of its own, so a text is no number.
Positive = Annotated[int, Field(strict=True, gt=0, le=MAX_INT)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), AfterValidator(_float32)]
AboveZero = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), AfterValidator(_float32)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1), AfterValidator(_float32)]
Flag = Annotated[bool, Field(strict=True)]
OnePath = Annotated[Path, BeforeValidator(_path)]
InputPath = Annotated[Path, BeforeValidator(_input_path)]
Paths = Annotated[list[InputPath], BeforeValidator(_paths)]
PromptText = Annotated[str, Field(strict=True, max_length=10_000), BeforeValidator(_text)]
"""The limit is generous for a prompt and spares the tokenizer one of megabytes, which it would see with every text."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelSettings(Section):
    path: Annotated[str, BeforeValidator(lambda path: str(_input_path(path)))]
    """Folder in Hugging Face format, an Orbax checkpoint of this project, or a hub id."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a token sees its whole text or only what stands before it."""
    pooling: Literal["mean", "weighted_mean", "cls", "last_token"] = "mean"
    """How a text's tokens become one vector.  The means leave the prompt out; weighted_mean weighs the content's tokens
    1, 2, 3 …; cls and last_token take the first or last of all tokens."""
    normalize: Flag = True
    """L2-normalize embeddings.  The objectives compare directions either way."""
    projection_dim: Annotated[int, Field(strict=True, gt=0, le=65536)] | None = None
    """Dimension of a learned linear layer on the vectors; null: none."""
    dropout: Fraction | None = None
    """Dropout in training, for all of the model's dropouts; null: each as config.json says."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matrix products.  On a CPU the default is float32."""
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    """Type of the master weights and of the optimizer's moments."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass computes again: nothing, all but the matrix products, or all of a layer."""


class PromptSettings(Section):
    begin: PromptText = ""
    """Literal special tokens before every text; none are added otherwise."""
    query: PromptText = "Instruction: {instruction} Query: "
    """Before a query with an instruction; left out when the example has none."""
    passage: PromptText = ""
    """Before an IR passage."""
    end: PromptText = ""
    """Literal special tokens after every text; truncation keeps them."""
    default_instruction: PromptText = "Given a search query, retrieve passages that answer the question"
    """Instruction of the exported query prompt."""
    include_in_pooling: Flag = False
    """Whether means also cover `begin` and the prompt, as in most published folders (`include_prompt`)."""

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
    max_examples: Positive | None = None
    """Examples used of each data set, a random choice by seed and the data set's name; null: all."""
    ir_share: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    """Share of retrieval steps, kept at every step count; null: as the batches of the data sets fall.  An epoch has as
    many steps either way: one task's data are then seen more often, the other's less."""
    ir_global_batch_size: Positive = 224
    """Queries in a retrieval step, over all devices."""
    sts_global_batch_size: Positive = 256
    """Pairs in a similarity step, over all devices."""
    positives_per_query: Annotated[int, Field(strict=True, gt=0, le=1024)] = 2
    """Positives drawn for each query."""
    negatives_per_query: Annotated[int, Field(strict=True, ge=0, le=1024)] = 4
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
    ir: Literal["info_nce", "cosent"] = "info_nce"
    """Objective of retrieval steps; cosent is the paper's baseline."""
    sts: Literal["codi", "info_nce", "cosent"] = "codi"
    """Objective of similarity steps; codi: mid-layer InfoNCE, Pearson, rank KL and PRO, weighted.  The others are the
    paper's baselines."""
    temperature: AboveZero = 0.02
    """Temperature of InfoNCE, on either layer."""
    ir_pool_size: Positive | None = None
    """Queries compared with each other; null: the whole global batch."""
    sts_list_size: Positive | None = 32
    """Pairs ranked with each other; null: the whole global batch."""
    list_temperature: AboveZero = 0.05
    """Temperature of rank KL, PRO and CoSENT."""
    pearson_weight: NonNegative = 2.0
    """Weight of the Pearson loss."""
    rank_kl_weight: NonNegative = 5.0
    """Weight of the rank KL loss."""
    pro_weight: NonNegative = 0.5
    """Weight of the PRO loss."""
    mid_info_nce_weight: NonNegative = 1.0
    """Weight of InfoNCE on the middle layer; 0: off."""
    mid_info_nce_threshold: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 1.0
    """Pairs with at least this score are positives of InfoNCE in similarity steps."""


class OptimizerSettings(Section):
    learning_rate: NonNegative = 4.0e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Shape after the warm-up."""
    warmup_ratio: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.03
    """Share of all steps (rounded up) over which the rate rises from 0."""
    warmup_steps: Annotated[int, Field(strict=True, ge=0, le=MAX_INT)] | None = None
    """Overrides warmup_ratio."""
    epochs: Positive = 4
    """Passes over the data."""
    max_steps: Positive | None = None
    """Overrides epochs."""
    weight_decay: NonNegative = 0.0
    """AdamW's decay of matrices; norms and biases are never decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: AboveZero = 1.0e-8
    """AdamW's epsilon."""
    clip_norm: AboveZero | None = None
    """Maximum global gradient norm; null disables clipping."""


class MeshSettings(Section):
    data: Annotated[int, Field(strict=True, ge=-1, le=MAX_INT)] = -1
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


class TaskSpec(NamedTuple):
    """What the settings say about a task, and the names of the settings that say it."""

    name: Task
    paths: list[Path]
    global_batch_size: int
    group_size: int | None
    """Consecutive examples of a batch that are compared with each other; None: all of it."""
    objective: str
    batch_size_setting: str
    group_size_setting: str


class Settings(Section):
    """All settings of a run."""

    output_dir: OnePath
    """Folder for all of a run's output; must be absent or empty, or hold this very run."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 49
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
    checkpoint: CheckpointSettings = CheckpointSettings()
    export: Flag = True
    """Write a Hugging Face folder to output_dir/export at the end."""

    @model_validator(mode="after")
    def _groups(self) -> "Settings":
        for task in self.tasks:
            if task.group_size and task.global_batch_size % task.group_size:
                raise ValueError(
                    f"{task.group_size_setting} {task.group_size} must divide {task.batch_size_setting} "
                    f"{task.global_batch_size}"
                )
        return self

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """The tasks that there is data for."""
        data, objective = self.data, self.objective
        ir = TaskSpec(
            name="ir",
            paths=data.ir,
            global_batch_size=data.ir_global_batch_size,
            group_size=objective.ir_pool_size,
            objective=objective.ir,
            batch_size_setting="data.ir_global_batch_size",
            group_size_setting="objective.ir_pool_size",
        )
        sts = TaskSpec(
            name="sts",
            paths=data.sts,
            global_batch_size=data.sts_global_batch_size,
            group_size=objective.sts_list_size,
            objective=objective.sts,
            batch_size_setting="data.sts_global_batch_size",
            group_size_setting="objective.sts_list_size",
        )
        return tuple(task for task in (ir, sts) if task.paths)
