"""Runs training from the first step to the export."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import TypeVar

import jax
import numpy as np
from rich.console import Console

from codiemb_jax.cache import shown
from codiemb_jax.checkpoints.export import write_export
from codiemb_jax.checkpoints.hub import create_repository, upload_export
from codiemb_jax.checkpoints.model import PretrainedModel
from codiemb_jax.checkpoints.run_checkpoints import RunCheckpoints, restore_params, restore_passthrough, restore_run
from codiemb_jax.config import CheckpointSettings, Settings
from codiemb_jax.data.loader import batches
from codiemb_jax.distributed import (
    check_same,
    exchange,
    first_value,
    is_first_process,
    log_console,
    preemption,
    to_host,
)
from codiemb_jax.models.build import Params
from codiemb_jax.sharding import replicate, row_sharding
from codiemb_jax.training.finite import check_weights
from codiemb_jax.training.monitor import Evaluate, RunMonitor, monitored
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.run import Run, attention_backend
from codiemb_jax.training.run_folder import HeldOutMetrics
from codiemb_jax.training.schedule import make_schedule
from codiemb_jax.training.state import TrainState, abstract_state, initial_state
from codiemb_jax.training.step import make_step

Item = TypeVar("Item")


class Preempted(Exception):
    """The run was asked to stop, and its state has been saved."""


def train(run: Run, evaluate: Evaluate, data: str) -> tuple[HeldOutMetrics, HeldOutMetrics]:
    """Trains or resumes a run and exports the model.

    Args:
      run: The run.
      evaluate: Computes the held-out metrics of parameters.
      data: Digest of the held-out data.

    Returns:
      The held-out metrics before training, in the first process, and of the exported model.

    Raises:
      UserError: If training diverges, or the output folder cannot be written.
      Preempted: If a process has received SIGTERM.
    """
    settings, model, folder = run.setup.settings, run.setup.model, run.folder
    check_same({"held-out data": data}, "start all of them with the same held-out data")
    with jax.set_mesh(run.setup.mesh), folder.write_errors(), ExitStack() as stack:
        done = first_value(folder.done)
        if settings.push_to_hub and is_first_process():
            create_repository(settings.push_to_hub)  # up front, so that missing permissions show before training
        if done:  # takes all weights from the checkpoint, because the model's folder may have changed
            initial, passthrough = None, restore_passthrough(folder.checkpoints, done)
        else:
            initial = model.load(settings.seed)
            passthrough = {name: np.asarray(weight) for name, weight in model.stream_passthrough().items()}
        # Locked only now, so that a model that cannot be loaded leaves no folder behind.
        if is_first_process():
            stack.enter_context(folder.locked())
            if initial is not None:
                folder.create(settings, run.inputs)
        folder.check_shared()
        console = log_console()
        xla_steps = ", xla in training steps because attention has dropout" if model.config.attention_dropout else ""
        console.print(f"attention backend: {attention_backend(run.setup)}{xla_steps}")
        log_overrides(console, settings, model)
        log_data_problems(console, run)
        if initial is not None:
            untrained = evaluate(initial)
            if is_first_process():
                folder.write_before(untrained)
        with monitored(run, done, evaluate, data) as monitor:
            params, done = run_steps(run, initial, passthrough, done, monitor)
        after = monitor.selection.metrics_after(done)
        if after is None:
            after = evaluate(params)
        weights: Params = to_host(params) if settings.export else {}
        before: HeldOutMetrics = {}
        if is_first_process():
            before = folder.write_after(after, done)
            if settings.export:
                write = partial(
                    write_export, params=weights, passthrough=passthrough, blueprint=model.blueprint, stock=True
                )
                name, shown_path = settings.push_to_hub, folder.shown(folder.export)
                folder.write_export(write, partial(upload_export, name=name, shown=shown_path) if name else None)
        exchange(None)  # JAX ends a process whose others have left, after five minutes
        return before, after


def run_steps(
    run: Run, initial: Params | None, passthrough: Mapping[str, np.ndarray], done: int, monitor: RunMonitor
) -> tuple[Params, int]:
    """Runs the steps, saves checkpoints and evaluates.

    Args:
      run: The run.
      initial: The initial parameters, donated to the first step; None resumes from the newest checkpoint.
      passthrough: Weights that training does not change, saved with every checkpoint.
      done: Number of steps done at the newest checkpoint; 0 if there is none.
      monitor: Logs and evaluates the steps.

    Returns:
      The parameters to export, and the number of steps after which they were reached.
    """
    settings, model, folder, mesh = run.setup.settings, run.setup.model, run.folder, run.setup.mesh
    schedule = make_schedule(settings.optimizer, run.steps)
    optimizer = make_optimizer(settings.optimizer, schedule)
    layout = abstract_state(optimizer, model.abstract, settings.optimizer.offload)
    if initial is None:
        log_console().print(f"continuing from step {done} of {run.steps}")
        state = TrainState(*restore_run(folder.checkpoints, done, *layout))
    else:
        state = initial_state(optimizer, initial, layout)
    steps = {
        task: make_step(model.graph, optimizer, schedule, settings, mesh, layout, task, model.config.has_dropout)
        for task in settings.step_tasks
    }
    selection = monitor.selection
    with preemption() as is_preempted, ExitStack() as stack:
        if settings.evaluation.keep_best and selection.best and selection.best.step != selection.kept:
            log_console().print(f"note: the best checkpoint so far, that after {selection.best.step} steps, is missing")
        # Closing waits for a checkpoint that is being saved, even after an error.
        checkpoints = stack.enter_context(
            closing(RunCheckpoints(folder.checkpoints, settings.checkpoint.keep, selection.kept))
        )

        def save() -> None:
            checkpoints.save(done, state.params, state.opt_state, passthrough, model.blueprint)

        if selection.is_due(done):  # the run was stopped before this evaluation
            monitor.evaluate(state.params, done)
            monitor.flush()
            checkpoints.best = selection.kept
        stop = done if selection.should_stop else run.steps
        for plan, batch in one_ahead(batches(run.plan, run.datasets, row_sharding(mesh), start=done, stop=stop)):
            state, metrics = steps[plan.task](state, replicate(np.int32(plan.number), mesh), batch)
            monitor.add(plan, metrics)
            done = plan.number + 1
            preempted = is_preempted(plan.number)
            due = is_checkpoint_due(settings.checkpoint, done, run.plan.steps_per_epoch) or done == run.steps
            evaluating = selection.is_due(done) and not preempted
            if due or evaluating or preempted:
                monitor.finish()
                check_weights(state.params, done)
                if due or preempted:
                    monitor.flush()  # the lines of all steps before a checkpoint must be on disk before it
                    save()
                if evaluating:
                    monitor.evaluate(state.params, done)
                    monitor.flush()
                    if not due and (selection.kept == done or selection.should_stop):
                        save()
                    checkpoints.best = selection.kept
            if preempted:
                raise Preempted
            if selection.should_stop:
                break
        if selection.should_stop and done < run.steps:
            patience = settings.evaluation.patience
            log_console().print(f"stopped after {done} steps: no improvement in {patience} evaluations")
    params = state.params
    if selection.kept and selection.kept != done:
        del state, params  # makes room on the devices
        done = selection.kept
        log_console().print(f"taking the best checkpoint, that after {done} steps")
        exchange(None)  # until all processes have closed the checkpoints
        params = restore_params(folder.checkpoints, done, layout.params)
    return params, done


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields items, with the next one fetched in a thread: a batch is placed on the devices while a step runs."""
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item


def is_checkpoint_due(settings: CheckpointSettings, done: int, steps_per_epoch: int) -> bool:
    """Whether to save a checkpoint after `done` steps."""
    steps, epochs = settings.every_steps, settings.every_epochs
    return bool((steps and done % steps == 0) or (epochs and done % (epochs * steps_per_epoch) == 0))


def log_overrides(console: Console, settings: Settings, model: PretrainedModel) -> None:
    """Logs each model setting that differs from the one stored in the model's folder."""
    for name, stored in model.folder.stored_settings.items():
        current = getattr(settings.model, name)
        if stored is not None and stored != current:
            console.print(
                f"note: model.{name} is {current}, but {model.folder.path} has {stored}",
                soft_wrap=True,
                markup=False,
            )


def log_data_problems(console: Console, run: Run) -> None:
    """Logs training files that are also held-out data, and files with scores outside [0, 1]."""
    held_out = {path.resolve() for path in run.held_out}
    for dataset in run.datasets:
        if dataset.path.resolve() in held_out:
            name = shown(dataset.path)
            console.print(f"note: {name} is both training and held-out data", soft_wrap=True, markup=False)
        totals = dataset.totals
        if totals.min_score < 0 or totals.max_score > 1:
            span = f"{totals.min_score:g} to {totals.max_score:g}"
            name = shown(dataset.path)
            console.print(f"note: {name} has scores from {span}; scale them to [0, 1]", soft_wrap=True, markup=False)
