"""Tests the objectives of CoDiEmb against golden values, by pool and list, and on several meshes."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives import contrastive, ranking
from codiemb_jax.objectives.contrastive import info_nce_ir
from codiemb_jax.objectives.ranking import codi_sts
from tests.objectives.layouts import (
    LAYOUTS,
    B,
    assert_same,
    assert_same_on_mesh,
    ir_batch,
    ir_examples,
    ir_loss,
    on_mesh,
    sts_batch,
    sts_examples,
    sts_loss,
    values_and_grads,
    without_mesh,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "losses.npz")
IR_SETTINGS = ObjectiveSettings(temperature=0.05)

pearson, rank_kl, pro = (jax.jit(loss) for loss in (ranking.pearson, ranking.rank_kl, ranking.pro))
in_batch_info_nce = jax.jit(contrastive.in_batch_info_nce)


def ir(settings, size, *batch):
    return jax.jit(without_mesh(info_nce_ir, settings, size))(ir_examples(*batch))


def sts(settings, size, *batch):
    return jax.jit(without_mesh(codi_sts, settings, size))(sts_examples(*batch))


@cache
def unsharded_ir(size):
    return values_and_grads(ir_loss(without_mesh(info_nce_ir, IR_SETTINGS, size)), ir_batch()[:2])


@cache
def unsharded_sts(size):
    return values_and_grads(sts_loss(without_mesh(codi_sts, ObjectiveSettings(), size)), sts_batch()[:4])


@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_ir_does_not_depend_on_devices(shape, size):
    sharded = on_mesh(info_nce_ir, IR_SETTINGS, size, shape)
    assert_same_on_mesh(ir_loss(sharded), ir_batch()[:2], shape, size, unsharded_ir(size))


@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_sts_does_not_depend_on_devices(shape, size):
    sharded = on_mesh(codi_sts, ObjectiveSettings(), size, shape)
    assert_same_on_mesh(sts_loss(sharded), sts_batch()[:4], shape, size, unsharded_sts(size))


def test_ir_loss_is_the_mean_over_pools():
    size = 8
    queries, passages, present = ir_batch()
    compute = without_mesh(info_nce_ir, IR_SETTINGS, None)

    def mean_over_pools(queries, passages):
        pools = [slice(i, i + size) for i in range(0, B, size)]
        losses = [compute(ir_examples(queries[p], passages[p], present[p]))[0] for p in pools]
        return sum(losses) / len(losses)

    expected, grads = jax.jit(jax.value_and_grad(mean_over_pools, (0, 1)))(queries, passages)
    (loss, parts), pooled_grads = unsharded_ir(size)
    assert loss == parts["info_nce"]
    assert_same((loss, pooled_grads), (expected, grads))


def test_sts_loss_is_the_mean_over_lists():
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
def test_ir_matches_golden_values(case):
    queries, passages, loss = (GOLDEN[f"ir_all/{case}/{name}"] for name in ("in0", "in1", "loss"))
    by_example = passages.reshape(len(queries), 2 + 4, -1)
    actual, _ = ir(ObjectiveSettings(temperature=0.02), None, queries, by_example, np.ones((len(queries), 4), bool))
    assert_allclose(actual, loss, rtol=1e-9)


@pytest.mark.parametrize("case", ["binary8", "graded16", "graded_ties32", "continuous32", "constant6"])
def test_sts_matches_golden_values(case):
    similarity, scores = GOLDEN[f"pearson/{case}/in0"], GOLDEN[f"pearson/{case}/y"]
    for family in ("rank_kl", "pro"):
        assert np.array_equal(GOLDEN[f"{family}/{case}/in0"], similarity)
    assert np.array_equal(GOLDEN[f"sts_nce/{case}/y"], scores)
    expected = {name: GOLDEN[f"{name}/{case}/loss"] for name in ("pearson", "rank_kl", "pro")}
    expected["mid_info_nce"] = GOLDEN[f"sts_nce/{case}/loss"]
    loss, parts = sts(
        ObjectiveSettings(),
        None,
        similarity[:, None],
        np.ones((len(scores), 1)),
        GOLDEN[f"sts_nce/{case}/in0"],
        GOLDEN[f"sts_nce/{case}/in1"],
        scores,
    )
    assert set(parts) == set(expected)
    for name, part in parts.items():
        assert_allclose(part, expected[name], rtol=1e-6, atol=1e-9)
    assert_allclose(
        loss,
        2 * expected["pearson"] + 5 * expected["rank_kl"] + 0.5 * expected["pro"] + expected["mid_info_nce"],
        rtol=1e-6,
        atol=1e-9,
    )


def test_sts_without_middle_layer():
    first, second, _, _, scores = sts_batch()
    (full, parts), _ = unsharded_sts(8)
    loss, without = sts(ObjectiveSettings(), 8, first, second, None, None, scores)
    assert_same(without, {name: part for name, part in parts.items() if name != "mid_info_nce"})
    assert_allclose(loss, full - parts["mid_info_nce"], rtol=1e-12)


def test_sts_without_middle_layer_on_a_mesh():
    """Uses a single partition spec with `middle=None`, as the training step does, and lists that cross devices."""
    first, second, _, _, scores = sts_batch()
    settings = ObjectiveSettings()
    actual = jax.jit(on_mesh(codi_sts, settings, 8, (2, 2)))(sts_examples(first, second, None, None, scores))
    assert_same(actual, sts(settings, 8, first, second, None, None, scores))


def test_weights_and_thresholds_come_from_the_settings():
    first, second, *middle, scores = sts_batch()
    settings = ObjectiveSettings(
        temperature=0.1,
        list_temperature=0.2,
        pearson_weight=3,
        rank_kl_weight=7,
        pro_weight=11,
        mid_info_nce_weight=13,
        mid_info_nce_threshold=0.5,
    )
    loss, parts = sts(settings, 12, first, second, *middle, scores)
    similarity = np.sum(first * second, axis=1)
    halves = [slice(0, 12), slice(12, 24)]
    assert_allclose(parts["rank_kl"], np.mean([rank_kl(similarity[i], scores[i], 0.2) for i in halves]), rtol=1e-12)
    assert_allclose(parts["pro"], np.mean([pro(similarity[i], scores[i], 0.2) for i in halves]), rtol=1e-12)
    nce = [in_batch_info_nce(middle[0][i], middle[1][i], scores[i], 0.1, 0.5) for i in halves]
    assert_allclose(parts["mid_info_nce"], np.mean(nce), rtol=1e-12)
    total = 3 * parts["pearson"] + 7 * parts["rank_kl"] + 11 * parts["pro"] + 13 * parts["mid_info_nce"]
    assert_allclose(loss, total, rtol=1e-12)


def test_float32_inputs_give_float32_outputs():
    queries, passages, present = ir_batch()
    sts_float32 = (x.astype(np.float32) for x in sts_batch())
    ir_value, _ = ir(IR_SETTINGS, None, queries.astype(np.float32), passages.astype(np.float32), present)
    sts_value, parts = sts(ObjectiveSettings(temperature=0.05), 8, *sts_float32)
    assert {x.dtype for x in (ir_value, sts_value, *parts.values())} == {np.dtype(np.float32)}
    assert_allclose(ir_value, unsharded_ir(None)[0][0], rtol=1e-5)
    for name in ("pearson", "rank_kl", "pro"):
        assert_allclose(parts[name], unsharded_sts(8)[0][1][name], rtol=1e-5)
