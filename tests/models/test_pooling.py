"""Tests all poolings against NumPy with random masks, padding and packing."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codiemb_jax.batch import TokenRows
from codiemb_jax.models.pooling import l2_normalize, pool

POOLINGS = ("mean", "weighted_mean", "cls", "last_token")


def pool_text(pooling: str, hidden: np.ndarray, pooling_mask: np.ndarray) -> np.ndarray:
    """Pools one text: hidden is [tokens, dim] and pooling_mask [tokens]."""
    if pooling == "cls":
        return hidden[0]
    if pooling == "last_token":
        return hidden[-1]
    content = hidden[pooling_mask > 0].astype(np.float64)
    weights = np.arange(1, len(content) + 1) if pooling == "weighted_mean" else np.ones(len(content))
    return sum(weight * state for weight, state in zip(weights, content, strict=True)) / sum(weights)


@st.composite
def pooling_masks(draw: st.DrawFn) -> list[np.ndarray]:
    """Draws pooling masks of one to four texts, each with at least one token."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    masks = [np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))) for n in lengths]
    for mask in masks:
        mask[draw(st.integers(0, mask.size - 1))] = 1
    return masks


@pytest.mark.parametrize("pooling", POOLINGS)
@given(masks=pooling_masks(), seed=st.integers(0, 2**32), left=st.booleans(), packed=st.booleans())
def test_pooling_matches_numpy(pooling, masks, seed, left, packed):
    random = np.random.default_rng(seed)
    texts = [random.standard_normal((mask.size, 3)).astype(np.float32) for mask in masks]
    length = sum(mask.size for mask in masks) + 2 if packed else max(mask.size for mask in masks) + 2
    rows, slots = (1, len(masks)) if packed else (len(masks), 1)
    hidden = random.standard_normal((rows, length, 3)).astype(np.float32)  # nonzero in padding, which must be ignored
    token_rows = TokenRows(*(np.zeros((rows, length), np.int32) for _ in TokenRows._fields))
    start = 2 if left else 0
    for number, (mask, states) in enumerate(zip(masks, texts, strict=True)):
        row, segment = (0, number + 1) if packed else (number, 1)
        if not packed:
            start = length - mask.size if left else 0
        columns = slice(start, start + mask.size)
        hidden[row, columns] = states
        token_rows.segment_ids[row, columns], token_rows.pooling_mask[row, columns] = segment, mask
        token_rows.positions[row, columns] = np.arange(mask.size)
        start += mask.size
    pooled = np.asarray(pool(hidden, token_rows, slots, pooling)).reshape(-1, 3)
    for actual, states, mask in zip(pooled, texts, masks, strict=True):
        np.testing.assert_allclose(actual, pool_text(pooling, states, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_empty_slots_have_zero_vectors_and_gradients(pooling):
    rows = TokenRows(*(np.zeros((2, 5), np.int32) for _ in TokenRows._fields))
    rows.segment_ids[0, :3], rows.pooling_mask[0, :3] = 1, 1
    hidden = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    vectors = np.asarray(l2_normalize(pool(hidden, rows, 2, pooling)))
    assert (vectors[0, 1] == 0).all()
    assert (vectors[1] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(vectors[0, 0]), 1, rtol=1e-6)
    gradient = np.asarray(jax.grad(lambda x: l2_normalize(pool(x, rows, 2, pooling)).sum())(hidden))
    assert (gradient[1] == 0).all()
    assert (gradient[0, 3:] == 0).all()
    assert np.abs(gradient[0, :3]).max() > 0


def test_bfloat16_states_are_pooled_in_float32():
    rows = TokenRows(*(np.ones((1, 7), np.int32) for _ in TokenRows._fields))
    hidden = jax.numpy.asarray(np.random.default_rng(0).standard_normal((1, 7, 4)), jax.numpy.bfloat16)
    pooled = pool(hidden, rows, 1, "mean")
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled[0, 0], np.asarray(hidden[0], np.float64).mean(axis=0), rtol=1e-6)
