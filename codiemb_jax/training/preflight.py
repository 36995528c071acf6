"""Finds out whether the steps of a configuration fit on given devices, and the smallest change with which they do."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from codiemb_jax.batch import StepTask
from codiemb_jax.cache import cache_folder
from codiemb_jax.checkpoints.families import get_family
from codiemb_jax.checkpoints.model import adapt_config, resolve_model_path
from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint, is_checkpoint
from codiemb_jax.config import Settings
from codiemb_jax.config_file import find_config, load_settings
from codiemb_jax.errors import UserError
from codiemb_jax.files import read_json
from codiemb_jax.models.attention import choose_backend
from codiemb_jax.models.build import Params, abstract_model
from codiemb_jax.remote import fetch_file, is_remote, remote_path
from codiemb_jax.sharding import make_mesh, row_shards
from codiemb_jax.training.ahead import trace_step
from codiemb_jax.training.chips import Chip, chip_of
from codiemb_jax.training.estimate import Shapes, StepEstimate, device_flops, estimate_step, state_bytes
from codiemb_jax.training.run import batch_layout, check_batch_sizes, check_objectives, with_platform_defaults

SHAPES = Path(__file__).parent.parent / "shapes"
"""config.json of the models of the recipes."""

QUERY_TOKENS, PASSAGE_TOKENS, LONGEST_PASSAGE = (40, 0.5), (250, 0.8), 1000
"""Assumed lengths of texts: mean and spread of a log-normal distribution, and the longest passage."""


@dataclass(frozen=True)
class Report:
    """What a configuration needs."""

    settings: Settings
    devices: int
    device_kind: str
    chip: Chip
    parameters: int
    state_bytes: int
    """Bytes of weights and moments per device."""
    host_bytes: int
    """Bytes of moments per device in the memory of its host."""
    shapes: dict[StepTask, Shapes]
    steps: dict[StepTask, StepEstimate]

    @property
    def fits(self) -> bool | None:
        """Whether all steps fit; None if it is not known how much memory the devices have."""
        if self.chip.memory is None:
            return None
        return all(step.fits for step in self.steps.values())


class Preflight:
    """Compiles the steps of a configuration for some devices."""

    def __init__(self, settings: Settings, devices: Sequence[Any]):
        """Checks the settings against the model and the devices.

        Args:
          settings: The settings.
          devices: The devices, or those of a topology description.

        Raises:
          UserError: If the model is unknown, or it, the mesh or the batch sizes are invalid.
        """
        check_objectives(settings)
        self.settings = with_platform_defaults(settings, devices[0].platform)
        self._devices, self._chip = devices, chip_of(devices[0])
        hf = model_config(settings.model.path)
        self._family = get_family(hf)
        max_tokens = settings.data.max_tokens()
        path = Path(settings.model.path) / "config.json"
        self._config = adapt_config(self._family.read_config(hf), self._family, settings.model, max_tokens, path)
        self._check(self.settings)

    def _check(self, settings: Settings) -> jax.sharding.Mesh:
        """Returns the mesh of valid settings."""
        mesh = make_mesh(settings.mesh, self._devices)
        check_batch_sizes(settings, row_shards(mesh))
        return mesh

    def report(self, settings: Settings | None = None) -> Report:
        """Compiles all steps. `settings` replace those of this object.

        Raises:
          UserError: If the settings cannot be used.
        """
        settings = settings or self.settings
        mesh = self._check(settings)
        _, params = self._model(settings, mesh)
        on_device, on_host = state_bytes(settings, params)
        shapes: dict[StepTask, Shapes] = {}
        steps: dict[StepTask, StepEstimate] = {}
        for task in settings.step_tasks:
            step, shapes[task] = self.trace(settings, task)
            if self._chip.memory is not None and on_device > self._chip.memory:  # no need to compile
                steps[task] = StepEstimate(on_device, None, False, device_flops(step, mesh), None, None, None)
            else:
                steps[task] = estimate_step(step, mesh, self._chip)
        return Report(
            settings=settings,
            devices=len(self._devices),
            device_kind=self._devices[0].device_kind,
            chip=self._chip,
            parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
            state_bytes=on_device,
            host_bytes=on_host,
            shapes=shapes,
            steps=steps,
        )

    def trace(self, settings: Settings, task: StepTask) -> tuple[jax.stages.Traced, Shapes]:
        """Traces the step of a task, and returns it with the shapes of its batch."""
        mesh = self._check(settings)
        graph, params = self._model(settings, mesh)
        shapes = self._shapes(settings, mesh, task)
        has_dropout = self._config.has_dropout
        return trace_step(settings, graph, params, task, shapes.layout, shapes.passages, has_dropout), shapes

    def _model(self, settings: Settings, mesh: jax.sharding.Mesh) -> tuple[Any, Params]:
        return abstract_model(self._family.model, self._config, settings.model, mesh)

    def _shapes(self, settings: Settings, mesh: Any, task: StepTask) -> Shapes:
        """Returns the shapes of a batch of texts with the assumed lengths."""
        data, config = settings.data, self._config
        backend = choose_backend(
            settings.model.attention_backend, mesh, settings.model.compute_dtype, config.kv_heads, config.head_dim
        )
        specs = {spec.name: spec for spec in settings.tasks}
        spec = specs["ir" if task == "mixed" and "ir" in specs else task if task != "mixed" else "sts"]
        random = np.random.default_rng(0)
        examples, passages = spec.global_batch_size, data.positives_per_query + data.negatives_per_query
        if spec.name == "sts":
            lengths = text_lengths(random, (examples, 2), *QUERY_TOKENS, data.query_max_tokens)
        else:
            longest = min(data.passage_max_tokens, LONGEST_PASSAGE)
            queries = text_lengths(random, (examples, 1), *QUERY_TOKENS, data.query_max_tokens)
            lengths = np.hstack([queries, text_lengths(random, (examples, passages), *PASSAGE_TOKENS, longest)])
        limit = data.max_tokens(task)
        group_size = examples // row_shards(mesh) if task == "mixed" else spec.group_size
        layout = batch_layout(settings, mesh, backend=backend)(lengths, limit, group_size)
        return Shapes(task, layout, lengths.shape[1] - 1, int(lengths.sum()))

    def smallest_change(self, report: Report) -> tuple[dict[str, Any], Report] | None:
        """Looks for settings with which all steps fit: first changes of one setting, from the cheapest.

        Returns:
          The changed settings and the report with them; None if nothing that was tried fits.
        """
        counts = self._chunk_counts(report)
        for changes in candidates(report.settings, len(self._devices)):
            options = (
                [changes | {"encode_chunks": count} for count in counts] if "encode_chunks" in changes else [changes]
            )
            if found := self._first_that_fits(options):
                return found
        return None

    def _chunk_counts(self, report: Report) -> list[int]:
        """Returns the numbers of chunks to try."""
        settings = report.settings
        rows = max(shapes.layout.rows for shapes in report.shapes.values())
        if settings.data.packing:
            return chunk_counts(settings.encode_chunks, rows)
        shards = row_shards(self._check(settings))
        examples = math.gcd(*(task.global_batch_size // shards for task in settings.tasks))
        return [count for count in range(settings.encode_chunks + 1, examples + 1) if examples % count == 0]

    def _first_that_fits(self, options: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], Report] | None:
        """Returns the first of some changes that fits, if each needs less memory than the one before."""
        best: tuple[dict[str, Any], Report] | None = None
        low, high, tried = 0, len(options) - 1, len(options) - 1  # if the last does not fit, none does
        while low <= high:
            try:
                report = self.report(with_changes(self.settings, options[tried]))
            except UserError:  # the change cannot be combined with other settings
                return best
            if report.fits:
                best, high = (options[tried], report), tried - 1
            else:
                low = tried + 1
            tried = (low + high) // 2
        return best


def model_config(path: str) -> dict[str, Any]:
    """Returns the config.json of a model: of a folder, of a checkpoint, or of the model of a recipe.

    Raises:
      UserError: If it is none of these.
    """
    if is_remote(path):
        return read_json(fetch_file(remote_path(path) / "config.json", cache_folder()), dict)
    if not Path(path).expanduser().is_dir():
        for shape in sorted(SHAPES.glob("*.json")):
            if load_settings(find_config(shape.stem)).model.path == path:
                return read_json(shape, dict)
        raise UserError(
            f"model.path: {path} is neither a folder nor the model of a recipe; give a folder with its config.json"
        )
    folder = resolve_model_path(path)
    return OrbaxCheckpoint(folder).config if is_checkpoint(folder) else read_json(folder / "config.json", dict)


def text_lengths(
    random: np.random.Generator, shape: tuple[int, ...], mean: float, spread: float, limit: int
) -> np.ndarray:
    """Returns random lengths of texts, int [*shape]."""
    lengths = random.lognormal(np.log(mean) - spread**2 / 2, spread, shape)
    return np.clip(lengths, min(8, limit), limit).round().astype(int)


def candidates(settings: Settings, devices: int) -> Iterator[dict[str, Any]]:
    """Yields changed settings that need less memory. `encode_chunks: None` stands for any number of chunks."""
    chunks: dict[str, Any] = {"encode_chunks": None}
    mesh = {"mesh.data": 1, "mesh.fsdp": devices // settings.mesh.tensor}
    moments = {"optimizer.moments_dtype": "bfloat16"}
    offload = {"optimizer.offload": True}
    yield chunks
    if settings.model.remat != "full":
        yield {"model.remat": "full"}
    if settings.mesh.fsdp != mesh["mesh.fsdp"]:
        yield mesh
    if settings.optimizer.moments_dtype is None:
        yield moments
    if not settings.optimizer.offload:
        yield offload
    yield mesh | chunks
    yield mesh | chunks | moments
    yield mesh | chunks | moments | offload


def chunk_counts(current: int, rows: int) -> list[int]:
    """Returns the numbers of chunks to try: powers of two, and one row per chunk."""
    return [*(count for power in range(1, 16) if current < (count := 2**power) < rows), *([rows] * (rows > current))]


def with_changes(settings: Settings, changes: dict[str, Any]) -> Settings:
    """Returns settings with other values, whose names are like those of flags."""
    values = settings.model_dump(mode="python")
    for name, value in changes.items():
        *sections, key = name.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[key] = value
    return Settings.model_validate(values)
