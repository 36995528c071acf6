"""Assembles a run and checks its settings, model, data and output folder before anything is written."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from codiemb_jax.batch import TASKS, Task
from codiemb_jax.cache import cache_folder, remote_cache
from codiemb_jax.checkpoints.export import check_exportable
from codiemb_jax.checkpoints.model import PretrainedModel, open_model
from codiemb_jax.config import MAX_INT, Settings
from codiemb_jax.data.find import dataset_names, find_files
from codiemb_jax.data.layout import Layout, PackedLayout, PaddedLayout
from codiemb_jax.data.mixed import MixedPlan
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.sampler import Plan, Source
from codiemb_jax.data.store import PreparedDataset
from codiemb_jax.distributed import check_same, in_turns
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.models.attention import ROW_MULTIPLES, Backend, choose_backend
from codiemb_jax.objectives.registry import OBJECTIVES
from codiemb_jax.remote import Location, original
from codiemb_jax.sharding import find_devices, make_mesh, row_shards
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.training.remote_folder import open_run_folder
from codiemb_jax.training.run_folder import RunFolder, flatten
from codiemb_jax.training.state import HOST_MEMORY
from codiemb_jax.training.step import needs_texts
from codiemb_jax.training.trackers import check_tracking

DEVICES = "batch shards (mesh.data x mesh.fsdp)"
"""Key of the number of devices in the inputs of a run with `sampler: mixed`, whose steps depend on it."""


@dataclass(frozen=True)
class TrainingSetup:
    """The initial model of a run, with its settings, mesh and tokenizer."""

    settings: Settings
    """The settings, with the defaults of this platform."""
    mesh: jax.sharding.Mesh
    model: PretrainedModel
    tokenizer: PromptTokenizer
    max_tokens: int


@dataclass(frozen=True)
class Run:
    """A run that has been checked. Nothing has been written yet."""

    setup: TrainingSetup
    datasets: Sequence[PreparedDataset]
    names: Sequence[str]
    """The names of the datasets."""
    held_out: Sequence[Path]
    """The held-out files."""
    plan: Plan
    steps: int
    folder: RunFolder
    inputs: dict[str, str]
    """Fingerprints of everything besides the settings on which the steps depend."""


def open_training_model(settings: Settings) -> TrainingSetup:
    """Opens the initial model of a run.

    Raises:
      UserError: If the model cannot be used, or the mesh or batch sizes are invalid.
    """
    check_objectives(settings)
    check_tracking(settings)
    settings = with_platform_defaults(settings, find_devices()[0].platform)
    if jax.config.read("jax_enable_x64"):
        raise UserError("JAX_ENABLE_X64 is set, which would change the results; unset it")
    mesh = make_mesh(settings.mesh)
    check_batch_sizes(settings, row_shards(mesh))
    if settings.optimizer.offload:
        check_host_memory(mesh.local_devices[0])
    max_tokens = settings.data.max_tokens()
    model = open_model(settings.model, settings.prompt, mesh, max_tokens)
    if settings.export:
        check_exportable(model.blueprint)
    return TrainingSetup(
        settings, mesh, model, PromptTokenizer(model.blueprint.tokenizer(), settings.prompt), max_tokens
    )


def open_run(setup: TrainingSetup) -> Run:
    """Prepares the data, plans the steps and checks the output folder.

    Raises:
      UserError: If the data or output_dir cannot be used.
    """
    settings = setup.settings
    cache = cache_folder()
    folder = open_run_folder(settings.output_dir, cache)
    files = find_data(settings)
    held_out = {task: find_files(getattr(settings.evaluation, task), f"evaluation.{task}") for task in TASKS}
    input_paths: dict[str, list[Location]] = {
        "model.path": [original(setup.model.folder.path, cache)],
        **{f"data.{task}": [*getattr(settings.data, task), *files[task]] for task in TASKS},
        **{f"evaluation.{task}": [*getattr(settings.evaluation, task), *held_out[task]] for task in TASKS},
        "evaluation.beir": list(settings.evaluation.beir),
    }
    folder.check_location(input_paths)
    check_cache(settings.output_dir, [path for paths in input_paths.values() for path in paths])
    datasets = in_turns(lambda: prepare_data(settings, files, setup.tokenizer))
    names = dataset_names([dataset.path for dataset in datasets])
    sources = [Source(name, dataset.task, dataset.index) for name, dataset in zip(names, datasets, strict=True)]
    check_negatives(settings, names, datasets)
    layout = batch_layout(settings, setup.mesh, backend=attention_backend(setup))
    compare_texts = needs_texts(settings, "ir")
    if settings.data.sampler == "mixed":
        plan: Plan = MixedPlan(sources, settings.data, settings.seed, layout, compare_texts)
    else:
        group_sizes = {task.name: task.group_size for task in settings.tasks}
        plan = Plan(sources, settings.data, settings.seed, layout, group_sizes, compare_texts)
    steps = settings.optimizer.max_steps or settings.optimizer.epochs * plan.steps_per_epoch
    if steps > MAX_INT:
        raise UserError(f"optimizer.epochs: {steps} steps are too many; the maximum is {MAX_INT}")
    inputs = {"model.path": model_fingerprint(setup.model)}
    inputs |= {str(original(dataset.path, cache)): dataset.folder.name.rpartition("-")[2] for dataset in datasets}
    if settings.data.sampler == "mixed":
        inputs[DEVICES] = str(layout.devices)
    folder.check_same_run(settings, inputs)
    # All processes have checked the folder before the first one writes to it.
    check_same(run_identity(settings, inputs), "start all of them with the same settings, model and data")
    held_out_files = [path for paths in held_out.values() for path in paths]
    return Run(setup, datasets, names, held_out_files, plan, steps, folder, inputs)


def run_identity(settings: Settings, inputs: Mapping[str, str]) -> dict[str, str]:
    """Returns everything that must be the same in all processes of a run, by name."""
    values = flatten(settings.model_dump(mode="json", exclude={"distributed"}))
    return {name: json.dumps(value) for name, value in values.items()} | dict(inputs)


def find_data(settings: Settings) -> dict[Task, list[Path]]:
    """Returns the training files of each task."""
    return {task: find_files(getattr(settings.data, task), f"data.{task}") for task in TASKS}


def prepare_data(
    settings: Settings,
    files: Mapping[Task, Sequence[Path]],
    tokenizer: PromptTokenizer,
    beam_runner: str | None = None,
) -> list[PreparedDataset]:
    """Tokenizes the training files that are not in the cache yet. See `prepare`."""
    limits = {name: getattr(settings.data, name) for name in ("query_max_tokens", "passage_max_tokens")}
    cache, shared = cache_folder(), remote_cache()
    return [
        prepare(path, task, tokenizer, cache=cache, shared=shared, beam_runner=beam_runner, **limits)
        for task in TASKS
        for path in files[task]
    ]


def attention_backend(setup: TrainingSetup) -> Backend:
    """Returns the attention backend of the model."""
    settings, config = setup.settings.model, setup.model.config
    return choose_backend(
        settings.attention_backend, setup.mesh, settings.compute_dtype, config.kv_heads, config.head_dim
    )


def batch_layout(settings: Settings, mesh: jax.sharding.Mesh, backend: Backend = "xla") -> Layout:
    """Returns how the texts of a batch are laid out in rows, of lengths that the attention backend can take.

    Raises:
      UserError: If data.row_tokens is a length that the backend cannot take.
    """
    data, multiple = settings.data, ROW_MULTIPLES.get(backend, 1)
    if not data.packing:
        return PaddedLayout(row_shards(mesh), multiple)
    longest = data.max_tokens()
    if data.row_tokens and data.row_tokens % multiple:
        raise UserError(
            f"data.row_tokens: {data.row_tokens} must be a multiple of {multiple} for attention with {backend}; "
            f"{-(-data.row_tokens // multiple) * multiple} would do"
        )
    row_length = data.row_tokens or -(-longest // multiple) * multiple
    return PackedLayout(row_length, row_shards(mesh), settings.encode_chunks)


def check_cache(output_dir: Location, input_paths: Sequence[Location]) -> None:
    """Checks that the cache of prepared data is outside the output folder and the input folders.

    Raises:
      UserError: If it is inside one of them.
    """
    caches: list[Location] = [cache_folder().resolve(), *filter(None, [remote_cache()])]
    for folder in (output_dir, *input_paths):
        resolved = folder.resolve() if isinstance(folder, Path) else folder
        for cache in caches:
            if isinstance(cache, Path) == isinstance(resolved, Path) and cache.is_relative_to(resolved):
                raise UserError(f"the cache {cache} is inside {folder}; set CODIEMB_JAX_CACHE to another folder")


def with_platform_defaults(settings: Settings, platform: str) -> Settings:
    """Sets compute_dtype to float32 on a CPU, where bfloat16 is slower, unless the settings give a dtype."""
    if platform != "cpu" or "compute_dtype" in settings.model.model_fields_set:
        return settings
    model = settings.model.model_copy(update={"compute_dtype": "float32"})
    return settings.model_copy(update={"model": model})


def check_batch_sizes(settings: Settings, shards: int) -> None:
    """Checks that batches can be split evenly over devices and chunks.

    Args:
      settings: The settings.
      shards: Number of batch shards.

    Raises:
      UserError: If a batch size is not a multiple of devices x chunks, or a group spans devices (`sampler: mixed`).
    """
    problems = []
    for task in settings.tasks:
        size, group = task.global_batch_size, task.group_size
        if settings.data.sampler == "mixed" and group and size // shards % group:
            problems.append(
                f"{task.group_size_setting} {group} must divide the number of examples per device with sampler: mixed, "
                f"{task.batch_size_setting} {size} / {shards} devices; set it to null to compare all of them"
            )
        chunks = 1 if settings.data.packing else settings.encode_chunks  # packed rows are padded to full chunks
        if size % (shards * chunks):
            problems.append(
                f"{task.batch_size_setting} {size} must be a multiple of {shards * chunks}: "
                f"{shards} batch shards (mesh.data x mesh.fsdp)"
                + ("" if settings.data.packing else f" x encode_chunks {chunks}")
            )
    if problems:
        raise UserError("batches cannot be split evenly over the mesh:\n" + format_problems(problems))


def check_host_memory(device: jax.Device) -> None:
    """Checks that a device can use pinned host memory.

    Raises:
      UserError: If it cannot.
    """
    if HOST_MEMORY not in (memory.kind for memory in device.addressable_memories()):
        raise UserError(
            f"optimizer.offload: JAX has no pinned host memory on {device.device_kind}; set it to false, and to save "
            "memory set optimizer.moments_dtype to bfloat16 or raise mesh.fsdp"
        )


def check_objectives(settings: Settings) -> None:
    """Checks that the settings give each objective the negatives that it needs.

    Raises:
      UserError: If an objective needs negatives and `negatives_per_query` is 0.
    """
    for task in settings.tasks:
        if OBJECTIVES[task.objective][task.name].needs_negatives and not settings.data.negatives_per_query:
            raise UserError(
                f"objective.{task.name}: {task.objective} compares positives with negatives; set "
                "data.negatives_per_query to at least 1"
            )


def check_negatives(settings: Settings, names: Sequence[str], datasets: Sequence[PreparedDataset]) -> None:
    """Checks that the data has the negatives that the objectives need.

    Raises:
      UserError: If an objective needs negatives and a dataset has none.
    """
    for task in settings.tasks:
        if OBJECTIVES[task.objective][task.name].needs_negatives:
            missing = [
                name
                for name, dataset in zip(names, datasets, strict=True)
                if dataset.task == task.name and not dataset.totals.with_negatives
            ]
            if missing:
                reason = (
                    f"objective.{task.name}: {task.objective} compares positives with negatives, which are missing in"
                )
                raise UserError(f"{reason}:\n{format_problems(missing)}")


def model_fingerprint(model: PretrainedModel) -> str:
    """Returns a hash of the config, weight dtypes and files of the model, but not of the values of its weights."""
    content = model.blueprint.model_dump(mode="json", include={"config", "prefix", "dtypes", "files"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
