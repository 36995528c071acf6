"""What IR and STS add up: the original's figures, pools and lists, and any number of devices."""

from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from numpy.testing import assert_allclose

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives import contrastive, ranking
from codiemb_jax.objectives.tasks import ir_objective, sts_objective

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
AXES = ("data", "fsdp")
B, DIM, POSITIVES, NEGATIVES = 24, 8, 2, 3
# (mesh, size of a pool or list): smaller than a shard, equal to it, larger, and lying across its borders.
LAYOUTS = [
    ((1, 1), 8),
    ((2, 1), 8),
    ((2, 2), 3),
    ((1, 4), 8),
    ((4, 2), 2),
    ((4, 2), 3),
    ((4, 2), 8),
    ((4, 2), None),
]


def vectors(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@cache
def ir_batch():
    rng = np.random.default_rng(0)
    passages = vectors(rng, B * (POSITIVES + NEGATIVES), DIM)
    return vectors(rng, B, DIM), passages, rng.random((B, NEGATIVES)) < 0.8


@cache
def sts_batch():
    """first, second, first of the middle, second of the middle, scores."""
    rng = np.random.default_rng(1)
    return *(vectors(rng, B, DIM) for _ in range(4)), rng.integers(0, 5, B) / 4


def ir_loss(objective, queries, passages):
    return objective(queries, passages, ir_batch()[2])


def sts_loss(objective, first, second, middle_first, middle_second):
    return objective(first, second, (middle_first, middle_second), sts_batch()[4])


def values_and_grads(loss, inputs):
    """((loss, parts), gradients of the inputs)."""
    return jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True))(*inputs)


pearson, rank_kl, pro = (jax.jit(loss) for loss in (ranking.pearson, ranking.rank_kl, ranking.pro))
in_batch_info_nce = jax.jit(contrastive.in_batch_info_nce)


def ir(settings, *arguments):
    return jax.jit(partial(ir_objective, settings=settings))(*arguments)


def sts(settings, *arguments):
    return jax.jit(partial(sts_objective, settings=settings))(*arguments)


@cache
def unsharded_ir(size):
    settings = ObjectiveSettings(ir_pool_size=size, temperature=0.05)
    return values_and_grads(partial(ir_loss, partial(ir_objective, settings=settings)), ir_batch()[:2])


@cache
def unsharded_sts(size):
    settings = ObjectiveSettings(sts_list_size=size)
    return values_and_grads(partial(sts_loss, partial(sts_objective, settings=settings)), sts_batch()[:4])


def per_device(objective, settings, shape, arguments):
    """The objective on a (data, fsdp) mesh, each argument cut along its leading axis."""
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)
    return jax.shard_map(
        partial(objective, settings=settings, axes=AXES),
        mesh=mesh,
        in_specs=(PartitionSpec(AXES),) * arguments,
        out_specs=PartitionSpec(),
        check_vma=True,
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def assert_same_on_devices(loss, inputs, shape, size, expected):
    """Value and gradients are those of no mesh, and only what does not lie on one device is gathered."""
    traced = jax.jit(jax.value_and_grad(loss, tuple(range(len(inputs))), has_aux=True)).trace(*inputs)
    assert_same(traced.lower().compile()(*inputs), expected)
    shard = B // (shape[0] * shape[1])
    assert ("all_gather" in str(traced.jaxpr)) == (shard % (size or B) != 0)


@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_ir_does_not_depend_on_devices(shape, size):
    sharded = per_device(ir_objective, ObjectiveSettings(ir_pool_size=size, temperature=0.05), shape, 3)
    assert_same_on_devices(partial(ir_loss, sharded), ir_batch()[:2], shape, size, unsharded_ir(size))


@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_sts_does_not_depend_on_devices(shape, size):
    sharded = per_device(sts_objective, ObjectiveSettings(sts_list_size=size), shape, 4)
    assert_same_on_devices(partial(sts_loss, sharded), sts_batch()[:4], shape, size, unsharded_sts(size))


def test_ir_pools_are_separate_losses():
    size = 8
    queries, passages, present = ir_batch()
    width = POSITIVES + NEGATIVES
    settings = ObjectiveSettings(ir_pool_size=None, temperature=0.05)

    def separately(queries, passages):
        pools = [slice(i, i + size) for i in range(0, B, size)]
        by_example = passages.reshape(B, width, DIM)
        losses = [
            ir_objective(queries[p], by_example[p].reshape(-1, DIM), present[p], settings=settings)[0] for p in pools
        ]
        return sum(losses) / len(losses)

    expected, grads = jax.jit(jax.value_and_grad(separately, (0, 1)))(queries, passages)
    (loss, parts), pooled_grads = unsharded_ir(size)
    assert loss == parts["info_nce"]
    assert_same((loss, pooled_grads), (expected, grads))


def test_sts_lists_are_separate_losses():
    size = 8
    (loss, parts), _ = unsharded_sts(size)
    first, second, *middle, scores = sts_batch()
    similarity = np.sum(first * second, axis=1)
    lists = [slice(i, i + size) for i in range(0, B, size)]
    expected = {
        "pearson": np.mean([pearson(similarity[i], scores[i]) for i in lists]),
        "rank_kl": np.mean([rank_kl(similarity[i], scores[i], 0.05) for i in lists]),
        "pro": np.mean([pro(similarity[i], scores[i], 0.05) for i in lists]),
        "mid_info_nce": np.mean([in_batch_info_nce(middle[0][i], middle[1][i], scores[i], 0.02, 1.0) for i in lists]),
    }
    assert_same(parts, expected)
    assert_allclose(
        loss,
        2 * expected["pearson"] + 5 * expected["rank_kl"] + 0.5 * expected["pro"] + expected["mid_info_nce"],
        rtol=1e-12,
    )


@pytest.mark.parametrize("case", ["P2N4B6D16T0.02", "P2N4B28D64T0.02"])
def test_ir_golden(case):
    queries, passages, loss = (GOLDEN[f"ir_all/{case}/{name}"] for name in ("in0", "in1", "loss"))
    settings = ObjectiveSettings(temperature=0.02, ir_pool_size=None)
    got, _ = ir(settings, queries, passages, np.ones((len(queries), 4), bool))
    assert_allclose(got, loss, rtol=1e-9)


@pytest.mark.parametrize("case", ["binary8", "graded16", "graded_ties32", "continuous32", "constant6"])
def test_sts_golden(case):
    similarity, scores = GOLDEN[f"pearson/{case}/in0"], GOLDEN[f"pearson/{case}/y"]
    for family in ("rank_kl", "pro"):
        assert np.array_equal(GOLDEN[f"{family}/{case}/in0"], similarity)
    assert np.array_equal(GOLDEN[f"sts_nce/{case}/y"], scores)
    parts = {name: GOLDEN[f"{name}/{case}/loss"] for name in ("pearson", "rank_kl", "pro")}
    parts["mid_info_nce"] = GOLDEN[f"sts_nce/{case}/loss"]
    loss, got = sts(
        ObjectiveSettings(sts_list_size=None),
        similarity[:, None],
        np.ones((len(scores), 1)),
        (GOLDEN[f"sts_nce/{case}/in0"], GOLDEN[f"sts_nce/{case}/in1"]),
        scores,
    )
    assert set(got) == set(parts)
    for name, part in got.items():
        assert_allclose(part, parts[name], rtol=1e-6, atol=1e-9)
    assert_allclose(
        loss,
        2 * parts["pearson"] + 5 * parts["rank_kl"] + 0.5 * parts["pro"] + parts["mid_info_nce"],
        rtol=1e-6,
        atol=1e-9,
    )


def test_sts_without_middle_layer():
    first, second, _, _, scores = sts_batch()
    (full, parts), _ = unsharded_sts(8)
    loss, without = sts(ObjectiveSettings(sts_list_size=8), first, second, None, scores)
    assert_same(without, {name: part for name, part in parts.items() if name != "mid_info_nce"})
    assert_allclose(loss, full - parts["mid_info_nce"], rtol=1e-12)


def test_sts_without_middle_layer_on_a_mesh():
    """One spec for `middle=None`, as the training step gives it, and a list across devices."""
    first, second, _, _, scores = sts_batch()
    settings = ObjectiveSettings(sts_list_size=8)
    got = jax.jit(per_device(sts_objective, settings, (2, 2), 4))(first, second, None, scores)
    assert_same(got, sts(settings, first, second, None, scores))


def test_weights_and_thresholds_come_from_the_settings():
    first, second, *middle, scores = sts_batch()
    settings = ObjectiveSettings(
        sts_list_size=12,
        temperature=0.1,
        list_temperature=0.2,
        pearson_weight=3,
        rank_kl_weight=7,
        pro_weight=11,
        mid_info_nce_weight=13,
        mid_info_nce_threshold=0.5,
    )
    loss, parts = sts(settings, first, second, tuple(middle), scores)
    similarity = np.sum(first * second, axis=1)
    halves = [slice(0, 12), slice(12, 24)]
    assert_allclose(parts["rank_kl"], np.mean([rank_kl(similarity[i], scores[i], 0.2) for i in halves]), rtol=1e-12)
    assert_allclose(parts["pro"], np.mean([pro(similarity[i], scores[i], 0.2) for i in halves]), rtol=1e-12)
    nce = [in_batch_info_nce(middle[0][i], middle[1][i], scores[i], 0.1, 0.5) for i in halves]
    assert_allclose(parts["mid_info_nce"], np.mean(nce), rtol=1e-12)
    total = 3 * parts["pearson"] + 7 * parts["rank_kl"] + 11 * parts["pro"] + 13 * parts["mid_info_nce"]
    assert_allclose(loss, total, rtol=1e-12)


def test_float32_stays_float32():
    queries, passages, present = ir_batch()
    first, second, *middle, scores = (x.astype(np.float32) for x in sts_batch())
    settings = ObjectiveSettings(ir_pool_size=None, sts_list_size=8, temperature=0.05)
    ir_value, _ = ir(settings, queries.astype(np.float32), passages.astype(np.float32), present)
    sts_value, parts = sts(settings, first, second, tuple(middle), scores)
    assert {x.dtype for x in (ir_value, sts_value, *parts.values())} == {np.dtype(np.float32)}
    assert_allclose(ir_value, unsharded_ir(None)[0][0], rtol=1e-5)
    for name in ("pearson", "rank_kl", "pro"):
        assert_allclose(parts[name], unsharded_sts(8)[0][1][name], rtol=1e-5)
