"""What a run is made of, checked before anything is written."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from codiemb_jax.batch import TASKS, Task
from codiemb_jax.checkpoints.export import check_exportable
from codiemb_jax.checkpoints.model import PretrainedModel, open_model
from codiemb_jax.config import MAX_INT, Settings
from codiemb_jax.data.mixed import MixedPlan
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.sampler import Plan, Source
from codiemb_jax.data.store import PreparedDataSet, cache_folder
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.objectives.registry import OBJECTIVES
from codiemb_jax.sharding import make_mesh, row_shards
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import data_set_names, find_files
from codiemb_jax.training.run_folder import RunFolder

DEVICES = "devices with different rows (mesh.data x mesh.fsdp)"
"""Among a run's inputs with sampler: mixed, whose steps are made of each device's own data set."""


@dataclass(frozen=True)
class TrainingModel:
    """The model that a run starts from, where it will run."""

    settings: Settings
    """As resolved for this platform."""
    mesh: jax.sharding.Mesh
    model: PretrainedModel
    tokenizer: PromptTokenizer
    max_tokens: int


@dataclass(frozen=True)
class Run:
    """A run, checked; nothing is written yet."""

    start: TrainingModel
    data_sets: Sequence[PreparedDataSet]
    names: Sequence[str]
    """The data sets' names."""
    plan: Plan
    steps: int
    folder: RunFolder
    inputs: dict[str, str]


def open_training_model(settings: Settings) -> TrainingModel:
    """The model that a run trains.

    Raises:
      UserError: the model cannot be used, or the mesh or the batch sizes do not fit.
    """
    check_objectives(settings)
    settings = with_platform_defaults(settings)
    mesh = make_mesh(settings.mesh)
    check_batches(settings, row_shards(mesh))
    max_tokens = max(settings.data.query_max_tokens, settings.data.passage_max_tokens)
    model = open_model(settings.model, settings.prompt, mesh, max_tokens)
    if settings.export:
        check_exportable(model.blueprint)
    return TrainingModel(
        settings, mesh, model, PromptTokenizer(model.blueprint.tokenizer(), settings.prompt), max_tokens
    )


def open_run(start: TrainingModel) -> Run:
    """Prepares the data and checks everything else that a user may have got wrong.

    Raises:
      UserError: data or output_dir cannot be used.
    """
    settings = start.settings
    folder = RunFolder(settings.output_dir)
    files = {task: find_files(getattr(settings.data, task), f"data.{task}") for task in TASKS}
    read = {
        "model.path": [start.model.folder.path],
        **{f"data.{task}": [*getattr(settings.data, task), *files[task]] for task in TASKS},
        **{f"evaluation.{task}": held_out_files(settings, task) for task in TASKS},
    }
    folder.check_place(read)
    check_cache(cache_folder(), settings.output_dir, [path for paths in read.values() for path in paths])
    limits = {name: getattr(settings.data, name) for name in ("query_max_tokens", "passage_max_tokens")}
    data_sets = [
        prepare(path, task, start.tokenizer, cache=cache_folder(), **limits) for task in TASKS for path in files[task]
    ]
    names = data_set_names([data_set.path for data_set in data_sets])
    sources = [Source(name, data_set.task, data_set.index) for name, data_set in zip(names, data_sets, strict=True)]
    check_negatives(settings, sources)
    shards = row_shards(start.mesh)
    if settings.data.sampler == "mixed":
        plan: Plan = MixedPlan(sources, settings.data, settings.seed, shards)
    else:
        plan = Plan(sources, settings.data, settings.seed)
    steps = settings.optimizer.max_steps or settings.optimizer.epochs * plan.steps_per_epoch
    if steps > MAX_INT:
        raise UserError(f"optimizer.epochs: {steps} steps are too many; there may be {MAX_INT}")
    inputs = {"model.path": model_fingerprint(start.model)}
    inputs |= {str(data_set.path): data_set.folder.name.rpartition("-")[2] for data_set in data_sets}
    if settings.data.sampler == "mixed":
        inputs[DEVICES] = str(shards)
    folder.check_run(settings, inputs)
    return Run(start, data_sets, names, plan, steps, folder, inputs)


def check_cache(cache: Path, output_dir: Path, read: Sequence[Path]) -> None:
    """Checks that prepared data are not written into the run's folder or among what is read.

    Raises:
      UserError: they would be.
    """
    for folder in (output_dir, *read):
        if cache.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"the cache {cache} lies in {folder}; set CODIEMB_JAX_CACHE to another folder")


def held_out_files(settings: Settings, task: Task) -> list[Path]:
    """The paths given, and the files found below them."""
    paths = getattr(settings.evaluation, task)
    return [*paths, *find_files(paths, f"evaluation.{task}")]


def with_platform_defaults(settings: Settings) -> Settings:
    """On a CPU the model computes in float32 unless the settings name a dtype: bfloat16 is slower there."""
    if jax.default_backend() != "cpu" or "compute_dtype" in settings.model.model_fields_set:
        return settings
    model = settings.model.model_copy(update={"compute_dtype": "float32"})
    return settings.model_copy(update={"model": model})


def check_batches(settings: Settings, shards: int) -> None:
    """Checks that batches divide over the mesh.

    Raises:
      UserError: devices would get different numbers of examples in a chunk or, with sampler: mixed, broken groups.
    """
    problems = []
    for task in settings.tasks:
        size, group = task.global_batch_size, task.group_size
        if settings.data.sampler == "mixed" and group and size // shards % group:
            problems.append(
                f"{task.group_size_setting} {group} must divide what a device holds in a step of sampler: mixed, "
                f"{task.batch_size_setting} {size} / {shards} devices; set it to null to compare all of that"
            )
        if size % (shards * settings.encode_chunks):
            problems.append(
                f"{task.batch_size_setting} {size} must be a multiple of {shards * settings.encode_chunks}: "
                f"{shards} devices with different rows (mesh.data x mesh.fsdp) x encode_chunks "
                f"{settings.encode_chunks}"
            )
    if problems:
        raise UserError("batch sizes do not divide over the mesh:\n" + format_problems(problems))


def check_objectives(settings: Settings) -> None:
    """Checks that the objectives can learn from what the settings ask for.

    Raises:
      UserError: one needs negatives, and none are asked for.
    """
    for task in settings.tasks:
        if OBJECTIVES[task.objective][task.name].needs_negatives and not settings.data.negatives_per_query:
            raise UserError(
                f"objective.{task.name}: {task.objective} compares positives with negatives: set "
                "data.negatives_per_query"
            )


def check_negatives(settings: Settings, sources: Sequence[Source]) -> None:
    """Checks that the objectives can learn from the data.

    Raises:
      UserError: one needs negatives, and a data set has none.
    """
    for task in settings.tasks:
        if OBJECTIVES[task.objective][task.name].needs_negatives:
            without = [s.name for s in sources if s.task == task.name and not s.index.negatives.any()]
            if without:
                reason = (
                    f"objective.{task.name}: {task.objective} compares positives with negatives, which are missing in"
                )
                raise UserError(f"{reason}:\n{format_problems(without)}")


def model_fingerprint(model: PretrainedModel) -> str:
    """What a run's steps depend on of the model's folder, without the values of its weights."""
    content = model.blueprint.model_dump(mode="json", include={"config", "prefix", "dtypes", "files"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
