"""Tests of AdamW with a bfloat16 first moment, and with moments in host memory."""

import json
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from codiemb_jax.config import OptimizerSettings
from codiemb_jax.errors import UserError
from codiemb_jax.training import loop
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.run import check_host_memory
from tests.helpers import golden_settings, run

LEARNING_RATE = 1e-2


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize("moments_dtype", [None, "bfloat16"])
def test_updates_match_adamw_in_float64(moments_dtype):
    settings = OptimizerSettings(moments_dtype=moments_dtype, weight_decay=0.1)
    optimizer = make_optimizer(settings, lambda _: LEARNING_RATE)
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 8)).astype(np.float32)
    gradients = random.standard_normal((20, 64, 8)).astype(np.float32)
    params = {"weight": jnp.asarray(weight)}
    state = optimizer.init(params)
    expected, first, second = weight.astype(np.float64), np.zeros((64, 8)), np.zeros((64, 8))

    def rounded(x: Any) -> np.ndarray:
        """What optax computes in the dtype of the first moment: the moment, and its product with the decay rate."""
        return np.asarray(x).astype(ml_dtypes.bfloat16 if moments_dtype else np.float64).astype(np.float64)

    for step, gradient in enumerate(gradients.astype(np.float64), 1):
        updates, state = optimizer.update({"weight": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        first = rounded(rounded(0.9) * first) + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        ratio = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        expected -= LEARNING_RATE * (ratio + 0.1 * expected)
        first = rounded(first)
    adam = next(
        leaf for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: hasattr(leaf, "mu")) if hasattr(leaf, "mu")
    )
    assert (adam.mu["weight"].dtype, adam.nu["weight"].dtype) == (jnp.dtype(moments_dtype or "float32"), jnp.float32)
    # A moment close to the middle of two bfloat16 numbers may be rounded to the other one.
    tolerance = LEARNING_RATE * 2**-8 if moments_dtype else 1e-6
    np.testing.assert_allclose(params["weight"], expected, rtol=1e-6, atol=tolerance)
    np.testing.assert_allclose(
        adam.mu["weight"].astype(np.float32), first, rtol=2**-7 if moments_dtype else 1e-4, atol=1e-6
    )
    assert np.abs(params["weight"] - weight).max() > 5 * LEARNING_RATE


def settings(golden, folder, **optimizer: Any) -> dict[str, Any]:
    return golden_settings(
        golden, folder, mesh={"fsdp": 4}, checkpoint={"every_steps": 4, "every_epochs": None}, export=False,
        data={"ir": [str(golden / "data" / "news.jsonl")], "query_max_tokens": 64, "passage_max_tokens": 64},
        optimizer=optimizer,
    )  # fmt: skip


def without_seconds(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def plain(golden, tmp_path_factory):
    """The folder and metrics of a run of 8 steps with moments in float32 on the devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        folder = tmp_path_factory.mktemp("plain")
        return folder / "run", run(settings(golden, folder / "run"), folder)


@pytest.fixture
def memory_kinds(monkeypatch) -> list[set[str]]:
    """The memory kinds of matrices among the moments, before and after each step."""
    kinds: list[set[str]] = []
    make_step = loop.make_step

    def of(state: Any) -> set[str]:
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}

    def make_recording_step(*args: Any) -> Callable:
        step = make_step(*args)

        def record(state: Any, *others: Any) -> Any:
            kinds.append(of(state))
            state, metrics = step(state, *others)
            kinds.append(of(state))
            return state, metrics

        return record

    monkeypatch.setattr(loop, "make_step", make_recording_step)
    return kinds


def test_moments_in_host_memory_change_nothing(golden, tmp_path, plain, memory_kinds):
    folder, lines = plain
    offloaded = run(settings(golden, tmp_path / "run", offload=True), tmp_path)
    assert memory_kinds == [{"pinned_host"}] * 16
    assert without_seconds(offloaded) == without_seconds(lines)
    manifests = [path / "checkpoints" / "8" / "blueprint" / "metadata" for path in (folder, tmp_path / "run")]
    arrays = [json.loads(path.read_text())["arrays"] for path in manifests]
    assert arrays[0] == arrays[1]  # checksums of all weights and moments


@pytest.mark.parametrize("offload", [False, True])
def test_offload_may_change_on_resume(offload, golden, tmp_path, plain, memory_kinds):
    folder, lines = plain
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert without_seconds(run(settings(golden, tmp_path / "run", offload=offload), tmp_path)) == without_seconds(lines)
    assert memory_kinds == [{"pinned_host" if offload else "device"}] * 8


def test_bfloat16_moments_barely_change_the_trajectory(golden, tmp_path, plain):
    _, lines = plain
    actual = run(settings(golden, tmp_path / "run", moments_dtype="bfloat16"), tmp_path)
    losses, expected = (np.array([line["loss"] for line in trajectory]) for trajectory in (actual, lines))
    assert losses[:2] == pytest.approx(expected[:2], rel=1e-6)  # the learning rate of the first step is 0
    assert losses == pytest.approx(expected, rel=2e-2)
    assert not np.array_equal(losses, expected)
    arrays = json.loads((tmp_path / "run" / "checkpoints" / "8" / "blueprint" / "metadata").read_text())["arrays"]
    dtypes = {name: entry[0] for name, entry in arrays["optimizer"].items() if "layers.up" in name}
    assert {name.split(".")[-3]: dtype for name, dtype in dtypes.items()} == {"mu": "bfloat16", "nu": "float32"}
    # Resuming reads both dtypes.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    again = run(settings(golden, tmp_path / "run", moments_dtype="bfloat16"), tmp_path)
    assert without_seconds(again) == without_seconds(actual)


def test_moments_dtype_may_not_change_on_resume(golden, tmp_path, plain):
    shutil.copytree(plain[0], tmp_path / "run")
    with pytest.raises(UserError, match=r"other settings.*\n  optimizer.moments_dtype: was None, now bfloat16"):
        run(settings(golden, tmp_path / "run", moments_dtype="bfloat16"), tmp_path)


def test_devices_without_pinned_host_memory_raise_user_error():
    device = SimpleNamespace(device_kind="old GPU", addressable_memories=lambda: [SimpleNamespace(kind="device")])
    with pytest.raises(
        UserError, match="^optimizer.offload: JAX has no pinned host memory on old GPU; set it to false"
    ):
        check_host_memory(device)
    check_host_memory(jax.devices()[0])
