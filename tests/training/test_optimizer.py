"""Tests of AdamW with a bfloat16 first moment, and with moments in host memory."""

import json
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.999, 0.999)])
@pytest.mark.parametrize("moments_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_updates_match_adamw_in_float64(param_dtype, moments_dtype, betas):
    settings = OptimizerSettings(moments_dtype=moments_dtype, betas=betas, weight_decay=0.1)
    optimizer = make_optimizer(settings, lambda _: LEARNING_RATE)
    random = np.random.default_rng(0)
    start = random.standard_normal((64, 8)).astype(param_dtype)
    # They shrink to a third, so that moments that do not decay would be wrong.
    gradients = (random.standard_normal((40, 64, 8)) * np.linspace(3, 1, 40)[:, None, None]).astype(np.float32)
    params = {"weight": jnp.asarray(start)}
    state = optimizer.init(params)
    first, second = np.zeros((64, 8)), np.zeros((64, 8))

    def stored(x: np.ndarray, dtype: str | None) -> np.ndarray:
        return x.astype(dtype or "float32").astype(np.float64)

    for step, gradient in enumerate(gradients.astype(np.float64), 1):
        before = np.asarray(params["weight"], np.float64)
        updates, state = optimizer.update({"weight": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        ratio = first / (1 - betas[0] ** step) / (np.sqrt(second / (1 - betas[1] ** step)) + 1e-8)
        change = -LEARNING_RATE * (ratio + 0.1 * before)
        # What is stored may be rounded to either of two neighbors, so each step starts from what the last one stored.
        adam = next(node for node in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(node))
        np.testing.assert_allclose(updates["weight"], change, rtol=2e-5, atol=1e-7)
        rounding = 2**-8 if param_dtype == "bfloat16" else 2e-7
        np.testing.assert_allclose(np.asarray(params["weight"], np.float64), before + change, rtol=rounding, atol=1e-7)
        np.testing.assert_allclose(
            np.asarray(adam.mu["weight"], np.float64),
            stored(first, moments_dtype),
            rtol=2**-7 if moments_dtype else 1e-5,
            atol=1e-6,
        )
        np.testing.assert_allclose(adam.nu["weight"], second, rtol=1e-5)
        first = np.asarray(adam.mu["weight"], np.float64)
    assert (adam.mu["weight"].dtype, adam.nu["weight"].dtype) == (jnp.dtype(moments_dtype or "float32"), jnp.float32)
    assert params["weight"].dtype == param_dtype
    assert np.abs(np.asarray(params["weight"], np.float64) - start).max() > 5 * LEARNING_RATE


def is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


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


def test_bfloat16_weights_have_float32_gradients_and_moments(golden, tmp_path, plain):
    values = settings(golden, tmp_path / "run", learning_rate=1e-2)
    values["model"]["param_dtype"] = "bfloat16"
    actual = run(values, tmp_path)
    first, expected = actual[0], plain[1][0]
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)
    assert np.float32(first["grad_norm"]).astype("bfloat16") != np.float32(first["grad_norm"])
    assert actual[-1]["loss"] < first["loss"] - 1
    arrays = json.loads((tmp_path / "run" / "checkpoints" / "8" / "blueprint" / "metadata").read_text())["arrays"]
    assert {entry[0] for entry in arrays["params"].values()} == {"bfloat16"}
    moments = {entry[0] for name, entry in arrays["optimizer"].items() if "layers.up" in name}
    assert moments == {"float32"}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    assert without_seconds(run(values, tmp_path)) == without_seconds(actual)


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
