"""The training step: batch -> embeddings -> loss -> gradient -> update."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from codiemb_jax.batch import Batch, PassageTexts, StepTask, TokenRows
from codiemb_jax.config import Settings
from codiemb_jax.models.build import random_key
from codiemb_jax.models.embed import embed, embed_with_middle, token_keys
from codiemb_jax.models.layers import TextModel
from codiemb_jax.models.pooling import l2_normalize
from codiemb_jax.objectives.groups import Examples, Groups, Parts
from codiemb_jax.objectives.mixed import mixed
from codiemb_jax.objectives.registry import OBJECTIVES
from codiemb_jax.sharding import ROW_AXES, compiler_options, replicated, row_sharding, row_shards
from codiemb_jax.text.rows import rows_per_chunk
from codiemb_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
Loss = tuple[jax.Array, Parts]


def step_objective(settings: Settings, task: StepTask) -> tuple[bool, Callable[[Examples], Loss]]:
    """Returns the objective of a step.

    Args:
      settings: The settings.
      task: The task of the step.

    Returns:
      Whether the objective needs embeddings of the middle layer, and a function that maps the examples of one device to
      the loss of the global batch.
    """
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


def needs_texts(settings: Settings, task: StepTask) -> bool:
    """Whether the objectives of a step need to know which passages have the same text."""
    return any(
        OBJECTIVES[spec.objective][spec.name].needs_texts(settings.objective)
        for spec in settings.tasks
        if task in (spec.name, "mixed")
    )


def embed_in_chunks(
    graph: Any,
    params: Any,
    rows: TokenRows,
    text_ids: jax.Array,
    key: jax.Array | None,
    *,
    mesh: Mesh,
    max_chunks: int,
    function: Callable,
) -> Any:
    """Embeds rows in sequential chunks, storing only the inputs of each chunk for the backward pass.

    The gradient is the same as that of embedding all rows at once (GradCache, arXiv 2101.06983). Every chunk has the
    same number of rows on each device, so rows never move between devices.

    Args:
      graph: NNX graph definition of the model.
      params: The parameters.
      rows: The rows of the global batch.
      text_ids: int32 [rows, slots], see `Batch`.
      key: Random key for the dropout of this step; None disables dropout.
      mesh: The device mesh.
      max_chunks: Maximum number of chunks; the rows of a device are a multiple of those of a chunk (`rows_per_chunk`).
      function: `embed`, or another function with the same arguments.

    Returns:
      The output of `function` for all rows.
    """

    def embed_chunk(rows: TokenRows, text_ids: jax.Array) -> Any:
        dropout_keys = None if key is None else token_keys(key, rows, text_ids)
        return function(nnx.merge(graph, params), rows, text_ids.shape[1], dropout_keys)

    shards = row_shards(mesh)
    device_rows = len(rows.tokens) // shards
    chunks = device_rows // rows_per_chunk(device_rows, max_chunks)
    if chunks == 1:
        return embed_chunk(rows, text_ids)

    def split(x: jax.Array) -> jax.Array:  # [rows, …] -> [chunks, rows / chunks, …]
        x = x.reshape(shards, chunks, -1, *x.shape[1:]).swapaxes(0, 1).reshape(chunks, -1, *x.shape[1:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(None, ROW_AXES))

    def join(x: jax.Array) -> jax.Array:  # [chunks, embeddings / chunks, …] -> [embeddings, …]
        x = x.reshape(chunks, shards, -1, *x.shape[2:]).swapaxes(0, 1).reshape(-1, *x.shape[2:])
        return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))

    remat = jax.checkpoint(lambda chunk: embed_chunk(*chunk), prevent_cse=False)
    return jax.tree.map(join, jax.lax.map(remat, jax.tree.map(split, (rows, text_ids))))


def _embed_without_middle(model: TextModel, *args: Any) -> tuple[jax.Array, None]:
    return embed(model, *args), None


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
    """Computes the loss of a global batch, float32, and its unweighted parts.

    The model is partitioned automatically. The objective runs on the embeddings of each device and gathers what its
    groups need from the others.

    Args:
      graph: NNX graph definition of the model.
      params: The parameters.
      batch: The global batch.
      key: Random key for the dropout of this step; None disables dropout.
      task: The task of the step.
      settings: The settings.
      mesh: The device mesh.
    """
    needs_middle, objective = step_objective(settings, task)
    embeddings = embed_in_chunks(
        graph,
        params,
        batch.rows,
        jnp.asarray(batch.text_ids),
        key,
        mesh=mesh,
        max_chunks=settings.encode_chunks,
        function=embed_with_middle if needs_middle else _embed_without_middle,
    )

    def device_loss(
        embeddings: tuple[jax.Array, jax.Array | None],
        queries: jax.Array,
        passages: jax.Array,
        scores: jax.Array,
        texts: PassageTexts | None,
    ) -> Loss:
        is_padding, passages = passages < 0, jnp.maximum(passages, 0)
        final, middle = embeddings
        return objective(
            Examples(
                queries=final[queries],
                passages=final[passages],
                present=~is_padding[:, settings.data.positives_per_query :],
                scores=scores,
                middle=None if middle is None else (middle[queries], middle[passages]),
                texts=texts,
            )
        )

    global_loss = jax.shard_map(device_loss, mesh=mesh, in_specs=PartitionSpec(ROW_AXES), out_specs=PartitionSpec())
    embeddings = jax.tree.map(l2_normalize, embeddings)
    examples = (batch.queries, batch.passages, batch.scores, batch.texts)
    return global_loss(embeddings, *jax.tree.map(jnp.asarray, examples))


def make_step(
    graph: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: Settings,
    mesh: Mesh,
    state: TrainState,
    task: StepTask,
    dropout: bool = False,
) -> Callable[[TrainState, jax.Array, Batch], tuple[TrainState, Metrics]]:
    """Creates the jitted step of a task: (state, step number, batch) -> (new state, metrics before the update).

    If the loss or a gradient is NaN or infinite, the update is not applied. The step compiles once per batch shape
    and donates the state.

    Args:
      graph: NNX graph definition of the model.
      optimizer: The optimizer.
      schedule: The learning rate schedule, for the metrics.
      settings: The settings.
      mesh: The device mesh.
      state: A state, abstract or not, with the shardings to use.
      task: The task of the step.
      dropout: Whether the model has dropout, which is seeded by the seed and the step number.
    """

    def step(state: TrainState, number: jax.Array, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(random_key(settings.seed, "dropout"), number) if dropout else None
        loss_fn = partial(batch_loss, graph, batch=batch, key=key, task=task, settings=settings, mesh=mesh)
        (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)  # those of bfloat16 weights are bfloat16
        opt_state = state.opt_state
        if settings.optimizer.offload:  # the shardings of the output move it back
            opt_state = jax.device_put(opt_state, jax.memory.Space.Device)
        updates, new_opt_state = optimizer.update(grads, opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), new_opt_state)
        grad_norm = optax.global_norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        def select(new: Any, old: Any) -> Any:
            if isinstance(new, optax.ScaleByScheduleState):  # the learning rate depends only on the step number
                return new
            return jnp.where(is_finite, new, old)

        old = TrainState(state.params, opt_state)
        new = jax.tree.map(select, new, old, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
        metrics = {
            "loss": loss,
            **parts,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(number), jnp.float32),
        }
        return new, metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(
        step,
        in_shardings=(shardings, replicated(mesh), row_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )
