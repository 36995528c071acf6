"""All settings of a run, with types, descriptions and validation. Unknown keys are errors."""

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)

from codiemb_jax.batch import StepTask, Task
from codiemb_jax.files import local_path
from codiemb_jax.remote import Location, is_remote, remote_path

MAX_INT = 2**31 - 1
"""Step numbers, sizes and token ids are int32."""


def _check_unicode(value: Any) -> Any:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("must not contain a NUL character")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError("must be valid Unicode, without unpaired surrogates") from error
    return value


def _check_float32(value: float) -> float:
    # Steps compute in float32 and square some values. Numbers that become 0, 1 or infinite there are mistakes.
    if value and not 1e-30 <= abs(value) <= 1e15:
        raise ValueError("must be 0 or have an absolute value between 1e-30 and 1e15")
    if 1 - 1e-7 < value < 1:
        raise ValueError("rounds to 1 in float32; use at most 0.9999999")
    return value


def _check_repository(name: str) -> str:
    """Checks the name of a repository of the Hugging Face Hub by its rules."""
    part = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    if not re.fullmatch(f"{part}/{part}", name) or re.search(r"--|\.\.|\.git$", name):
        raise ValueError("must be the name of a repository, OWNER/NAME")
    return name


PACKAGE_SCHEME = "package://"
"""Prefix of paths to files that are installed with this package, such as the quickstart data."""


def _parse_path(value: Any) -> Location:
    if isinstance(value, Location):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("a path must be a non-empty string")
    if value.startswith(PACKAGE_SCHEME):
        raise ValueError(f"{PACKAGE_SCHEME} is only for input files that are included in the package")
    _check_unicode(value)
    return remote_path(value) if is_remote(value) else local_path(value)


def _parse_input_path(value: Any) -> Location:
    if isinstance(value, str) and value.startswith(PACKAGE_SCHEME):
        inner = PurePosixPath(_check_unicode(value).removeprefix(PACKAGE_SCHEME))
        if inner.is_absolute() or ".." in inner.parts:
            raise ValueError(f"{PACKAGE_SCHEME} paths must stay inside the package")
        return Path(__file__).parent / inner
    return _parse_path(value)


def _as_list(value: Any) -> Any:
    if value is None:
        raise ValueError("expected a list of paths; use [] for none")
    return [value] if isinstance(value, str | Location) else value


# Strict, because pydantic would convert True to 1 and strings to numbers.
PositiveInt = Annotated[int, Field(strict=True, gt=0, le=MAX_INT)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), AfterValidator(_check_float32)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), AfterValidator(_check_float32)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1), AfterValidator(_check_float32)]
Flag = Annotated[bool, Field(strict=True)]
OutputPath = Annotated[Location, PlainValidator(_parse_path), PlainSerializer(str)]
InputPath = Annotated[Location, PlainValidator(_parse_input_path), PlainSerializer(str)]
Paths = Annotated[list[InputPath], BeforeValidator(_as_list)]
PromptText = Annotated[str, Field(strict=True, max_length=10_000), BeforeValidator(_check_unicode)]
"""Longer prompts are mistakes, and would be tokenized with every example."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ModelSettings(Section):
    path: Annotated[str, BeforeValidator(lambda path: str(_parse_input_path(path)))]
    """Hugging Face folder, checkpoint or run folder of this project, local or at a gs:// address; or hub id."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether a token attends to its whole text or only to itself and the tokens before it."""
    attention_backend: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Implementation of attention. auto: with bfloat16, the splash kernel on TPUs and cuDNN on GPUs; otherwise xla,
    which runs everywhere. Dropout of attention weights is always computed by xla."""
    pooling: Literal["mean", "weighted_mean", "cls", "last_token"] = "mean"
    """How the tokens of a text are pooled into one embedding. mean and weighted_mean exclude the prompt unless
    prompt.include_in_pooling is set; weighted_mean weights the tokens 1, 2, 3 …; cls and last_token use the first or
    last token."""
    normalize: Flag = True
    """L2-normalize the embeddings. The objectives use normalized embeddings in either case."""
    projection_dim: Annotated[int, Field(strict=True, gt=0, le=65536)] | None = None
    """Output dimension of a learned linear layer on the embeddings; null disables it."""
    dropout: Fraction | None = None
    """Dropout rate for all dropout layers during training; null uses the rates in config.json."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of activations and matrix products. On a CPU, the default is float32."""
    param_dtype: Literal["bfloat16", "float32"] = "float32"
    """dtype of the master weights. bfloat16 loses updates of less than about 0.4 % of a weight."""
    remat: Literal["none", "dots", "full"] = "dots"
    """What the backward pass recomputes: nothing, everything except products with weight matrices and, with splash and
    on CPUs, attention (dots), or whole layers."""


class PromptSettings(Section):
    begin: PromptText = ""
    """Literal special tokens before every text. No others are added."""
    query: PromptText = "Instruction: {instruction} Query: "
    """Prompt of queries with an instruction, with the placeholder {instruction}. Queries without one have no prompt."""
    passage: PromptText = ""
    """Prompt of IR passages."""
    end: PromptText = ""
    """Literal special tokens after every text. Truncation keeps them."""
    default_instruction: PromptText = "Given a search query, retrieve passages that answer the question"
    """Instruction in the exported query prompt."""
    include_in_pooling: Flag = False
    """Include `begin` and the prompt in mean and weighted_mean pooling, as most published models do."""

    @model_validator(mode="after")
    def _check_placeholder(self) -> "PromptSettings":
        if self.query and self.query.count("{instruction}") != 1:
            raise ValueError("query must contain the placeholder {instruction} exactly once")
        return self


class DataSettings(Section):
    ir: Paths = []
    """Retrieval data: .json or .jsonl files, or folders of such files, local or at gs:// addresses. Each file is one
    dataset."""
    sts: Paths = []
    """Similarity data, in the same form."""
    sampler: Literal["dynamic", "single", "mixed"] = "dynamic"
    """dynamic: each task has its own batch size. single: both tasks have the same batch size. mixed: the same batch
    size, and each device draws its examples from a single dataset and compares only its own (an ablation)."""
    max_examples: PositiveInt | None = None
    """Number of examples used from each dataset, chosen at random by the seed and the dataset's name; null uses all."""
    ir_share: Annotated[float, Field(strict=True, gt=0, lt=1), AfterValidator(_check_float32)] | None = None
    """Share of retrieval steps, the same throughout the run; null gives each task the share of its batches. The number
    of steps per epoch does not change, so the data of one task is used more often and that of the other less often."""
    ir_global_batch_size: PositiveInt = 224
    """Number of queries per retrieval step, over all devices."""
    sts_global_batch_size: PositiveInt = 256
    """Number of pairs per similarity step, over all devices."""
    positives_per_query: Annotated[int, Field(strict=True, gt=0, le=1024)] = 2
    """Number of positives drawn for each query."""
    negatives_per_query: Annotated[int, Field(strict=True, ge=0, le=1024)] = 4
    """Number of hard negatives drawn for each query."""
    query_max_tokens: PositiveInt = 1024
    """Maximum number of tokens of a query, including its prompt and special tokens."""
    passage_max_tokens: PositiveInt = 1024
    """Maximum number of tokens of a passage, including its prompt and special tokens."""
    packing: Flag = True
    """Pack several texts into each row; false puts each text into a row of its own and pads it."""
    row_tokens: PositiveInt | None = None
    """Number of tokens per packed row; null uses the larger of query_max_tokens and passage_max_tokens."""

    @model_validator(mode="after")
    def _check_consistency(self) -> "DataSettings":
        if not self.ir and not self.sts:
            raise ValueError("give at least one path in data.ir or data.sts")
        same_size = self.ir_global_batch_size == self.sts_global_batch_size
        if self.sampler != "dynamic" and self.ir and self.sts and not same_size:
            raise ValueError(
                f"sampler: {self.sampler} requires one batch size: set ir_global_batch_size and sts_global_batch_size "
                "to the same value"
            )
        longest = self.max_tokens()
        if self.row_tokens is not None and not self.packing:
            raise ValueError("row_tokens requires packing: true")
        if self.row_tokens is not None and self.row_tokens < longest:
            raise ValueError(
                f"row_tokens {self.row_tokens} must be at least query_max_tokens and passage_max_tokens, {longest}"
            )
        if self.row_tokens is not None and self.row_tokens > 16 * longest:
            raise ValueError(
                f"row_tokens {self.row_tokens} may be at most 16 times the larger of query_max_tokens and "
                f"passage_max_tokens, {16 * longest}"
            )
        if self.ir_share is not None and not (self.ir and self.sts):
            raise ValueError("ir_share requires data for both tasks: give paths in data.ir and data.sts")
        if self.ir_share is not None and self.sampler == "mixed":
            raise ValueError("ir_share requires steps of a single task: set sampler to dynamic or single")
        return self

    def max_tokens(self, task: StepTask = "mixed") -> int:
        """Returns the maximum number of tokens of a text in steps of a task. Both texts of an STS pair are queries."""
        return self.query_max_tokens if task == "sts" else max(self.query_max_tokens, self.passage_max_tokens)


class ObjectiveSettings(Section):
    ir: Literal["info_nce", "cosent"] = "info_nce"
    """Objective of retrieval steps. cosent is a baseline of the paper."""
    sts: Literal["codi", "info_nce", "cosent"] = "codi"
    """Objective of similarity steps. codi is the weighted sum of middle-layer InfoNCE, Pearson, rank KL and PRO; the
    others are baselines of the paper."""
    temperature: PositiveFloat = 0.02
    """Temperature of InfoNCE, on both the last and the middle layer."""
    ir_pool_size: PositiveInt | None = None
    """Number of queries that share their passages as candidates; null: the whole global batch."""
    mask_duplicates: Flag = True
    """In info_nce for retrieval, passages with the same text as a positive of a query are not used as negatives for
    it."""
    sts_list_size: PositiveInt | None = 32
    """Number of pairs that are ranked with each other; null: the whole global batch."""
    list_temperature: PositiveFloat = 0.05
    """Temperature of rank KL, PRO and CoSENT."""
    pearson_weight: NonNegativeFloat = 2.0
    """Weight of the Pearson loss."""
    rank_kl_weight: NonNegativeFloat = 5.0
    """Weight of the rank KL loss."""
    pro_weight: NonNegativeFloat = 0.5
    """Weight of the PRO loss."""
    mid_info_nce_weight: NonNegativeFloat = 1.0
    """Weight of InfoNCE on the middle layer; 0 disables it."""
    mid_info_nce_threshold: Annotated[
        float, Field(strict=True, allow_inf_nan=False), AfterValidator(_check_float32)
    ] = 1.0
    """Minimum score of the pairs that InfoNCE uses as positives in similarity steps."""


class OptimizerSettings(Section):
    learning_rate: NonNegativeFloat = 4.0e-5
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule after the warmup."""
    warmup_ratio: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.03
    """Fraction of all steps, rounded up, over which the learning rate rises linearly from 0."""
    warmup_steps: Annotated[int, Field(strict=True, ge=0, le=MAX_INT)] | None = None
    """Number of warmup steps. Overrides warmup_ratio."""
    epochs: PositiveInt = 4
    """Number of passes over the data."""
    max_steps: PositiveInt | None = None
    """Number of steps. Overrides epochs."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay of the matrices. Norms and biases are never decayed."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW decay rates of the first and second moments."""
    eps: PositiveFloat = 1.0e-8
    """AdamW epsilon."""
    clip_norm: PositiveFloat | None = None
    """Maximum global gradient norm; null disables clipping."""
    moments_dtype: Literal["bfloat16"] | None = None
    """dtype of AdamW's first moment; null: float32, which the second moment always has."""
    offload: Flag = False
    """Keep AdamW's moments in pinned host memory and move them to the devices for each update. The results are the
    same."""


class MeshSettings(Section):
    data: Annotated[int, Field(strict=True, ge=-1, le=MAX_INT)] = -1
    """Size of the data-parallel axis, which splits rows and replicates weights; -1 uses all remaining devices."""
    fsdp: PositiveInt = 1
    """Size of the FSDP axis, which splits rows and shards weights."""
    tensor: PositiveInt = 1
    """Size of the tensor-parallel axis, which splits attention heads and MLPs."""

    @model_validator(mode="after")
    def _check_data(self) -> "MeshSettings":
        if self.data == 0:
            raise ValueError("data must be -1 (all remaining devices) or at least 1")
        return self


class CheckpointSettings(Section):
    every_steps: PositiveInt | None = None
    """Save a checkpoint every this many steps; null disables it."""
    every_epochs: PositiveInt | None = 1
    """Save a checkpoint every this many epochs; null disables it."""
    keep: PositiveInt = 3
    """Number of newest checkpoints to keep. Older ones are deleted once a new one is complete."""


class DistributedSettings(Section):
    coordinator: Annotated[str, Field(strict=True, pattern=r"^(\[[0-9a-fA-F:.]+\]|[^\s:/]+):[0-9]{1,5}$")] | None = None
    """HOST:PORT of the first process, where the others connect; null finds the processes on TPUs, Slurm, Open MPI and
    Kubernetes, and runs alone elsewhere."""
    num_processes: PositiveInt | None = None
    """Number of processes. Required with coordinator; 1 without it runs alone anywhere."""
    process_id: Annotated[int, Field(strict=True, ge=0, le=MAX_INT)] | None = None
    """Number of this process, from 0. Required with coordinator, and different in each process."""

    @model_validator(mode="after")
    def _check_complete(self) -> "DistributedSettings":
        given = (self.coordinator, self.num_processes, self.process_id)
        if None in given and given not in ((None, None, None), (None, 1, None)):
            raise ValueError("give coordinator, num_processes and process_id together, or num_processes: 1 alone")
        if self.coordinator is not None and not 0 < int(self.coordinator.rpartition(":")[2]) < 2**16:
            raise ValueError(f"coordinator {self.coordinator}: the port must be between 1 and 65535")
        if self.process_id is not None and self.num_processes is not None and self.process_id >= self.num_processes:
            raise ValueError(f"process_id {self.process_id} must be less than num_processes {self.num_processes}")
        return self


class EvaluationSettings(Section):
    ir: Paths = []
    """Held-out retrieval data, in the format of data.ir, with nDCG@10, MRR@10, recall and MAP over all passages of a
    file."""
    sts: Paths = []
    """Held-out similarity data, in the format of data.sts, with Spearman and Pearson correlation."""
    beir: Paths = []
    """Folders in the format of BEIR, with the metrics of held-out retrieval data."""
    every_steps: PositiveInt | None = None
    """Evaluate every this many steps and after the last one; null: only before and after training."""
    metric: Annotated[str, Field(strict=True, min_length=1), BeforeValidator(_check_unicode)] | None = None
    """The metric by which the best checkpoint is chosen: that of one file, such as "faq nDCG@10"; or the name of a
    metric, such as MRR@10, for its mean over all files that have it; null: the mean over all files of nDCG@10
    (retrieval) and Spearman (similarity)."""
    keep_best: Flag = True
    """Keep the best of the evaluated checkpoints besides the newest ones, and export it instead of the last."""
    patience: PositiveInt | None = None
    """Stop after this many consecutive evaluations without improvement; null never stops early."""

    @model_validator(mode="after")
    def _check_consistency(self) -> "EvaluationSettings":
        if self.every_steps is None:
            given = [name for name in ("metric", "patience") if getattr(self, name) is not None]
            given += [] if self.keep_best else ["keep_best: false"]
            if given:
                raise ValueError(f"{', '.join(given)}: has no effect without every_steps")
        elif not (self.ir or self.sts or self.beir):
            raise ValueError("every_steps requires held-out data: give paths in ir, sts or beir")
        return self


class WandbSettings(Section):
    project: (
        Annotated[str, Field(strict=True, pattern=r"^[^/\\#?%:]+$", max_length=128), BeforeValidator(_check_unicode)]
        | None
    ) = None
    """Project of Weights & Biases that gets the metrics; null does not use it."""
    mode: Literal["online", "offline"] = "online"
    """online: send the metrics. offline: keep them in output_dir/wandb, for `wandb sync`."""

    @model_validator(mode="after")
    def _check_project(self) -> "WandbSettings":
        if self.project is None and self.mode == "offline":
            raise ValueError("mode: offline requires project")
        return self


class TrackingSettings(Section):
    tensorboard: Flag = True
    """Write event files for TensorBoard to output_dir/tensorboard."""
    wandb: Annotated[WandbSettings, BeforeValidator(lambda value: {} if value is None else value)] = WandbSettings()


class TaskSpec(NamedTuple):
    """The settings of one task, and the names of those settings for error messages."""

    name: Task
    paths: list[Location]
    global_batch_size: int
    group_size: int | None
    """Number of consecutive examples that are compared with each other; None means the whole batch."""
    objective: str
    batch_size_setting: str
    group_size_setting: str


class Settings(Section):
    """All settings of a run."""

    output_dir: OutputPath
    """Folder for all output of the run, local or at a gs:// address. It must be new, empty, or the folder of the same
    run."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 49
    """Random seed of the data order, the drawn passages, dropout and the initial projection."""
    model: ModelSettings
    prompt: PromptSettings = PromptSettings()
    data: DataSettings
    evaluation: EvaluationSettings = EvaluationSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    encode_chunks: PositiveInt = 1
    """Maximum number of chunks in which a batch is encoded; small batches have fewer. Gradients are the same, with the
    memory of a single chunk."""
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do in a step whose loss or gradient is NaN or infinite. Its update is never applied. stop: end the run;
    skip: continue with the next step."""
    non_finite_skips: PositiveInt = 10
    """Maximum number of steps to skip in a run; one more ends it."""
    export: Flag = True
    """Export a Hugging Face folder to output_dir/export at the end."""
    push_to_hub: Annotated[str, Field(strict=True, max_length=96), AfterValidator(_check_repository)] | None = None
    """Repository OWNER/NAME of the Hugging Face Hub to which the export is uploaded. If there is none, a private one is
    created at the start. Weights of an earlier model there are replaced or deleted, other files stay. null uploads
    nothing."""

    @model_validator(mode="after")
    def _check_export(self) -> "Settings":
        if self.push_to_hub and not self.export:
            raise ValueError("push_to_hub requires export: true")
        return self

    @model_validator(mode="after")
    def _check_group_sizes(self) -> "Settings":
        for task in self.tasks:
            if task.group_size and task.global_batch_size % task.group_size:
                raise ValueError(
                    f"{task.group_size_setting} {task.group_size} must divide {task.batch_size_setting} "
                    f"{task.global_batch_size}; lower it, or set it to null to compare the whole batch"
                )
        return self

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """The tasks with data."""
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

    @property
    def step_tasks(self) -> list[StepTask]:
        """The tasks of training steps. One step is compiled for each."""
        return ["mixed"] if self.data.sampler == "mixed" else [task.name for task in self.tasks]
