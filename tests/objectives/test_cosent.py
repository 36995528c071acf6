"""Tests CoSENT and InfoNCE for STS against loops and sentence-transformers, and on several meshes."""

from functools import cache

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sentence_transformers import util
from sentence_transformers.sentence_transformer.losses import CoSENTLoss

from codiemb_jax.config import ObjectiveSettings
from codiemb_jax.objectives.contrastive import info_nce_sts
from codiemb_jax.objectives.cosent import binary_cosent, cosent, cosent_ir, cosent_sts
from tests.objectives.layouts import (
    DIM,
    LAYOUTS,
    NEGATIVES,
    POSITIVES,
    B,
    assert_same_on_mesh,
    ir_batch,
    ir_examples,
    ir_loss,
    on_mesh,
    sts_batch,
    sts_examples,
    sts_loss,
    values_and_grads,
    vectors,
    without_mesh,
)

HYPOTHESIS = settings(max_examples=40, deadline=None, derandomize=True)
SETTINGS = ObjectiveSettings()
TEMPERATURES = [0.02, 0.05, 1.0]

compiled_cosent = jax.jit(jax.value_and_grad(cosent))
compiled_binary = jax.jit(jax.value_and_grad(binary_cosent))


def log_sum_exp(terms):
    return max(terms) + np.log(sum(np.exp(term - max(terms)) for term in terms))


def looped_cosent(similarity, labels, temperature):
    """Returns the loss and its gradient with respect to the similarities."""
    pairs = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if labels[i] > labels[j]]
    terms = [(similarity[j] - similarity[i]) / temperature for i, j in pairs]
    loss = log_sum_exp([0.0, *terms])
    gradient = np.zeros(len(labels))
    for (i, j), term in zip(pairs, terms, strict=True):
        gradient[j] += np.exp(term - loss) / temperature
        gradient[i] -= np.exp(term - loss) / temperature
    return loss, gradient


def reference_cosent(similarity, labels):
    """Returns the loss of sentence-transformers at its default scale of 20, and its gradient."""
    x = torch.tensor(similarity, dtype=torch.float64, requires_grad=True)
    criterion = CoSENTLoss(None, scale=20.0, similarity_fct=lambda first, _: first)
    loss = criterion.compute_loss_from_embeddings([x, x], torch.tensor(labels, dtype=torch.float64))
    loss.backward()
    return loss.item(), x.grad.numpy()


def looped_cosent_ir(queries, passages, present, size, temperature):
    """Returns the mean over pools and its gradients with respect to queries and passages."""
    losses, gradients = [], (np.zeros(queries.shape), np.zeros(passages.shape))
    positives = passages.shape[1] - present.shape[1]
    for start in range(0, len(queries), size):
        pairs = [
            (i, t)
            for i in range(start, start + size)
            for t in range(passages.shape[1])
            if t < positives or present[i, t - positives]
        ]
        similarity = [queries[i] @ passages[i, t] for i, t in pairs]
        loss, gradient = looped_cosent(similarity, [float(t < positives) for _, t in pairs], temperature)
        losses.append(loss)
        for (i, t), pair_gradient in zip(pairs, gradient * size / len(queries), strict=True):
            gradients[0][i] += pair_gradient * passages[i, t]
            gradients[1][i, t] += pair_gradient * queries[i]
    return np.mean(losses), gradients


def looped_cosent_sts(first, second, scores, size, temperature):
    """Returns the mean over lists and its gradients with respect to first and second texts."""
    losses, gradients = [], (np.zeros(first.shape), np.zeros(second.shape))
    for start in range(0, len(scores), size):
        pairs = range(start, start + size)
        similarity = [first[i] @ second[i] for i in pairs]
        loss, gradient = looped_cosent(similarity, scores[start : start + size], temperature)
        losses.append(loss)
        for i, pair_gradient in zip(pairs, gradient * size / len(scores), strict=True):
            gradients[0][i] += pair_gradient * second[i]
            gradients[1][i] += pair_gradient * first[i]
    return np.mean(losses), gradients


def looped_info_nce_sts(first, second, scores, size, temperature, threshold):
    """Returns the mean over lists and its gradients with respect to first and second texts."""
    losses, gradients = [], (np.zeros(first.shape), np.zeros(second.shape))
    for start in range(0, len(scores), size):
        pairs = range(start, start + size)
        positives = [i for i in pairs if scores[i] >= threshold]
        list_losses = []
        for i in positives:
            logits = np.array([first[i] @ second[j] for j in pairs]) / temperature
            total = log_sum_exp(logits)
            list_losses.append(total - logits[i - start])
            weight = size / len(scores) / len(positives) / temperature
            for j, logit in zip(pairs, logits, strict=True):
                logit_gradient = weight * (np.exp(logit - total) - (i == j))
                gradients[0][i] += logit_gradient * second[j]
                gradients[1][j] += logit_gradient * first[i]
        losses.append(np.mean(list_losses) if list_losses else 0.0)
    return np.mean(losses), gradients


def central_differences(function, x, step=1e-6):
    """Returns the numerical gradient of a scalar function of an array."""
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        values = []
        for sign in (1, -1):
            shifted = np.array(x)
            shifted[index] += sign * step
            values.append(float(function(shifted)))
        gradient[index] = (values[0] - values[1]) / (2 * step)
    return gradient


def assert_close(actual, expected, rtol=1e-11, atol=1e-11):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_allclose(x, y, rtol=rtol, atol=atol)


def lists(*sizes):
    """Draws similarities in [-1, 1] and labels, both with ties, for lists of these sizes."""
    similarity = st.integers(-20, 20).map(lambda i: i / 20) | st.floats(-1, 1)
    labels = st.sampled_from([[0.0, 1.0], [2.5], [0.0, 0.5, 1.0, 5.0], [-1.0, -0.25, 1e6]])
    return st.tuples(st.sampled_from(sizes), labels).flatmap(
        lambda drawn: st.tuples(
            st.lists(similarity, min_size=drawn[0], max_size=drawn[0]).map(np.array),
            st.lists(st.sampled_from(drawn[1]), min_size=drawn[0], max_size=drawn[0]).map(np.array),
        )
    )


@HYPOTHESIS
@given(lists(1, 2, 5, 9), st.sampled_from(TEMPERATURES))
def test_cosent_matches_loops(pairs, temperature):
    assert_close(compiled_cosent(*pairs, temperature), looped_cosent(*pairs, temperature))


@HYPOTHESIS
@given(lists(1, 2, 5, 9, 32))
def test_cosent_matches_sentence_transformers(pairs):
    assert_close(compiled_cosent(*pairs, 0.05), reference_cosent(*pairs))


def test_loss_gradients_match_central_differences():
    rng = np.random.default_rng(0)
    similarity, labels = rng.uniform(-1, 1, 7), np.array([0.0, 1.0, 1.0, 0.5, 3.0, 0.0, 0.5])
    numeric = central_differences(lambda x: compiled_cosent(x, labels, 0.05)[0], similarity)
    assert np.abs(numeric).max() > 1
    assert_allclose(compiled_cosent(similarity, labels, 0.05)[1], numeric, rtol=1e-6, atol=1e-6)
    positive, present = labels > 0.5, np.array([True, True, False, True, True, True, False])
    numeric = central_differences(lambda x: compiled_binary(x, positive, present, 0.05)[0], similarity)
    assert np.abs(numeric).max() > 1
    assert_allclose(compiled_binary(similarity, positive, present, 0.05)[1], numeric, rtol=1e-6, atol=1e-6)


@HYPOTHESIS
@given(lists(2, 5, 9), st.sampled_from(TEMPERATURES), st.randoms(use_true_random=False))
def test_cosent_depends_only_on_the_order_of_labels(pairs, temperature, random):
    similarity, labels = pairs
    expected = compiled_cosent(similarity, labels, temperature)
    # Distances of labels, an offset of the similarities and the order of pairs do not matter.
    _, ranks = np.unique(labels, return_inverse=True)
    assert_close(compiled_cosent(similarity, ranks**2 - 5.0, temperature), expected)
    shifted = compiled_cosent(similarity + 0.5, labels, temperature)
    assert_close(shifted, expected, rtol=1e-10, atol=1e-10)
    order = np.array(random.sample(range(len(labels)), len(labels)))
    value, gradient = compiled_cosent(similarity[order], labels[order], temperature)
    assert_close((value, gradient), (expected[0], expected[1][order]))


@HYPOTHESIS
@given(lists(1, 2, 5, 9, 16), st.sampled_from(TEMPERATURES), st.integers(0, 2**32 - 1), st.sampled_from([0, 0.7, 1]))
def test_binary_cosent_matches_loops_over_present_pairs(pairs, temperature, seed, density):
    similarity, labels = pairs
    positive, present = labels > 0.5, np.random.default_rng(seed).random(len(labels)) < density
    value, gradient = compiled_binary(similarity, positive, present, temperature)
    expected = looped_cosent(similarity[present], positive[present].astype(float), temperature)
    assert_close((value, gradient[present]), expected)
    assert_array_equal(gradient[~present], 0)
    if not (positive & present).any() or not (~positive & present).any():
        assert value == 0
        assert_array_equal(gradient, 0)


@HYPOTHESIS
@given(lists(1, 2, 5, 9, 32))
def test_binary_cosent_matches_sentence_transformers(pairs):
    similarity, labels = pairs
    positive = labels > 0.5
    expected = reference_cosent(similarity, positive.astype(float))
    assert_close(compiled_binary(similarity, positive, np.ones(len(labels), bool), 0.05), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 7, 32])
def test_equal_labels_give_zero_loss(n, dtype):
    similarity = np.random.default_rng(n).uniform(-1, 1, n).astype(dtype)
    for label in (0.0, 0.7, 5.0):
        value, gradient = compiled_cosent(similarity, np.full(n, label, dtype), 0.05)
        assert value == 0
        assert value.dtype == gradient.dtype == dtype
        assert_array_equal(gradient, 0)
    for positive in (False, True):
        for present in (False, True):
            value, gradient = compiled_binary(similarity, np.full(n, positive), np.full(n, present), 0.05)
            assert value == 0
            assert value.dtype == gradient.dtype == dtype
            assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("temperature", [1e-5, 0.05])
@pytest.mark.parametrize("similarity", [-1.0, 0.0, 0.3, 1.0])
def test_equal_similarities(similarity, temperature, dtype):
    """All 3 x 4 terms are exp(0), regardless of the ratio of similarity and temperature."""
    similarities, positive, present = np.full(8, similarity, dtype), np.arange(8) < 4, np.arange(8) != 2
    # Each of the 3 present positives is compared with 4 negatives, and each negative with 3 positives.
    expected = np.where(positive, -4, 3) / 13 / temperature * present
    eps = float(np.finfo(dtype).eps)
    value, gradient = compiled_cosent(similarities[present], positive[present].astype(dtype), temperature)
    assert value.dtype == gradient.dtype == dtype
    assert_allclose(value, np.log(13), rtol=4 * eps)
    assert_allclose(gradient, expected[present], rtol=16 * eps)
    # Separate sums over positives and negatives have rounding errors relative to similarity / temperature.
    rounding = 16 * eps * max(1, abs(similarity) / temperature)
    value, gradient = compiled_binary(similarities, positive, present, temperature)
    assert value.dtype == gradient.dtype == dtype
    assert_allclose(value, np.log(13), rtol=rounding)
    assert_allclose(gradient, expected, rtol=rounding)


def test_no_intermediate_nan():
    x = np.random.default_rng(1).uniform(-1, 1, 4)
    mixed = np.array([True, False, True, False])
    with jax.debug_nans(True):  # checks every operation, because nothing is jitted
        for labels in (np.zeros(4), np.arange(4.0)):
            assert np.isfinite(jax.grad(cosent)(x, labels, 0.02)).all()
        for positive in (mixed, mixed | True, mixed & False):
            for present in (mixed, ~mixed, mixed | True, mixed & False):
                assert np.isfinite(jax.grad(binary_cosent)(x, positive, present, 0.02)).all()


def test_float32_is_accurate_at_extreme_similarities():
    similarity = np.array([1, -1, 1, -1, 0, 1], np.float32)
    for labels in (np.array([0, 1, 0, 1, 0, 0], np.float32), np.array([1, 0, 1, 0, 0, 1], np.float32)):
        for temperature in (0.001, 0.02):
            general = compiled_cosent(similarity, labels, temperature)
            binary = compiled_binary(similarity, labels > 0, np.ones(6, bool), temperature)
            expected, expected_gradient = looped_cosent(similarity.astype(float), labels, temperature)
            for loss, gradient in (general, binary):
                assert loss.dtype == gradient.dtype == np.float32
                assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
                assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@cache
def compiled(objective, size, **changes):
    """Returns a function from two inputs and `present` or scores to (loss, parts) and gradients of the inputs."""
    compute = without_mesh(objective, ObjectiveSettings(**changes), size)

    def loss(first, second, third):
        if objective is cosent_ir:
            return compute(ir_examples(first, second, third))
        return compute(sts_examples(first, second, None, None, third))

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@HYPOTHESIS
@given(
    shape=st.sampled_from([(6, 3, 2, 3), (4, 4, 1, 1), (4, 1, 3, 2)]),
    temperature=st.sampled_from([0.02, 1.0]),
    density=st.floats(0, 1),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_cosent_ir_matches_loops(shape, temperature, density, ties, seed):
    b, size, positives, negatives = shape
    rng = np.random.default_rng(seed)
    queries, passages = vectors(rng, b, 4), vectors(rng, b, positives + negatives, 4)
    if ties:  # a text that is both positive and negative, and a duplicate example
        passages[:, -1] = passages[:, 0]
        queries[1], passages[1] = queries[0], passages[0]
    present = rng.random((b, negatives)) < density
    (loss, parts), gradients = compiled(cosent_ir, size, list_temperature=temperature)(queries, passages, present)
    expected, expected_gradients = looped_cosent_ir(queries, passages, present, size, temperature)
    assert_close((loss, gradients), (expected, expected_gradients))
    assert list(parts) == ["cosent"] and parts["cosent"] == loss
    assert_array_equal(gradients[1][:, positives:][~present], 0)


@HYPOTHESIS
@given(
    scores=st.sampled_from([2, 6]).flatmap(
        lambda n: st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=n, max_size=n).map(np.array)
    ),
    list_size=st.sampled_from([1, 2, None]),
    temperature=st.sampled_from([0.02, 1.0]),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_sts_objectives_match_loops(scores, list_size, temperature, ties, seed):
    rng = np.random.default_rng(seed)
    first, second = vectors(rng, 2, len(scores), 4)
    if ties:  # a duplicate pair, and a second text that is in several pairs
        first[1], second[1] = first[0], second[0]
        second[-1] = second[0]
    size = list_size or len(scores)
    pairs = first, second, scores
    compute = compiled(cosent_sts, list_size, list_temperature=temperature, temperature=7.0)
    (loss, parts), gradients = compute(*pairs)
    assert_close((loss, gradients), looped_cosent_sts(*pairs, size, temperature))
    assert list(parts) == ["cosent"] and parts["cosent"] == loss
    changes = {"temperature": temperature, "list_temperature": 7.0, "mid_info_nce_threshold": 0.5}
    (loss, parts), gradients = compiled(info_nce_sts, list_size, **changes)(*pairs)
    assert_close((loss, gradients), looped_info_nce_sts(*pairs, size, temperature, 0.5))
    assert list(parts) == ["info_nce"] and parts["info_nce"] == loss


@pytest.mark.parametrize("objective", [cosent_ir, cosent_sts, info_nce_sts])
def test_objective_gradients_match_central_differences(objective):
    first, second, _, _, third = sts_batch()
    if objective is cosent_ir:
        first, second, third = ir_batch()
    first, second, third = first[:6], second[:6], third[:6]
    compute = compiled(objective, 3, temperature=0.2, mid_info_nce_threshold=0.5)  # far from saturation
    _, gradients = compute(first, second, third)
    expected = (
        central_differences(lambda x: compute(x, second, third)[0][0], first),
        central_differences(lambda x: compute(first, x, third)[0][0], second),
    )
    assert min(np.abs(gradient).max() for gradient in expected) > 0.1
    assert_close(gradients, expected, rtol=1e-6, atol=1e-6)


def test_cosent_sts_matches_sentence_transformers():
    first, second, _, _, scores = sts_batch()
    criterion = CoSENTLoss(None, scale=20.0, similarity_fct=util.pairwise_dot_score)
    tensors = [torch.tensor(texts, requires_grad=True) for texts in (first, second)]
    expected = criterion.compute_loss_from_embeddings(tensors, torch.tensor(scores))
    expected.backward()
    (loss, _), gradients = compiled(cosent_sts, None)(first, second, scores)
    assert_close((loss, gradients), (expected.item(), tuple(tensor.grad.numpy() for tensor in tensors)))
    # The default of sentence-transformers is cosine similarity, which equals the dot product for unit vectors.
    default = CoSENTLoss(None).compute_loss_from_embeddings(tensors, torch.tensor(scores))
    assert_allclose(loss, default.item(), rtol=1e-11)


def test_cosent_ir_matches_sentence_transformers():
    """Pairs each query with its own passages, with label 1 for positives and 0 for negatives."""
    queries, passages, present = ir_batch()
    assert not present.all()
    mask = np.concatenate([np.ones((B, POSITIVES), bool), present], axis=1)
    labels = np.broadcast_to(np.arange(POSITIVES + NEGATIVES) < POSITIVES, mask.shape)
    tensors = [torch.tensor(texts, requires_grad=True) for texts in (queries, passages)]
    pairs = [tensors[0][:, None].expand(*mask.shape, DIM)[mask], tensors[1][mask]]
    criterion = CoSENTLoss(None, scale=20.0, similarity_fct=util.pairwise_dot_score)
    expected = criterion.compute_loss_from_embeddings(pairs, torch.tensor(labels[mask], dtype=torch.float64))
    expected.backward()
    (loss, _), gradients = compiled(cosent_ir, None)(*ir_batch())
    assert_close((loss, gradients), (expected.item(), tuple(tensor.grad.numpy() for tensor in tensors)))


@cache
def unsharded_ir(size):
    return values_and_grads(ir_loss(without_mesh(cosent_ir, SETTINGS, size)), ir_batch()[:2])


@cache
def unsharded_sts(objective, size):
    return values_and_grads(sts_loss(without_mesh(objective, SETTINGS, size)), sts_batch()[:4])


@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_cosent_ir_does_not_depend_on_devices(shape, size):
    sharded = on_mesh(cosent_ir, SETTINGS, size, shape)
    assert_same_on_mesh(ir_loss(sharded), ir_batch()[:2], shape, size, unsharded_ir(size))


@pytest.mark.parametrize("objective", [cosent_sts, info_nce_sts])
@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_sts_objectives_do_not_depend_on_devices(objective, shape, size):
    sharded = on_mesh(objective, SETTINGS, size, shape)
    expected = unsharded_sts(objective, size)
    assert expected[0][0] > 0.1
    assert_same_on_mesh(sts_loss(sharded), sts_batch()[:4], shape, size, expected)
    # The middle layer is not used.
    assert all((gradient == 0).all() for gradient in expected[1][2:])


def test_batches_without_contrast_have_zero_loss_and_gradients():
    queries, passages, present = ir_batch()
    (loss, _), gradients = compiled(cosent_ir, 8)(queries, passages, np.zeros_like(present))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)
    first, second, _, _, scores = sts_batch()
    (loss, _), gradients = compiled(info_nce_sts, 8)(first, second, scores / 2)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)
    (loss, _), gradients = compiled(cosent_sts, 8)(first, second, np.full(B, 3.0))
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_float32_inputs_give_float32_outputs():
    queries, passages, present = ir_batch()
    first, second, _, _, scores = (x.astype(np.float32) for x in sts_batch())
    examples = queries.astype(np.float32), passages.astype(np.float32), present
    results = [(compiled(cosent_ir, 8)(*examples), unsharded_ir(8))]
    for objective in (cosent_sts, info_nce_sts):
        value, gradients = unsharded_sts(objective, 8)
        results.append((compiled(objective, 8)(first, second, scores), (value, gradients[:2])))
    for actual, expected in results:
        assert {x.dtype for x in jax.tree.leaves(actual)} == {np.dtype(np.float32)}
        assert_close(actual, expected, rtol=1e-4, atol=1e-5)
