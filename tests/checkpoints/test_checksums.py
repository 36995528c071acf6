"""Tests of checksums: independent of sharding, sensitive to every element."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from codiemb_jax.checkpoints import checksums
from codiemb_jax.checkpoints.checksums import array_checksum, tree_checksums
from codiemb_jax.config import MeshSettings
from codiemb_jax.sharding import make_mesh

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, np.bool_)


def random_array(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2 if dtype is np.bool_ else 100, shape).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (16, 8), (2, 8, 16)])
def test_jax_and_numpy_arrays_have_equal_checksums(shape, dtype):
    array = random_array(shape, dtype)
    assert tree_checksums({"a": [jnp.asarray(array)]}) == {"a": [array_checksum(array)]}


def test_checksum_does_not_depend_on_sharding():
    array = random_array((3, 8, 16), np.float32)
    mesh = make_mesh(MeshSettings(fsdp=4, tensor=2))
    for spec in (PartitionSpec(), PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")):
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert tree_checksums(placed) == array_checksum(array)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64, np.float64])
def test_checksum_does_not_depend_on_chunk_size_or_memory_layout(dtype, monkeypatch):
    array = random_array((3, 37, 5), dtype)
    expected = array_checksum(array)
    for chunk in (1000, 64, 555):
        monkeypatch.setattr(checksums, "CHUNK", chunk)
        assert array_checksum(array) == expected
    assert array_checksum(np.asfortranarray(array)) == expected


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([np.float32, ml_dtypes.bfloat16, np.uint8, np.int64]),
    st.integers(0, 23),
    st.integers(0, 63),
)
def test_checksum_detects_any_flipped_bit(seed, dtype, index, bit):
    array = random_array((4, 6), dtype, seed)
    changed = array.copy()
    words = changed.reshape(-1).view(f"u{array.itemsize}")
    words[index] ^= words.dtype.type(1 << bit % (8 * array.itemsize))
    assert array_checksum(changed) != array_checksum(array)


@given(st.permutations(range(12)))
def test_checksum_detects_reordered_elements(order):
    array = np.arange(12, dtype=np.float32)
    assert (array_checksum(array[order]) == array_checksum(array)) == (list(order) == list(range(12)))


def test_checksum_depends_on_the_position_of_an_element():
    assert len({array_checksum(row) for row in np.eye(100, dtype=np.float32)}) == 100
