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

from codiemb_jax.batch import ROW_AXES, Batch, IRBatch, Rows, STSBatch
from codiemb_jax.config import Settings
from codiemb_jax.models.embed import embed, embed_with_middle
from codiemb_jax.models.layers import TextModel
from codiemb_jax.models.pooling import unit
from codiemb_jax.objectives.tasks import ir_objective, mixed_objective, sts_objective
from codiemb_jax.training.mesh import by_row, replicated, row_shards
from codiemb_jax.training.state import TrainState, random_key

Metrics = dict[str, jax.Array]


def encode(
    graph: Any, params: Any, rows: Rows, key: jax.Array | None, *, mesh: Mesh, chunks: int, function: Callable
) -> Any:
    """Encodes rows in `chunks` pieces, one after another, keeping for the backward pass only what goes in.

    key: that of dropout, of which each row gets one of its own; None: no dropout.

    The gradient is exactly that of encoding all rows at once.  A piece takes the same share of rows from every
    device, so that rows never move between devices.
    """
    keys = None if key is None else jax.random.split(key, len(rows.tokens))
    if chunks == 1:
        return function(nnx.merge(graph, params), rows, keys)
    shards = row_shards(mesh)

    def split(x: jax.Array) -> jax.Array:  # [rows, …] -> [chunks, rows / chunks, …]
        x = x.reshape(shards, chunks, -1, *x.shape[1:]).swapaxes(0, 1).reshape(chunks, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, ROW_AXES))

    def join(x: jax.Array) -> jax.Array:  # the way back
        x = x.reshape(chunks, shards, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))

    piece = jax.checkpoint(lambda piece: function(nnx.merge(graph, params), *piece), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(piece, jax.tree.map(split, (rows, keys))))


def _embed_only(model: TextModel, rows: Rows, keys: jax.Array | None) -> tuple[jax.Array, None]:
    return embed(model, rows, keys), None


def batch_loss(
    graph: Any, params: Any, batch: Batch, key: jax.Array | None = None, *, settings: Settings, mesh: Mesh
) -> tuple[jax.Array, Metrics]:
    """Loss of a global batch, float32, and its unweighted parts.  key: that of dropout; None: no dropout.

    The model runs under automatic partitioning; the objective runs on each device's own vectors and gathers
    what its pool needs.
    """
    with_middle = not isinstance(batch, IRBatch) and settings.objective.mid_info_nce_weight > 0
    function = embed_with_middle if with_middle else _embed_only
    encoded = partial(encode, graph, params, mesh=mesh, chunks=settings.encode_chunks, function=function)
    keys = (None, None) if key is None else jax.random.split(key)
    texts = [jax.tree.map(unit, encoded(rows, key)) for rows, key in zip(batch[:2], keys, strict=True)]
    (first, middle_first), (second, middle_second) = texts
    middle = (middle_first, middle_second) if with_middle else None
    rows = PartitionSpec(ROW_AXES)
    objectives = partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=PartitionSpec())
    if isinstance(batch, IRBatch):
        ir = partial(ir_objective, settings=settings.objective, axes=ROW_AXES)
        return objectives(ir)(first, second, batch.present)
    if isinstance(batch, STSBatch):
        sts = partial(sts_objective, settings=settings.objective, axes=ROW_AXES)
        return objectives(sts)(first, second, middle, batch.scores)
    # The pools of a task without data need not divide anything.
    pools = {"ir_pool_size": settings.data.ir, "sts_list_size": settings.data.sts}
    unused = {name: None for name, paths in pools.items() if not paths}
    mixed = partial(mixed_objective, settings=settings.objective.model_copy(update=unused), axes=ROW_AXES)
    return objectives(mixed)(first, second, middle, batch.present, batch.scores, batch.is_ir)


def make_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: Settings,
    mesh: Mesh,
    state: TrainState,
    dropout: bool = False,
) -> Callable[[TrainState, np.int32, Batch], tuple[TrainState, Metrics]]:
    """The jitted step: (state, step number, batch) -> (state, metrics before the update).

    It compiles once a (task, shape); the state is donated.  `state` gives the layout, nothing else of it is used.
    dropout: whether the model drops anything, by random numbers of (seed, step).
    """

    def step(state: TrainState, number: jax.Array, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(random_key(settings.seed, "dropout"), number) if dropout else None
        loss_of = partial(batch_loss, graph, batch=batch, key=key, settings=settings, mesh=mesh)
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
