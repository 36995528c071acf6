"""Runs training from the first step to the export."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from codiemb_jax.batch import TASKS, StepTask
from codiemb_jax.checkpoints.export import write_export
from codiemb_jax.checkpoints.model import PretrainedModel
from codiemb_jax.checkpoints.orbax import RunCheckpoints, restore_passthrough, restore_run
from codiemb_jax.config import CheckpointSettings, Settings
from codiemb_jax.data.loader import batches
from codiemb_jax.data.sampler import StepPlan
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import Params
from codiemb_jax.sharding import replicate, row_sharding
from codiemb_jax.training.log import MetricsLog
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.run import Run, attention_backend, held_out_paths
from codiemb_jax.training.run_folder import HeldOutMetrics
from codiemb_jax.training.schedule import make_schedule
from codiemb_jax.training.state import TrainState, abstract_state, initial_state
from codiemb_jax.training.step import Metrics, make_step

Evaluate = Callable[[Params], HeldOutMetrics]
Item = TypeVar("Item")


def train(run: Run, evaluate: Evaluate) -> tuple[HeldOutMetrics, HeldOutMetrics]:
    """Trains or resumes a run and exports the model.

    Args:
      run: The run.
      evaluate: Computes the held-out metrics of parameters.

    Returns:
      The held-out metrics before and after training.

    Raises:
      UserError: If training diverges, or the output folder cannot be written.
    """
    settings, model, folder = run.setup.settings, run.setup.model, run.folder
    with jax.set_mesh(run.setup.mesh), folder.write_errors():
        done = folder.latest_step()
        if done:  # takes all weights from the checkpoint, because the model's folder may have changed
            initial, passthrough = None, restore_passthrough(folder.checkpoints, done)
        else:
            initial = model.load(settings.seed)
            passthrough = {name: np.asarray(weight) for name, weight in model.stream_passthrough().items()}
        Console(stderr=True).print(f"attention backend: {attention_backend(run.setup)}")
        log_overrides(settings, model)
        log_data_problems(run)
        if initial is not None:
            folder.create(settings, run.inputs)
            folder.write_before(evaluate(initial))
        params = run_steps(run, initial, passthrough)
        after = evaluate(params)
        if settings.export:
            folder.write_export(
                partial(write_export, params=params, passthrough=passthrough, blueprint=model.blueprint, stock=True)
            )
        return folder.write_after(after), after


def run_steps(run: Run, initial: Params | None, passthrough: Mapping[str, np.ndarray]) -> Params:
    """Runs the steps and saves checkpoints.

    Args:
      run: The run.
      initial: The initial parameters, donated to the first step; None resumes from the newest checkpoint.
      passthrough: Weights that training does not change, saved with every checkpoint.

    Returns:
      The trained parameters.
    """
    settings, model, folder, mesh = run.setup.settings, run.setup.model, run.folder, run.setup.mesh
    schedule = make_schedule(settings.optimizer, run.steps)
    optimizer = make_optimizer(settings.optimizer, schedule)
    layout = abstract_state(optimizer, model.abstract, settings.optimizer.offload)
    done = folder.latest_step()
    if initial is None:
        Console(stderr=True).print(f"continuing from step {done} of {run.steps}")
        state = TrainState(*restore_run(folder.checkpoints, done, *layout))
    else:
        state = initial_state(optimizer, initial, layout)
    mixed = settings.data.sampler == "mixed"
    tasks: list[StepTask] = ["mixed"] if mixed else [task.name for task in settings.tasks]
    steps = {
        task: make_step(model.graph, optimizer, schedule, settings, mesh, layout, task, model.config.has_dropout)
        for task in tasks
    }
    pending: tuple[StepPlan, Metrics] | None = None  # the metrics of a step are fetched while the next one runs
    checkpoints = RunCheckpoints(folder.checkpoints, settings.checkpoint.keep)
    # Closing waits for a checkpoint that is being saved, even after an error.
    with closing(checkpoints), MetricsLog(folder.metrics, folder.tensorboard, run.names, done, run.steps) as log:
        for plan, batch in one_ahead(batches(run.plan, run.datasets, row_sharding(mesh), start=done, stop=run.steps)):
            state, metrics = steps[plan.task](state, replicate(np.int32(plan.number), mesh), batch)
            if pending:
                log.write(*pending)  # blocks, so that at most two steps are in flight
            pending = (plan, metrics)
            done = plan.number + 1
            if is_checkpoint_due(settings.checkpoint, done, run.plan.steps_per_epoch) or done == run.steps:
                # The lines of all steps before a checkpoint must be on disk before the checkpoint.
                log.write(*pending)
                log.flush()
                pending = None
                check_finite(state.params, done)
                checkpoints.save(done, state.params, state.opt_state, passthrough, model.blueprint)
    return state.params


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields items, with the next one fetched in a thread: a batch is placed on the devices while a step runs."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def check_finite(params: Params, done: int) -> None:
    """Checks the weights after `done` steps, because the metrics of a step are computed before its update.

    Raises:
      UserError: If any weight is NaN or infinite.
    """
    if not jax.device_get(_all_finite(params)):
        raise UserError(
            f"step {done - 1}: the update made weights NaN or infinite; lower optimizer.learning_rate or "
            "optimizer.weight_decay or set optimizer.clip_norm, and use another output_dir"
        )


def is_checkpoint_due(settings: CheckpointSettings, done: int, steps_per_epoch: int) -> bool:
    """Whether to save a checkpoint after `done` steps."""
    steps, epochs = settings.every_steps, settings.every_epochs
    return bool((steps and done % steps == 0) or (epochs and done % (epochs * steps_per_epoch) == 0))


def log_overrides(settings: Settings, model: PretrainedModel) -> None:
    """Logs each model setting that differs from the one stored in the model's folder."""
    console = Console(stderr=True)
    for name, stored in model.folder.stored_settings.items():
        current = getattr(settings.model, name)
        if stored is not None and stored != current:
            console.print(
                f"note: model.{name} is {current}, but {Path(settings.model.path)} has {stored}",
                soft_wrap=True,
                markup=False,
            )


def log_data_problems(run: Run) -> None:
    """Logs training files that are also held-out data, and files with scores outside [0, 1]."""
    console = Console(stderr=True)
    settings = run.setup.settings
    held_out = {path.resolve() for task in TASKS for path in held_out_paths(settings, task)}
    for dataset in run.datasets:
        if dataset.path.resolve() in held_out:
            console.print(f"note: {dataset.path} is both training and held-out data", soft_wrap=True, markup=False)
        totals = dataset.totals
        if totals.min_score < 0 or totals.max_score > 1:
            span = f"{totals.min_score:g} to {totals.max_score:g}"
            console.print(
                f"note: {dataset.path} has scores from {span}; scale them to [0, 1]", soft_wrap=True, markup=False
            )
