"""Traces a training step without weights, data or the devices, to compile it for a TPU slice that is not there."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from codiemb_jax.batch import Batch, PassageTexts, StepTask, TokenRows
from codiemb_jax.config import Settings
from codiemb_jax.data.duplicates import MIN_POSITIVES
from codiemb_jax.data.layout import BatchLayout
from codiemb_jax.errors import UserError, shorten
from codiemb_jax.models.build import Params
from codiemb_jax.sharding import row_sharding
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.schedule import make_schedule
from codiemb_jax.training.state import abstract_state
from codiemb_jax.training.step import make_step, needs_texts


def tpu_devices(topology: str) -> list[Any]:
    """Returns the devices of a TPU slice, such as v5e:4x4, to compile for. Needs libtpu, but no TPU.

    Raises:
      UserError: If libtpu is not installed, is in use, or does not know the topology.
    """
    from jax.experimental import topologies  # not needed otherwise

    if importlib.util.find_spec("libtpu") is None:
        raise UserError('compiling for TPUs needs libtpu; run pip install "codiemb-jax[preflight]"')
    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = shorten(" ".join(str(error).split()), 200)
        raise UserError(
            f"cannot compile for {shorten(topology)}, which must be a TPU slice such as v5e:4x4 ({reason})"
        ) from error


def abstract_batch(layout: BatchLayout, passages: int, mesh: jax.sharding.Mesh, compare_texts: bool) -> Batch:
    """Returns the shapes, dtypes and shardings of a batch with `passages` passages per example."""

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding(mesh))

    examples, rows = layout.order.size, layout.devices * layout.rows
    tokens = array(jnp.int32, rows, layout.row_length)
    texts = PassageTexts(array(jnp.int32, examples, passages), array(jnp.int32, examples, MIN_POSITIVES))
    return Batch(
        rows=TokenRows(tokens, tokens, tokens, tokens),
        text_ids=array(jnp.int32, rows, layout.slots),
        queries=array(jnp.int32, examples),
        passages=array(jnp.int32, examples, passages),
        scores=array(jnp.float32, examples),
        texts=texts if compare_texts else None,
    )


def trace_step(
    settings: Settings, graph: Any, params: Params, task: StepTask, layout: BatchLayout, passages: int, dropout: bool
) -> jax.stages.Traced:
    """Traces the step that training would run.

    Args:
      settings: The settings.
      graph: NNX graph definition of the model.
      params: The abstract parameters, with shardings.
      task: The task of the step.
      layout: The layout of the batch.
      passages: Number of passages per example.
      dropout: Whether the model has dropout.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    schedule = make_schedule(settings.optimizer, settings.optimizer.max_steps or 1000)
    optimizer = make_optimizer(settings.optimizer, schedule)
    state = abstract_state(optimizer, params, settings.optimizer.offload)
    # `jax.set_mesh` would try to put constants on devices that are not there.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step: Any = make_step(graph, optimizer, schedule, settings, mesh, state, task, dropout)
        batch = abstract_batch(layout, passages, mesh, needs_texts(settings, task))
        return step.trace(state, jax.ShapeDtypeStruct((), jnp.int32), batch)
