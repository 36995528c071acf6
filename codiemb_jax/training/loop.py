"""A run from start to export: its steps, metrics and checkpoints."""

from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from codiemb_jax.batch import StepTask
from codiemb_jax.checkpoints.export import write_export
from codiemb_jax.checkpoints.model import PretrainedModel
from codiemb_jax.checkpoints.orbax import RunCheckpoints, restore_passthrough, restore_run
from codiemb_jax.config import CheckpointSettings, Settings
from codiemb_jax.data.loader import batches
from codiemb_jax.data.sampler import StepPlan
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import Params
from codiemb_jax.sharding import row_sharding
from codiemb_jax.training.log import MetricsLog
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.run import Run
from codiemb_jax.training.run_folder import HeldOutMetrics
from codiemb_jax.training.schedule import learning_rate
from codiemb_jax.training.state import TrainState, abstract_state, initial_state
from codiemb_jax.training.step import Metrics, make_step

Evaluate = Callable[[Params], HeldOutMetrics]


def train(run: Run, evaluate: Evaluate) -> tuple[HeldOutMetrics, HeldOutMetrics]:
    """Trains, or continues what `output_dir` holds; exports.  Returns the held-out metrics before and after."""
    settings, model, folder = run.start.settings, run.start.model, run.folder
    with jax.set_mesh(run.start.mesh):
        done = folder.done()
        if done:  # all weights are those of the checkpoint: the model's folder may have changed
            initial, passthrough = None, restore_passthrough(folder.checkpoints, done)
        else:
            initial = model.load(settings.seed)
            passthrough = {name: np.asarray(weight) for name, weight in model.stream_passthrough().items()}
        log_overrides(settings, model)
        if initial is not None:
            folder.begin(settings, run.inputs)
            folder.write_before(evaluate(initial))
        params = run_steps(run, initial, passthrough)
        after = evaluate(params)
        if settings.export:
            folder.write_export(
                partial(write_export, params=params, passthrough=passthrough, blueprint=model.blueprint, stock=True)
            )
    return folder.write_after(after), after


def run_steps(run: Run, initial: Params | None, passthrough: Mapping[str, np.ndarray]) -> Params:
    """Runs all steps, or (initial: None) those after the newest checkpoint; returns the trained parameters.

    `initial` is donated to the first step.
    """
    settings, model, folder, mesh = run.start.settings, run.start.model, run.folder, run.start.mesh
    schedule = learning_rate(settings.optimizer, run.steps)
    optimizer = make_optimizer(settings.optimizer, schedule)
    layout = abstract_state(optimizer, model.abstract)
    done = folder.done()
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
    waiting: tuple[StepPlan, Metrics] | None = None  # a step's metrics are read while the next one runs
    checkpoints = RunCheckpoints(folder.checkpoints, settings.checkpoint.keep)
    # Whatever ends the loop, a checkpoint on its way to disk arrives there.
    with closing(checkpoints), MetricsLog(folder.metrics, folder.tensorboard, run.names, done, run.steps) as log:
        for plan, batch in batches(run.plan, run.data_sets, row_sharding(mesh), start=done, stop=run.steps):
            state, metrics = steps[plan.task](state, np.int32(plan.number), batch)
            if waiting:
                log.write(*waiting)
            waiting = (plan, metrics)
            done = plan.number + 1
            if is_due(settings.checkpoint, done, run.plan.steps_per_epoch) or done == run.steps:
                # The lines of all steps that a checkpoint holds must be on disk before it.
                log.write(*waiting)
                log.flush()
                waiting = None
                check_finite(state.params, done)
                checkpoints.save(done, state.params, state.opt_state, passthrough, model.blueprint)
    return state.params


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def check_finite(params: Params, done: int) -> None:
    """Checks the weights after `done` steps: a step's own metrics do not show what its update has done.

    Raises:
      UserError: some are NaN or infinite.
    """
    if not _all_finite(params):
        raise UserError(
            f"step {done - 1}: its update made weights NaN or infinite; lower optimizer.learning_rate or "
            "optimizer.weight_decay or set optimizer.clip_norm, in another output_dir"
        )


def is_due(settings: CheckpointSettings, done: int, steps_per_epoch: int) -> bool:
    """Whether to save a checkpoint when `done` steps are done."""
    steps, epochs = settings.every_steps, settings.every_epochs
    return bool((steps and done % steps == 0) or (epochs and done % (epochs * steps_per_epoch) == 0))


def log_overrides(settings: Settings, model: PretrainedModel) -> None:
    """A line for each setting by which the model will encode differently from what its folder says."""
    console = Console(stderr=True)
    for name, stored in model.folder.stored.items():
        now = getattr(settings.model, name)
        if stored is not None and stored != now:
            console.print(
                f"note: model.{name} is {now}, {Path(settings.model.path)} has {stored}", soft_wrap=True, markup=False
            )
