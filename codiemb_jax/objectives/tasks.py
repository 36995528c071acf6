"""What retrieval and similarity steps add up, on one device's slice of a global batch.

The objectives run inside `jax.shard_map`: device i of the mesh axes `axes`, in row-major order, holds the b
examples from i * b on.  Which examples are compared with each other is a matter of the settings, not of the
devices, so that neither the loss nor its gradient depends on their number.  `axes=()`: there is no mesh, the
slice is the whole batch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.contrastive import in_batch_info_nce, info_nce
from codiemb_jax.objectives.ranking import pearson, pro, rank_kl

Parts = dict[str, jax.Array]


def ir_objective(
    queries: jax.Array,
    passages: jax.Array,
    present: jax.Array,
    *,
    settings: ObjectiveSettings,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, Parts]:
    """InfoNCE over pools of `ir_pool_size` consecutive queries (None: the global batch).

    queries: [queries, dim]; passages: [queries * (positives + negatives), dim], each query's positives, then
    its negatives; present: [queries, negatives], False where a slot holds no negative.  Passages are gathered
    from other devices only if pools reach beyond this one.
    Returns the mean over all queries of the global batch, and {"info_nce": the same}.
    """
    b = len(queries)
    size = settings.ir_pool_size or _global_size(b, axes)
    by_example = passages.reshape(b, -1, passages.shape[-1])
    own = jnp.arange(b)
    if axes and b % size:
        by_example, present = jax.lax.all_gather((by_example, present), axes, tiled=True)
        own = own + b * jax.lax.axis_index(axes)
    positives, negatives = jnp.split(by_example, [by_example.shape[1] - present.shape[1]], axis=1)
    comparable = own[:, None] // size == jnp.arange(len(by_example)) // size
    losses = info_nce(queries, positives, negatives, own, comparable, present, settings.temperature)
    loss = _mean_over_devices(jnp.mean(losses), axes)
    return loss, {"info_nce": loss}


def sts_objective(
    first: jax.Array,
    second: jax.Array,
    middle: tuple[jax.Array, jax.Array] | None,
    scores: jax.Array,
    *,
    settings: ObjectiveSettings,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, Parts]:
    """Weighted sum of Pearson, rank KL, PRO and mid-layer InfoNCE, each the mean over lists of pairs.

    first, second: [pairs, dim]; middle: both texts' vectors of the middle layer, [pairs, dim] each, or None
    for no InfoNCE; scores: [pairs].  A list is `sts_list_size` consecutive pairs (None: the global batch).
    If lists reach beyond this device, similarities, scores and middle vectors are gathered and every device
    computes all lists: they cost little beside the encoder.
    Returns the sum, and its unweighted parts: pearson, rank_kl, pro and, unless middle is None, mid_info_nce.
    """
    b = len(scores)
    size = settings.sts_list_size or _global_size(b, axes)
    pairs = (jnp.sum(first * second, axis=-1), scores, middle)
    if axes and b % size:
        pairs = jax.lax.all_gather(pairs, axes, tiled=True)

    def of_list(similarity: jax.Array, scores: jax.Array, middle: tuple[jax.Array, jax.Array] | None) -> Parts:
        parts = {
            "pearson": pearson(similarity, scores),
            "rank_kl": rank_kl(similarity, scores, settings.list_temperature),
            "pro": pro(similarity, scores, settings.list_temperature),
        }
        if middle is not None:
            parts["mid_info_nce"] = in_batch_info_nce(
                *middle, scores, settings.temperature, settings.mid_info_nce_threshold
            )
        return parts

    lists = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), pairs)
    parts = _mean_over_devices(jax.tree.map(jnp.mean, jax.vmap(of_list)(*lists)), axes)
    loss = (
        settings.pearson_weight * parts["pearson"]
        + settings.rank_kl_weight * parts["rank_kl"]
        + settings.pro_weight * parts["pro"]
    )
    if middle is not None:
        loss += settings.mid_info_nce_weight * parts["mid_info_nce"]
    return loss, parts


def mixed_objective(
    first: jax.Array,
    second: jax.Array,
    middle: tuple[jax.Array, jax.Array] | None,
    present: jax.Array,
    scores: jax.Array,
    is_ir: jax.Array,
    *,
    settings: ObjectiveSettings,
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, Parts]:
    """Each device's own task on its own examples alone: nothing is gathered, so devices may differ in task.

    first: [examples, dim]; second: [examples * texts, dim], an example's passages or, first of them, a pair's second
    text; middle: both texts' vectors of the middle layer, alike, or None; present: [examples, negatives]; scores,
    is_ir: [examples], is_ir being alike on all of a device.
    Returns the mean over devices, and each task's parts as means over the devices that have it (NaN if none).
    """
    texts = len(second) // len(first)
    pairs = None if middle is None else (middle[0], middle[1][::texts])
    ir_loss, ir_parts = ir_objective(first, second, present, settings=settings)
    sts_loss, sts_parts = sts_objective(first, second[::texts], pairs, scores, settings=settings)
    loss = _mean_over_devices(jnp.where(is_ir[0], ir_loss, sts_loss), axes)
    parts = {}
    for own, tree in ((is_ir[0], ir_parts), (~is_ir[0], sts_parts)):
        share = _mean_over_devices(own.astype(loss.dtype), axes)
        for name, part in tree.items():
            parts[name] = _mean_over_devices(jnp.where(own, part, 0), axes) / share
    return loss, parts


def _global_size(b: int, axes: tuple[str, ...]) -> int:
    """Size of the global batch of which this device holds b examples."""
    return b * jax.lax.axis_size(axes) if axes else b


def _mean_over_devices(tree: Any, axes: tuple[str, ...]) -> Any:
    return jax.lax.pmean(tree, axes) if axes else tree
