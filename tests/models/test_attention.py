"""Tests every attention backend against NumPy in float64, with gradients, and the choice of a backend."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from codiemb_jax.errors import UserError
from codiemb_jax.models.attention import ATTEND, choose_backend, cudnn, splash, xla, xla_cpu
from codiemb_jax.sharding import compiler_options, cpu_mesh

BACKENDS = {
    "xla": xla.attend,
    "xla_cpu": lambda *arrays, causal: xla_cpu.attend(*arrays, causal),
    "splash": partial(splash.attend, interpret=True),
    "cudnn": partial(cudnn.attend, implementation="xla"),  # layouts and masks, but not the kernel
}


def reference(query, key, value, segment_ids, upstream, causal):
    """Returns attention, and the gradients of its product with `upstream`, in float64."""
    query, key, value, upstream = (np.asarray(x, np.float64) for x in (query, key, value, upstream))
    heads, kv_heads, tokens, scale = query.shape[1], key.shape[1], query.shape[2], query.shape[3] ** -0.5
    key, value = (np.repeat(x, heads // kv_heads, axis=1) for x in (key, value))
    visible = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    if causal:
        visible = visible & np.tril(np.ones((tokens, tokens), bool))
    scores = np.where(visible, scale * query @ key.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = upstream @ value.swapaxes(2, 3)
    d_scores = scale * weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))

    def over_groups(x):  # sums the gradients of the heads that share a key head
        return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:]).sum(2)

    gradients = (
        d_scores @ key,
        over_groups(d_scores.swapaxes(2, 3) @ query),
        over_groups(weights.swapaxes(2, 3) @ upstream),
    )
    return weights @ value, gradients


def random_inputs(rows: int, heads: int, kv_heads: int, tokens: int, head_dim: int):
    """Returns queries, keys, values, segment ids (texts of various lengths, then padding) and upstream gradients."""
    random = np.random.default_rng(0)
    query, upstream = random.normal(size=(2, rows, heads, tokens, head_dim)).astype(np.float32)
    key, value = random.normal(size=(2, rows, kv_heads, tokens, head_dim)).astype(np.float32)
    segment_ids = np.zeros((rows, tokens), np.int32)
    for row in range(rows):
        ends = np.sort(random.choice(np.arange(1, tokens), 4, replace=False))
        segment_ids[row, : ends[-1]] = 1 + np.searchsorted(ends[:-1], np.arange(ends[-1]), side="right")
    return query, key, value, segment_ids, upstream


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("backend", "tokens"),
    [
        ("xla", 100),
        pytest.param("xla", 1100, marks=pytest.mark.slow),
        ("xla_cpu", 100),
        ("xla_cpu", 300),
        ("xla_cpu", 700),
        ("splash", 256),
        ("cudnn", 100),
    ],
)
def test_attention_and_gradients_match_numpy(backend, tokens, kv_heads, causal):
    query, key, value, segment_ids, upstream = random_inputs(2, 4, kv_heads, tokens, 64)

    def attend(query, key, value):
        return BACKENDS[backend](query, key, value, jnp.asarray(segment_ids), causal=causal)

    actual, vjp = jax.vjp(jax.jit(attend), query, key, value)
    expected, gradients = reference(query, key, value, segment_ids, upstream, causal)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
    for own, other in zip(vjp(upstream), gradients, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "xla_cpu", "splash"])
def test_attention_on_a_mesh_matches_numpy(backend, monkeypatch):
    monkeypatch.setattr(splash, "attend", partial(splash.attend, interpret=True))
    query, key, value, segment_ids, upstream = random_inputs(4, 4, 2, 256, 64)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        actual = jax.jit(partial(ATTEND[backend], causal=False))(query, key, value, jnp.asarray(segment_ids))
    expected, _ = reference(query, key, value, segment_ids, upstream, False)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def test_memory_of_long_rows_grows_linearly():
    def temporaries(tokens: int) -> int:
        query, key, value, segment_ids, _ = random_inputs(1, 2, 2, tokens, 16)

        def loss(query, key, value):
            return jnp.sum(xla.attend(query, key, value, jnp.asarray(segment_ids), causal=False) ** 2)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(query, key, value).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(2048), temporaries(8192)
    assert long < 5 * short
    assert long < 2 * 8192**2 * 4 / 4  # a quarter of the scores of two heads


class FakeDevice:
    def __init__(self, platform: str, compute_capability: str = "9.0"):
        self.platform = platform
        if platform == "gpu":
            self.compute_capability = compute_capability


class FakeMesh:
    """A mesh of devices that this machine does not have."""

    def __init__(self, platform: str, tensor: int = 1, **device: str):
        self.devices = np.array([FakeDevice(platform, **device)])
        self.shape = {"tensor": tensor}


@pytest.mark.parametrize(
    ("platform", "dtype", "kv_heads", "head_dim", "tensor", "backend"),
    [
        ("cpu", "float32", 8, 64, 1, "xla_cpu"),
        ("cpu", "bfloat16", 8, 64, 1, "xla_cpu"),
        ("cpu", "float32", 2, 64, 4, "xla"),
        ("tpu", "bfloat16", 8, 64, 1, "splash"),
        ("tpu", "float32", 8, 64, 1, "xla"),
        ("tpu", "bfloat16", 2, 64, 4, "xla"),
        ("gpu", "bfloat16", 8, 64, 1, "cudnn"),
        ("gpu", "float32", 8, 64, 1, "xla"),
        ("gpu", "bfloat16", 8, 256, 1, "xla"),
    ],
)
def test_auto_chooses_the_best_backend_that_works(platform, dtype, kv_heads, head_dim, tensor, backend):
    assert choose_backend("auto", FakeMesh(platform, tensor), dtype, kv_heads, head_dim) == backend
    if platform != "cpu":
        assert choose_backend("xla", FakeMesh(platform, tensor), dtype, kv_heads, head_dim) == "xla"


@pytest.mark.parametrize("compute_capability", ["7.5", "gfx942"])
def test_gpus_without_fused_attention_use_xla(compute_capability):
    mesh = FakeMesh("gpu", compute_capability=compute_capability)
    assert choose_backend("auto", mesh, "bfloat16", 8, 64) == "xla"
    with pytest.raises(UserError, match="it needs an NVIDIA GPU of compute capability 8.0 or higher; auto or xla"):
        choose_backend("cudnn", mesh, "bfloat16", 8, 64)


@pytest.mark.parametrize("compute_capability", ["8.0", "9.0", "12.0"])
def test_newer_nvidia_gpus_use_cudnn(compute_capability):
    mesh = FakeMesh("gpu", compute_capability=compute_capability)
    assert choose_backend("auto", mesh, "bfloat16", 8, 64) == "cudnn"


@pytest.mark.parametrize("backend", ["xla", "xla_cpu", "splash", "cudnn"])
@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_attention_rounds_only_its_inputs_and_outputs(backend, causal):
    inputs = random_inputs(2, 4, 2, 640, 64)
    query, key, value, upstream = (jnp.asarray(inputs[i], jnp.bfloat16) for i in (0, 1, 2, 4))
    segment_ids = inputs[3]

    def attend(query, key, value):
        return BACKENDS[backend](query, key, value, jnp.asarray(segment_ids), causal=causal)

    def attend_and_differentiate(query, key, value):
        attended, vjp = jax.vjp(attend, query, key, value)
        return attended, *vjp(upstream)

    options = compiler_options(cpu_mesh())
    actual = jax.jit(attend_and_differentiate, compiler_options=options)(query, key, value)
    expected, gradients = reference(query, key, value, segment_ids, upstream, causal)
    for own, other in zip(actual, (expected, *gradients), strict=True):
        assert own.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(own, np.float64) - other) / np.linalg.norm(other)
        assert error < 2**-8, error  # twice the rounding of a bfloat16


def test_programs_on_cpus_leave_out_ynnpack():
    def compiled(options):
        scores = jax.jit(lambda x: jnp.einsum("hqd,hkd->hqk", x, x), compiler_options=options)
        return scores.lower(jnp.ones((4, 64, 64))).compile().as_text()

    assert "ynn_fusion" in compiled({})  # otherwise, nothing has to be left out any more
    assert "ynn_fusion" not in compiled(compiler_options(cpu_mesh()))
    assert compiler_options(FakeMesh("tpu")) == compiler_options(FakeMesh("gpu")) == {}


@pytest.mark.parametrize(
    ("setting", "platform", "dtype", "kv_heads", "tensor", "problem"),
    [
        ("splash", "cpu", "bfloat16", 8, 1, "it needs a TPU, and the devices are CPUs"),
        ("cudnn", "tpu", "bfloat16", 8, 1, "it needs a GPU, and the devices are TPUs"),
        ("cudnn", "gpu", "float32", 8, 1, "it computes in bfloat16: set model.compute_dtype to bfloat16"),
        ("splash", "tpu", "bfloat16", 2, 4, "mesh.tensor 4 must divide the number of key heads, 2"),
    ],
)
def test_backend_that_cannot_run_raises_user_error(setting, platform, dtype, kv_heads, tensor, problem):
    with pytest.raises(UserError) as error:
        choose_backend(setting, FakeMesh(platform, tensor), dtype, kv_heads, 64)
    assert str(error.value) == (f"model.attention_backend: {setting} cannot be used: {problem}; auto or xla would work")
