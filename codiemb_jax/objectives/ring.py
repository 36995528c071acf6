"""InfoNCE over pools whose scores do not fit into memory: exact, tile by tile.

The queries of each device visit the devices of their pool, around a ring, while the passages stay: an example has one
query and several passages, so this moves the least. At each stop, tiles of queries are scored against tiles of
passages, and of the scores only sums of exponentials are kept. The backward pass computes the scores again while the
queries, the sums and the gradient of the queries go around once more. Besides its own queries and passages and their
gradients, a device stores one visiting batch of queries and one tile of scores, however large the pool is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from codiemb_jax.objectives.duplicates import has_same_text
from codiemb_jax.objectives.groups import Examples, Groups, Tree
from codiemb_jax.objectives.numerics import EXACT, mask_value

TILE_QUERIES = 512
"""Maximum number of queries per tile of scores."""
TILE_PASSAGES = 4096
"""Maximum number of passages per tile of scores, unless a single example has more."""


class _Queries(NamedTuple):
    """Queries in tiles, and what determines their candidates."""

    vectors: jax.Array
    """[tiles, queries, dim]"""
    positions: jax.Array
    """int [tiles, queries], see `Groups.positions`; -1 for padding"""
    texts: jax.Array | None
    """int32 [tiles, queries, texts], see `PassageTexts.positives`"""


class _Passages(NamedTuple):
    """Passages in tiles of whole examples, and what determines whose candidates they are."""

    vectors: jax.Array
    """[tiles, examples, positives + negatives, dim]"""
    positions: jax.Array
    """int [tiles, examples], see `Groups.positions`; -1 for padding"""
    present: jax.Array
    """bool [tiles, examples, positives + negatives]"""
    texts: jax.Array | None
    """int32 [tiles, examples, positives + negatives], see `PassageTexts.passages`"""


class _Static(NamedTuple):
    """What is known when the function is compiled."""

    groups: Groups
    examples: int
    """Examples per device."""
    positives: int
    """Positives per example."""
    sets: tuple[int, ...]
    """The candidate set of each passage of an example: k for the k-th positive, `positives` for all negatives."""
    temperature: float


class _Sums(NamedTuple):
    """What is known of the scores of each query in each set."""

    maximum: jax.Array
    """[tiles, queries, positives + 1]"""
    total: jax.Array
    """[tiles, queries, positives + 1]: sum of exponentials relative to the maximum"""
    masked: jax.Array | None
    """int32 [tiles, queries]: number of passages that are masked because of their text"""


def ring_info_nce(examples: Examples, temperature: float, groups: Groups) -> tuple[jax.Array, jax.Array | None]:
    """Computes the same as `dense_info_nce`, in memory that does not depend on the size of the pools."""
    b, texts, _ = examples.passages.shape
    positives = texts - examples.present.shape[1]
    positions = groups.positions(b)
    present = jnp.pad(examples.present, ((0, 0), (positives, 0)), constant_values=True)
    passage_texts, positive_texts = None, None
    if examples.texts is not None:
        passage_texts, positive_texts = map(jnp.asarray, examples.texts)
    queries = _Queries(examples.queries, positions, positive_texts)
    passages = _Passages(examples.passages, positions, present, passage_texts)
    sets = tuple(np.minimum(np.arange(texts), positives).tolist())
    outputs = _log_sums(
        _tiles(queries, TILE_QUERIES),
        _tiles(passages, max(1, TILE_PASSAGES // texts)),
        _Static(groups, b, positives, sets, temperature),
    )
    log_sums, masked = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:b], outputs)
    to_own = jnp.einsum("bd,bkd->bk", examples.queries, examples.passages[:, :positives], precision=EXACT) / temperature
    return jnp.mean(jnp.logaddexp(log_sums[:, :-1], log_sums[:, -1:]) - to_own, axis=1), masked


def _tiles(tree: Tree, size: int) -> Tree:
    """Splits [examples, …] into equal tiles of at most `size` examples, with as little padding as possible."""

    def split(x: jax.Array) -> jax.Array:
        tiles = -(-len(x) // size)
        tile = -(-len(x) // tiles)
        padding = [(0, tiles * tile - len(x))] + [(0, 0)] * (x.ndim - 1)
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        return jnp.pad(x, padding, constant_values=fill).reshape(tiles, tile, *x.shape[1:])

    return jax.tree.map(split, tree)


_Outputs = tuple[jax.Array, jax.Array | None]
_Residuals = tuple[_Queries, _Passages, _Sums]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_sums(queries: _Queries, passages: _Passages, static: _Static) -> _Outputs:
    """Returns the log-sum-exp of each query and set, [tiles, queries, positives + 1], and `_Sums.masked`."""
    return _forward(queries, passages, static)[0]


def _forward(queries: _Queries, passages: _Passages, static: _Static) -> tuple[_Outputs, _Residuals]:
    full_like = partial(jnp.full_like, queries.vectors)  # differs between devices, unlike jnp.full
    shape, lowest = queries.positions.shape, mask_value(queries.vectors.dtype)
    sums = _Sums(
        maximum=full_like(lowest, shape=(*shape, static.positives + 1)),
        # Starts at 1, which vanishes with the first score, so that the logarithm of an empty set is finite.
        total=full_like(1, shape=(*shape, static.positives + 1)),
        masked=None if queries.texts is None else full_like(0, shape=shape, dtype=jnp.int32),
    )

    def add_tile(tile: _Queries, block: _Passages, sums: _Sums) -> _Sums:
        scores, masked = _scores(tile, block, static)
        maximum = jnp.maximum(sums.maximum, _per_set(partial(jnp.max, initial=lowest), scores, static))
        total = _per_set(jnp.sum, jnp.exp(scores - _per_passage(maximum, static)), static)
        return _Sums(
            maximum,
            sums.total * jnp.exp(sums.maximum - maximum) + total,
            None
            if masked is None or sums.masked is None
            else sums.masked + jnp.sum(masked, axis=(1, 2), dtype=jnp.int32),
        )

    def stop(visitors: _Queries, sums: _Sums, kept: None) -> tuple[_Sums, None]:
        def add_block(sums: _Sums, block: _Passages) -> tuple[_Sums, None]:
            def add(x: tuple[_Queries, _Sums]) -> _Sums:
                return _if_pooled(x[0], block, static, partial(add_tile, x[0], block), x[1])

            return jax.lax.map(add, (visitors, sums)), None

        return jax.lax.scan(add_block, sums, passages)[0], kept

    sums, _ = _tour(stop, queries, sums, None, static)
    return (sums.maximum + jnp.log(sums.total), sums.masked), (queries, passages, sums)


def _backward(static: _Static, residuals: _Residuals, gradients: _Outputs) -> tuple[_Queries, _Passages]:
    queries, passages, sums = residuals
    scale = gradients[0] / sums.total / static.temperature

    def add_tile(visitors: Any, block: _Passages, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile, maximum, scale = visitors
        exponentials = jnp.exp(_scores(tile, block, static)[0] - _per_passage(maximum, static))
        weights = exponentials * _per_passage(scale, static)
        to_queries = sums[0] + jnp.einsum("qpe,epd->qd", weights, block.vectors, precision=EXACT)
        return to_queries, sums[1] + jnp.einsum("qpe,qd->epd", weights, tile.vectors, precision=EXACT)

    def stop(visitors: Any, to_queries: jax.Array, to_passages: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add_block(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            block = jax.tree.map(lambda x: x[i], passages)

            def add(to_block: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
                visitors, to_tile = x
                update = partial(add_tile, visitors, block)
                to_tile, to_block = _if_pooled(visitors[0], block, static, update, (to_tile, to_block))
                return to_block, to_tile

            to_block, to_queries = jax.lax.scan(add, sums[1][i], (visitors, sums[0]))
            return to_queries, sums[1].at[i].set(to_block)

        return jax.lax.fori_loop(0, len(passages.vectors), add_block, (to_queries, to_passages))

    to_queries, to_passages = jnp.zeros_like(queries.vectors), jnp.zeros_like(passages.vectors)
    to_queries, to_passages = _tour(stop, (queries, sums.maximum, scale), to_queries, to_passages, static)
    # None is the gradient of integers.
    return _Queries(to_queries, None, None), _Passages(to_passages, None, None, None)  # type: ignore[arg-type]


_log_sums.defvjp(_forward, _backward)


def _tour(stop: Callable, visitors: Any, carried: Any, kept: Any, static: _Static) -> tuple[Any, Any]:
    """Takes queries around the ring and back to their device.

    Args:
      stop: Maps (visitors, carried, kept) at each device to the new (carried, kept).
      visitors: What travels unchanged.
      carried: What is summed up on the way.
      kept: What is summed up on each device.
      static: The static values.

    Returns:
      The final (carried, kept).
    """
    rotate = partial(static.groups.rotate, b=static.examples)

    def body(_: jax.Array, state: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        visitors, carried, kept = state
        next_visitors = rotate(visitors)  # while this device computes
        carried, kept = stop(visitors, carried, kept)
        return next_visitors, rotate(carried), kept

    stops = static.groups.ring_size(static.examples)
    return jax.lax.fori_loop(0, stops, body, (visitors, carried, kept))[1:]


def _scores(tile: _Queries, block: _Passages, static: _Static) -> tuple[jax.Array, jax.Array | None]:
    """Returns the scores of a tile, lowest for all but candidates, and which passages are masked because of their text.

    Both are [queries, positives + negatives, examples].
    """
    scores = jnp.einsum("qd,epd->qpe", tile.vectors, block.vectors, precision=EXACT) / static.temperature
    candidate = static.groups.together(tile.positions, block.positions, static.examples)[:, None] & block.present.T
    masked = None
    if tile.texts is not None and block.texts is not None:
        own = tile.positions[:, None] == block.positions
        masked = candidate & has_same_text(tile.texts, block.texts, own, static.positives).swapaxes(1, 2)
        candidate &= ~masked
    return jnp.where(candidate, scores, mask_value(scores.dtype)), masked


def _if_pooled(tile: _Queries, block: _Passages, static: _Static, add: Callable, sums: Any) -> Any:
    """Returns `add(sums)`, or just `sums` if no query of the tile shares a pool with an example of the block."""
    if static.groups.size is None:
        return add(sums)
    in_pool = static.groups.together(tile.positions, block.positions, static.examples)
    return jax.lax.cond(jnp.any(in_pool), add, lambda sums: sums, sums)


def _per_set(reduce: Callable, x: jax.Array, static: _Static) -> jax.Array:
    """Reduces [queries, positives + negatives, examples] to sets, [queries, positives + 1]."""
    positives, negatives = jnp.split(x, [static.positives], axis=1)
    return jnp.concatenate([reduce(positives, axis=2), reduce(negatives, axis=(1, 2))[:, None]], axis=1)


def _per_passage(x: jax.Array, static: _Static) -> jax.Array:
    """Broadcasts values of sets, [queries, positives + 1], to [queries, positives + negatives, 1]."""
    return x[:, np.array(static.sets), None]
