"""python -m codiemb_jax.train --config FILE [--section.key VALUE ...]

Trains an encoder: config -> data -> steps -> checkpoints -> export.  Started again with the same command, it
continues from the newest checkpoint of `output_dir`.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from codiemb_jax.config import Settings, load_settings
from codiemb_jax.data.loader import batches
from codiemb_jax.data.prepare import PreparedDataSet, cache_folder, prepare
from codiemb_jax.data.prompts import PromptEncoder
from codiemb_jax.data.records import Task, find_files
from codiemb_jax.data.sampler import Plan, Source, StepPlan
from codiemb_jax.encode import Embedder
from codiemb_jax.errors import UserError, listed, run_program
from codiemb_jax.evaluate import Figures, HeldOut, evaluate, read_held_out
from codiemb_jax.export import check_exportable, write_export
from codiemb_jax.files import read_json, write_whole
from codiemb_jax.models.weights import Params
from codiemb_jax.training.checkpoint import Checkpoints, has_checkpoints
from codiemb_jax.training.mesh import by_row, make_mesh, row_shards
from codiemb_jax.training.metrics import MetricsLog
from codiemb_jax.training.model import ModelFolder, open_model
from codiemb_jax.training.schedule import learning_rate
from codiemb_jax.training.state import TrainState, abstract_opt_state, initial_opt_state, make_optimizer
from codiemb_jax.training.step import Metrics, make_step

TASKS: tuple[Task, ...] = ("ir", "sts")

FREE_TO_CHANGE = (
    "output_dir", "mesh", "distributed", "encode_chunks", "checkpoint", "export", "evaluation", "model.remat",
)  # fmt: skip
"""Settings that may differ when a run is continued: they do not change what is computed."""

DEVICES = "devices with rows of their own (mesh.data x mesh.fsdp)"
"""Among a run's inputs with sampler: mixed, whose steps are made of each device's own data set."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m codiemb_jax.train", description=__doc__, add_help=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, YAML")
    parser.add_argument("-h", "--help", action="store_true")
    known, flags = parser.parse_known_args(arguments)
    if known.help:
        parser.print_help()
        print("\nEvery setting is also a flag; docs/settings.md describes them all.")
        return
    if known.config is None:
        raise UserError("--config FILE is missing: give the settings, for example configs/quickstart.yaml")
    train(load_settings(known.config, flags))


def train(settings: Settings) -> None:
    """Trains as the settings say, or continues the run of the same settings in `output_dir`.

    Whatever the user may have got wrong is found before anything is written.
    """
    settings = with_platform_defaults(settings)
    mesh = make_mesh(settings.mesh)
    check_batches(settings, row_shards(mesh))
    longest = max(settings.data.query_max_tokens, settings.data.passage_max_tokens)
    model = open_model(settings.model, settings.prompt, mesh, longest)
    if settings.export:
        check_exportable(model.blueprint)
    encoder = PromptEncoder(model.blueprint.tokenizer(), settings.prompt)
    held_out = read_held_out(settings.evaluation, encoder, longest)
    data_sets = prepare_data(settings, encoder)
    sources = [Source(str(data_set.path), data_set.task, data_set.index) for data_set in data_sets]
    plan = Plan(sources, settings.data, settings.seed, row_shards(mesh))
    inputs = inputs_of(settings, model, data_sets, mesh)
    if (settings.output_dir / "checkpoints").is_file():
        raise UserError(f"{settings.output_dir / 'checkpoints'}: is a file, and should be a folder; move it away")
    continued = has_checkpoints(settings.output_dir / "checkpoints")
    if continued:
        check_same_run(settings, inputs)
    embedder = Embedder(
        model.graph, encoder, mesh, longest, settings.prompt.default_instruction, settings.model.normalize
    )

    with jax.set_mesh(mesh):
        untrained = {name: np.asarray(weight) for name, weight in model.stream_untrained().items()}
        initial = None if continued else model.load(settings.seed)
        tell_what_differs(settings, model)
        try:
            settings.output_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir: {settings.output_dir} cannot be made: {error.strerror}") from error
        if not continued:
            resolved = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            write_whole(settings.output_dir / "config.yaml", resolved)
            write_whole(settings.output_dir / "inputs.json", json.dumps(inputs, indent=2) + "\n")
        checkpoints = Checkpoints(settings.output_dir / "checkpoints", settings.checkpoint, plan.steps_per_epoch)
        before = figures_before(settings, held_out, embedder, initial)
        params = run_steps(settings, model, plan, data_sets, checkpoints, initial, untrained)
        after = evaluate(embedder.with_params(params), held_out)
        if settings.export:
            write_export(settings.output_dir / "export", params, untrained, model.blueprint, stock=True)
    report(settings, before, after)


def run_steps(
    settings: Settings,
    model: ModelFolder,
    plan: Plan,
    data_sets: Sequence[PreparedDataSet],
    checkpoints: Checkpoints,
    initial: Params | None,
    untrained: Mapping[str, np.ndarray],
) -> Params:
    """Runs all steps, or (initial: None) those after the newest checkpoint; returns the trained parameters.

    `initial` is donated to the first step.
    """
    steps = settings.optimizer.max_steps or settings.optimizer.epochs * plan.steps_per_epoch
    schedule = learning_rate(settings.optimizer, steps)
    optimizer = make_optimizer(settings.optimizer, schedule)
    layout = TrainState(model.abstract, abstract_opt_state(optimizer, model.abstract))
    done = checkpoints.latest()
    if initial is None:
        Console(stderr=True).print(f"continuing from step {done} of {steps}")
        state = checkpoints.restore(done, layout)
    else:
        state = TrainState(initial, initial_opt_state(optimizer, initial))
    mesh = jax.tree.leaves(layout.params)[0].sharding.mesh
    step = make_step(model.graph, optimizer, schedule, settings, mesh, layout, model.config.has_dropout)
    names = [data_set.name for data_set in data_sets]
    waiting: tuple[StepPlan, Metrics] | None = None  # a step's metrics are read while the next one runs
    # Whatever ends the loop, a checkpoint on its way to disk arrives there.
    with closing(checkpoints), MetricsLog(settings.output_dir, names, done, steps) as log:
        for step_plan, batch in batches(plan, data_sets, by_row(mesh), start=done, stop=steps):
            state, metrics = step(state, np.int32(step_plan.number), batch)
            if waiting:
                log.write(*waiting)
            waiting = (step_plan, metrics)
            done = step_plan.number + 1
            if checkpoints.due(done) or done == steps:
                # The lines of all steps that a checkpoint holds must be on disk before it.
                log.write(*waiting)
                log.flush()
                waiting = None
                checkpoints.save(done, state, untrained, model.blueprint)
    return state.params


def with_platform_defaults(settings: Settings) -> Settings:
    """On a CPU the model computes in float32 unless the settings name a type: bfloat16 is slower there."""
    if jax.default_backend() != "cpu" or "compute_dtype" in settings.model.model_fields_set:
        return settings
    model = settings.model.model_copy(update={"compute_dtype": "float32"})
    return settings.model_copy(update={"model": model})


def check_batches(settings: Settings, shards: int) -> None:
    """UserError unless every device gets as many examples in every chunk and, with sampler: mixed, whole pools."""
    problems = []
    pools = {"ir": "ir_pool_size", "sts": "sts_list_size"}
    for task in TASKS:
        size = getattr(settings.data, f"{task}_global_batch_size")
        pool = getattr(settings.objective, pools[task])
        if not getattr(settings.data, task):
            continue
        if settings.data.sampler == "mixed" and pool and size // shards % pool:
            problems.append(
                f"objective.{pools[task]} {pool} must divide what a device holds in a step of sampler: mixed, "
                f"data.{task}_global_batch_size {size} / {shards} devices; set it to null to compare all of that"
            )
        if size % (shards * settings.encode_chunks):
            problems.append(
                f"data.{task}_global_batch_size {size} must be a multiple of {shards * settings.encode_chunks}: "
                f"{shards} devices with rows of their own (mesh.data x mesh.fsdp) x encode_chunks "
                f"{settings.encode_chunks}"
            )
    if problems:
        raise UserError("batch sizes do not divide over the mesh:\n" + listed(problems))


def tell_what_differs(settings: Settings, model: ModelFolder) -> None:
    """A line for each setting by which the model will encode otherwise than its folder says it does so far."""
    console = Console(stderr=True)
    for name, stored in model.stored.items():
        if stored is not None and stored != getattr(settings.model, name):
            now = getattr(settings.model, name)
            console.print(f"note: model.{name} is {now}, {model.path} has {stored}", soft_wrap=True, markup=False)


def inputs_of(
    settings: Settings, model: ModelFolder, data_sets: Sequence[PreparedDataSet], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """What a run's steps depend on beside its settings: the model's config, tokenizer and weights' types and every data
    file, by fingerprint; with sampler: mixed, how many devices have rows of their own."""
    blueprint = model.blueprint.to_json()
    content = {name: blueprint[name] for name in ("config", "prefix", "dtypes", "files")}
    inputs: dict[str, Any] = {
        "model.path": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    }
    inputs |= {str(data_set.path): data_set.folder.name for data_set in data_sets}
    if settings.data.sampler == "mixed":
        inputs[DEVICES] = row_shards(mesh)
    return inputs


def check_same_run(settings: Settings, inputs: Mapping[str, Any]) -> None:
    """UserError if output_dir holds checkpoints of a run that computes something else."""
    folder = settings.output_dir
    try:
        earlier = _flat(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        earlier_inputs = read_json(folder / "inputs.json", dict)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError, UserError) as error:
        raise UserError(
            f"{folder} holds checkpoints, but config.yaml or inputs.json, which tell of what run, cannot be read "
            f"({error}); put them back, or start over in another output_dir"
        ) from error
    now = _flat(settings.model_dump(mode="json"))
    differences = [
        f"{name}: {earlier.get(name)} there, {now.get(name)} now"
        for name in sorted(earlier.keys() | now.keys())
        if earlier.get(name) != now.get(name) and not name.startswith(FREE_TO_CHANGE)
    ]
    differences += [
        f"{name}: {there} there, {inputs.get(name)} now" if name == DEVICES else f"{name}: its content has changed"
        for name, there in sorted({**dict.fromkeys(inputs), **earlier_inputs}.items())
        if there != inputs.get(name)
    ]
    if differences:
        raise UserError(
            f"{settings.output_dir} holds a run with other settings; give the same settings to continue it, or another "
            "output_dir to start a new one:\n" + listed(differences)
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def prepare_data(settings: Settings, encoder: PromptEncoder) -> list[PreparedDataSet]:
    """Every file as a tokenised data set, retrieval first, in the order of their paths."""
    limits = {name: getattr(settings.data, name) for name in ("query_max_tokens", "passage_max_tokens")}
    return [
        prepare(path, task, encoder, cache=cache_folder(), **limits)
        for task in TASKS
        for path in find_files(getattr(settings.data, task), f"data.{task}")
    ]


def figures_before(
    settings: Settings, held_out: Sequence[HeldOut], embedder: Embedder, initial: Params | None
) -> Figures:
    """Figures of the model as it came; a continued run takes them from where its start wrote them."""
    path = settings.output_dir / "evaluation.json"
    if initial is None:
        before = read_json(path, dict).get("before") if path.exists() else {}
        if not isinstance(before, dict):
            raise UserError(f"{path}: holds no figures of `before`; put the file back, or remove it to go on without")
        return before
    before = evaluate(embedder.with_params(initial), held_out)
    write_whole(path, json.dumps({"before": before}, indent=2) + "\n")
    return before


def report(settings: Settings, before: Figures, after: Figures) -> None:
    """Prints and keeps the held-out figures."""
    write_whole(
        settings.output_dir / "evaluation.json", json.dumps({"before": before, "after": after}, indent=2) + "\n"
    )
    table = Table("held-out", "before", "after", title=None)
    for name, figure in after.items():
        table.add_row(name, f"{before[name]:.4f}" if name in before else "", f"{figure:.4f}")
    console = Console()
    if after:
        console.print(table)
    if settings.export:
        console.print(f"exported to {settings.output_dir / 'export'}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_program(main)
