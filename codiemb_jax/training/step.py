"""One training step of one task: batch -> vectors -> loss -> gradient -> update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from codiemb_jax.batch import Batch, StepTask, TokenRows
from codiemb_jax.config import Settings
from codiemb_jax.models.build import random_key
from codiemb_jax.models.embed import embed, embed_with_middle, token_keys
from codiemb_jax.models.layers import TextModel
from codiemb_jax.models.pooling import unit
from codiemb_jax.objectives.groups import Examples, Groups, Parts
from codiemb_jax.objectives.mixed import mixed
from codiemb_jax.objectives.registry import OBJECTIVES
from codiemb_jax.sharding import ROW_AXES, replicated, row_sharding, row_shards
from codiemb_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
Loss = tuple[jax.Array, Parts]


def step_objective(settings: Settings, task: StepTask) -> tuple[bool, Callable[[Examples], Loss]]:
    """Whether a step of `task` reads the middle layer, and one device's examples -> the global batch's loss."""
    chosen = {spec.name: spec for spec in settings.tasks if task in (spec.name, "mixed")}
    objectives = {name: OBJECTIVES[spec.objective][name] for name, spec in chosen.items()}
    needs_middle = any(objective.needs_middle(settings.objective) for objective in objectives.values())
    if task == "mixed":
        sizes = {name: spec.group_size for name, spec in chosen.items()}
        return needs_middle, partial(
            mixed, settings=settings.objective, objectives=objectives, sizes=sizes, axes=ROW_AXES
        )
    groups = Groups(chosen[task].group_size, ROW_AXES)
    return needs_middle, lambda examples: objectives[task].compute(examples, settings.objective, groups)


def embed_in_chunks(
    graph: Any,
    params: Any,
    rows: TokenRows,
    text_ids: jax.Array,
    key: jax.Array | None,
    *,
    mesh: Mesh,
    chunks: int,
    function: Callable,
) -> Any:
    """Embeds rows in `chunks` parts, one after another, keeping for the backward pass only what goes in.

    The gradient is exactly that of embedding all rows at once (GradCache, arXiv 2101.06983).  A chunk takes the same
    share of rows from every device, so that rows never move between devices.
    key: a step's random key for dropout; None: no dropout.
    """

    def part(rows: TokenRows, text_ids: jax.Array) -> Any:
        dropout_keys = None if key is None else token_keys(key, rows, text_ids)
        return function(nnx.merge(graph, params), rows, text_ids.shape[1], dropout_keys)

    if chunks == 1:
        return part(rows, text_ids)
    shards = row_shards(mesh)

    def split(x: jax.Array) -> jax.Array:  # [rows, …] -> [chunks, rows / chunks, …]
        x = x.reshape(shards, chunks, -1, *x.shape[1:]).swapaxes(0, 1).reshape(chunks, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, ROW_AXES))

    def join(x: jax.Array) -> jax.Array:  # [chunks, vectors / chunks, …] -> [vectors, …]
        x = x.reshape(chunks, shards, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))

    remat = jax.checkpoint(lambda chunk: part(*chunk), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(remat, jax.tree.map(split, (rows, text_ids))))


def _embed_only(model: TextModel, *how: Any) -> tuple[jax.Array, None]:
    return embed(model, *how), None


def batch_loss(
    graph: Any,
    params: Any,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    task: StepTask,
    settings: Settings,
    mesh: Mesh,
) -> Loss:
    """Loss of a global batch, float32, and its unweighted parts.  key: that of dropout; None: no dropout.

    The model runs under automatic partitioning; the objective runs on each device's own vectors and gathers what its
    groups need.
    """
    needs_middle, objective = step_objective(settings, task)
    vectors = embed_in_chunks(
        graph,
        params,
        batch.rows,
        jnp.asarray(batch.text_ids),
        key,
        mesh=mesh,
        chunks=settings.encode_chunks,
        function=embed_with_middle if needs_middle else _embed_only,
    )

    def of_device(
        vectors: tuple[jax.Array, jax.Array | None], queries: jax.Array, passages: jax.Array, scores: jax.Array
    ) -> Loss:
        absent, passages = passages < 0, jnp.maximum(passages, 0)
        final, middle = vectors
        return objective(
            Examples(
                queries=final[queries],
                passages=final[passages],
                present=~absent[:, settings.data.positives_per_query :],
                scores=scores,
                middle=None if middle is None else (middle[queries], middle[passages]),
            )
        )

    of_devices = jax.shard_map(of_device, mesh=mesh, in_specs=PartitionSpec(ROW_AXES), out_specs=PartitionSpec())
    return of_devices(jax.tree.map(unit, vectors), *map(jnp.asarray, (batch.queries, batch.passages, batch.scores)))


def make_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: Settings,
    mesh: Mesh,
    state: TrainState,
    task: StepTask,
    dropout: bool = False,
) -> Callable[[TrainState, np.int32, Batch], tuple[TrainState, Metrics]]:
    """The jitted step of a task: (state, step number, batch) -> (state, metrics before the update).

    It compiles once per shape of batch; the state is donated.  `state` gives the layout, nothing else of it is used.
    dropout: whether the model drops anything, by random numbers of (seed, step).
    """

    def step(state: TrainState, number: jax.Array, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(random_key(settings.seed, "dropout"), number) if dropout else None
        loss_of = partial(batch_loss, graph, batch=batch, key=key, task=task, settings=settings, mesh=mesh)
        (loss, parts), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            **parts,
            "grad_norm": optax.global_norm(gradient),
            "learning_rate": jnp.asarray(schedule(number), jnp.float32),
        }
        return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics

    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    rows = row_sharding(mesh)
    return jax.jit(
        step, in_shardings=(layout, replicated(mesh), rows), out_shardings=(layout, replicated(mesh)), donate_argnums=0
    )
