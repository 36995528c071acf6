"""One training step of one task: batch -> loss -> gradient -> update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from codiemb_jax.batch import ROW_AXES, Batch, IRBatch, Rows
from codiemb_jax.config import Settings
from codiemb_jax.models.embed import embed, embed_with_middle
from codiemb_jax.objectives.tasks import ir_objective, sts_objective
from codiemb_jax.training.mesh import by_row, replicated, row_shards
from codiemb_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


def encode(graph: Any, params: Any, rows: Rows, mesh: Mesh, chunks: int, function: Callable) -> Any:
    """Encodes rows in `chunks` pieces, one after another, keeping for the backward pass only what goes in.

    The gradient is exactly that of encoding all rows at once.  A piece takes the same share of rows from every
    device, so that rows never move between devices.
    """
    if chunks == 1:
        return function(nnx.merge(graph, params), rows)
    shards = row_shards(mesh)

    def split(x: jax.Array) -> jax.Array:  # [rows, …] -> [chunks, rows / chunks, …]
        x = x.reshape(shards, chunks, -1, *x.shape[1:]).swapaxes(0, 1).reshape(chunks, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, ROW_AXES))

    def join(x: jax.Array) -> jax.Array:  # the way back
        x = x.reshape(chunks, shards, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))

    piece = jax.checkpoint(lambda rows: function(nnx.merge(graph, params), rows), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(piece, jax.tree.map(split, rows)))


def batch_loss(graph: Any, params: Any, batch: Batch, *, settings: Settings, mesh: Mesh) -> tuple[jax.Array, Metrics]:
    """Loss of a global batch, float32, and its unweighted parts.

    The model runs under automatic partitioning; the objective runs on each device's own vectors and gathers
    what its pool needs.
    """
    per_device = partial(jax.shard_map, mesh=mesh, out_specs=PartitionSpec())
    rows = PartitionSpec(ROW_AXES)
    encoded = partial(encode, graph, params, mesh=mesh, chunks=settings.encode_chunks)
    if isinstance(batch, IRBatch):
        objective = partial(ir_objective, settings=settings.objective, axes=ROW_AXES)
        queries = encoded(batch.queries, function=embed)
        passages = encoded(batch.passages, function=embed)
        return per_device(objective, in_specs=(rows, rows, rows))(queries, passages, batch.present)
    objective = partial(sts_objective, settings=settings.objective, axes=ROW_AXES)
    if settings.objective.mid_info_nce_weight:
        first, middle_first = encoded(batch.first, function=embed_with_middle)
        second, middle_second = encoded(batch.second, function=embed_with_middle)
        middle = (middle_first, middle_second)
    else:
        first, second, middle = encoded(batch.first, function=embed), encoded(batch.second, function=embed), None
    return per_device(objective, in_specs=(rows, rows, rows, rows))(first, second, middle, batch.scores)


def make_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: Settings,
    mesh: Mesh,
    state: TrainState,
) -> Callable[[TrainState, np.int32, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: (state, step number, batch) -> (state, metrics before the update).

    It compiles once a (task, shape); the state is donated.  `state` gives the layout, nothing else of it is used.
    """

    def step(state: TrainState, number: jax.Array, batch: Batch) -> tuple[TrainState, Metrics]:
        loss_of = partial(batch_loss, graph, batch=batch, settings=settings, mesh=mesh)
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
    rows = by_row(mesh)
    return jax.jit(
        step, in_shardings=(layout, replicated(mesh), rows), out_shardings=(layout, replicated(mesh)), donate_argnums=0
    )
