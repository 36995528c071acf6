"""Each pooling against NumPy, text by text, over random masks, paddings and packings."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codiemb_jax.batch import TokenRows
from codiemb_jax.models.pooling import pool, unit

POOLINGS = ("mean", "weighted_mean", "cls", "last_token")


def expected(pooling: str, hidden: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """The vector of one text, float64: hidden [tokens, dim] of all its tokens, pooled [tokens]."""
    if pooling == "cls":
        return hidden[0]
    if pooling == "last_token":
        return hidden[-1]
    content = hidden[pooled > 0].astype(np.float64)
    weights = np.arange(1, len(content) + 1) if pooling == "weighted_mean" else np.ones(len(content))
    return sum(weight * state for weight, state in zip(weights, content, strict=True)) / sum(weights)


@st.composite
def texts(draw: st.DrawFn) -> list[np.ndarray]:
    """Which tokens of each of one to four texts count: at least one."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    masks = [np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))) for n in lengths]
    for mask in masks:
        mask[draw(st.integers(0, mask.size - 1))] = 1
    return masks


@pytest.mark.parametrize("pooling", POOLINGS)
@given(masks=texts(), seed=st.integers(0, 2**32), left=st.booleans(), packed=st.booleans())
def test_each_pooling_is_that_of_numpy(pooling, masks, seed, left, packed):
    random = np.random.default_rng(seed)
    texts = [random.standard_normal((mask.size, 3)).astype(np.float32) for mask in masks]
    length = sum(mask.size for mask in masks) + 2 if packed else max(mask.size for mask in masks) + 2
    rows, slots = (1, len(masks)) if packed else (len(masks), 1)
    hidden = random.standard_normal((rows, length, 3)).astype(np.float32)  # of padding, too: it must not count
    empty = TokenRows(*(np.zeros((rows, length), np.int32) for _ in TokenRows._fields))
    place = 2 if left else 0
    for number, (mask, states) in enumerate(zip(masks, texts, strict=True)):
        row, segment = (0, number + 1) if packed else (number, 1)
        if not packed:
            place = length - mask.size if left else 0
        own = slice(place, place + mask.size)
        hidden[row, own], empty.segment_ids[row, own], empty.pooling_mask[row, own] = states, segment, mask
        empty.positions[row, own] = np.arange(mask.size)
        place += mask.size
    found = np.asarray(pool(hidden, empty, slots, pooling)).reshape(-1, 3)
    for vector, states, mask in zip(found, texts, masks, strict=True):
        np.testing.assert_allclose(vector, expected(pooling, states, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_empty_slot_gives_zeros_and_a_zero_gradient(pooling):
    rows = TokenRows(*(np.zeros((2, 5), np.int32) for _ in TokenRows._fields))
    rows.segment_ids[0, :3], rows.pooling_mask[0, :3] = 1, 1
    hidden = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    found = np.asarray(unit(pool(hidden, rows, 2, pooling)))
    assert (found[0, 1] == 0).all()
    assert (found[1] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(found[0, 0]), 1, rtol=1e-6)
    gradient = np.asarray(jax.grad(lambda x: unit(pool(x, rows, 2, pooling)).sum())(hidden))
    assert (gradient[1] == 0).all()
    assert (gradient[0, 3:] == 0).all()
    assert np.abs(gradient[0, :3]).max() > 0


def test_a_pooled_vector_is_float32_of_bfloat16_states():
    rows = TokenRows(*(np.ones((1, 7), np.int32) for _ in TokenRows._fields))
    hidden = jax.numpy.asarray(np.random.default_rng(0).standard_normal((1, 7, 4)), jax.numpy.bfloat16)
    found = pool(hidden, rows, 1, "mean")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0, 0], np.asarray(hidden[0], np.float64).mean(axis=0), rtol=1e-6)
