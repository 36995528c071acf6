"""CoSENT and, for similarity, InfoNCE: against loops, sentence-transformers, and on any number of devices."""

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
    assert_same_on_devices,
    ir_batch,
    ir_examples,
    ir_loss,
    on_one,
    per_device,
    sts_batch,
    sts_examples,
    sts_loss,
    values_and_grads,
    vectors,
)

HYPOTHESIS = settings(max_examples=40, deadline=None, derandomize=True)
SETTINGS = ObjectiveSettings()
TEMPERATURES = [0.02, 0.05, 1.0]

compiled_cosent = jax.jit(jax.value_and_grad(cosent))
compiled_binary = jax.jit(jax.value_and_grad(binary_cosent))


def log_sum_exp(terms):
    return max(terms) + np.log(sum(np.exp(term - max(terms)) for term in terms))


def looped_cosent(similarity, labels, temperature):
    """The loss, and its gradient by the similarities: each term's share of the sum, divided by the temperature."""
    pairs = [(i, j) for i in range(len(labels)) for j in range(len(labels)) if labels[i] > labels[j]]
    terms = [(similarity[j] - similarity[i]) / temperature for i, j in pairs]
    loss = log_sum_exp([0.0, *terms])
    gradient = np.zeros(len(labels))
    for (i, j), term in zip(pairs, terms, strict=True):
        gradient[j] += np.exp(term - loss) / temperature
        gradient[i] -= np.exp(term - loss) / temperature
    return loss, gradient


def their_cosent(similarity, labels):
    """sentence-transformers' loss of given similarities at its default scale of 20, and its gradient."""
    x = torch.tensor(similarity, dtype=torch.float64, requires_grad=True)
    loss_of = CoSENTLoss(None, scale=20.0, similarity_fct=lambda first, _: first)
    loss = loss_of.compute_loss_from_embeddings([x, x], torch.tensor(labels, dtype=torch.float64))
    loss.backward()
    return loss.item(), x.grad.numpy()


def looped_cosent_ir(queries, passages, present, size, temperature):
    """The mean over pools, and its gradients by queries and passages."""
    losses, gradients = [], (np.zeros(queries.shape), np.zeros(passages.shape))
    positives = passages.shape[1] - present.shape[1]
    for start in range(0, len(queries), size):
        places = [
            (i, t)
            for i in range(start, start + size)
            for t in range(passages.shape[1])
            if t < positives or present[i, t - positives]
        ]
        similarity = [queries[i] @ passages[i, t] for i, t in places]
        loss, gradient = looped_cosent(similarity, [float(t < positives) for _, t in places], temperature)
        losses.append(loss)
        for (i, t), own in zip(places, gradient * size / len(queries), strict=True):
            gradients[0][i] += own * passages[i, t]
            gradients[1][i, t] += own * queries[i]
    return np.mean(losses), gradients


def looped_cosent_sts(first, second, scores, size, temperature):
    """The mean over lists, and its gradients by both texts."""
    losses, gradients = [], (np.zeros(first.shape), np.zeros(second.shape))
    for start in range(0, len(scores), size):
        own = range(start, start + size)
        loss, gradient = looped_cosent([first[i] @ second[i] for i in own], scores[start : start + size], temperature)
        losses.append(loss)
        for i, of_pair in zip(own, gradient * size / len(scores), strict=True):
            gradients[0][i] += of_pair * second[i]
            gradients[1][i] += of_pair * first[i]
    return np.mean(losses), gradients


def looped_info_nce_sts(first, second, scores, size, temperature, threshold):
    """The mean over lists, and its gradients by both texts."""
    losses, gradients = [], (np.zeros(first.shape), np.zeros(second.shape))
    for start in range(0, len(scores), size):
        own = range(start, start + size)
        alike = [i for i in own if scores[i] >= threshold]
        of_list = []
        for i in alike:
            logits = np.array([first[i] @ second[j] for j in own]) / temperature
            total = log_sum_exp(logits)
            of_list.append(total - logits[i - start])
            weight = size / len(scores) / len(alike) / temperature
            for j, logit in zip(own, logits, strict=True):
                excess = weight * (np.exp(logit - total) - (i == j))
                gradients[0][i] += excess * second[j]
                gradients[1][j] += excess * first[i]
        losses.append(np.mean(of_list) if of_list else 0.0)
    return np.mean(losses), gradients


def central_differences(function, x, step=1e-6):
    """The gradient of a function of an array, one element after another."""
    gradient = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        values = []
        for sign in (1, -1):
            moved = np.array(x)
            moved[place] += sign * step
            values.append(float(function(moved)))
        gradient[place] = (values[0] - values[1]) / (2 * step)
    return gradient


def assert_close(got, expected, rtol=1e-11, atol=1e-11):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_allclose(one, other, rtol=rtol, atol=atol)


def lists(*sizes):
    """Similarities in [-1, 1] and labels, both with ties, for lists of these sizes."""
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
def test_cosent_equals_loops(pairs, temperature):
    assert_close(compiled_cosent(*pairs, temperature), looped_cosent(*pairs, temperature))


@HYPOTHESIS
@given(lists(1, 2, 5, 9, 32))
def test_cosent_equals_sentence_transformers(pairs):
    assert_close(compiled_cosent(*pairs, 0.05), their_cosent(*pairs))


def test_the_gradients_are_those_of_central_differences():
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
def test_cosent_is_a_matter_of_the_order_of_labels(pairs, temperature, random):
    similarity, labels = pairs
    expected = compiled_cosent(similarity, labels, temperature)
    # Neither how far labels are apart matters, nor where the similarities lie, nor in what order pairs come.
    _, ranks = np.unique(labels, return_inverse=True)
    assert_close(compiled_cosent(similarity, ranks**2 - 5.0, temperature), expected)
    shifted = compiled_cosent(similarity + 0.5, labels, temperature)
    assert_close(shifted, expected, rtol=1e-10, atol=1e-10)
    order = np.array(random.sample(range(len(labels)), len(labels)))
    value, gradient = compiled_cosent(similarity[order], labels[order], temperature)
    assert_close((value, gradient), (expected[0], expected[1][order]))


@HYPOTHESIS
@given(lists(1, 2, 5, 9, 16), st.sampled_from(TEMPERATURES), st.integers(0, 2**32 - 1), st.sampled_from([0, 0.7, 1]))
def test_binary_cosent_equals_loops_over_the_present_pairs(pairs, temperature, seed, density):
    similarity, labels = pairs
    positive, present = labels > 0.5, np.random.default_rng(seed).random(len(labels)) < density
    value, gradient = compiled_binary(similarity, positive, present, temperature)
    expected, of_present = looped_cosent(similarity[present], positive[present].astype(float), temperature)
    assert_close((value, gradient[present]), (expected, of_present))
    assert_array_equal(gradient[~present], 0)
    if not (positive & present).any() or not (~positive & present).any():
        assert value == 0
        assert_array_equal(gradient, 0)


@HYPOTHESIS
@given(lists(1, 2, 5, 9, 32))
def test_binary_cosent_equals_sentence_transformers(pairs):
    similarity, labels = pairs
    positive = labels > 0.5
    expected = their_cosent(similarity, positive.astype(float))
    assert_close(compiled_binary(similarity, positive, np.ones(len(labels), bool), 0.05), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 7, 32])
def test_equal_labels_give_zero(n, dtype):
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
    """Each of 3 x 4 terms is exp(0), however large the similarities are beside the temperature."""
    similarities, positive, present = np.full(8, similarity, dtype), np.arange(8) < 4, np.arange(8) != 2
    # Each of the 3 present positives is compared with 4 others, each of those with 3.
    expected = np.where(positive, -4, 3) / 13 / temperature * present
    eps = float(np.finfo(dtype).eps)
    value, gradient = compiled_cosent(similarities[present], positive[present].astype(dtype), temperature)
    assert value.dtype == gradient.dtype == dtype
    assert_allclose(value, np.log(13), rtol=4 * eps)
    assert_allclose(gradient, expected[present], rtol=16 * eps)
    # Sums of their own for positives and negatives round what is as large as similarity / temperature.
    rounding = 16 * eps * max(1, abs(similarity) / temperature)
    value, gradient = compiled_binary(similarities, positive, present, temperature)
    assert value.dtype == gradient.dtype == dtype
    assert_allclose(value, np.log(13), rtol=rounding)
    assert_allclose(gradient, expected, rtol=rounding)


def test_no_nan_on_the_way():
    x = np.random.default_rng(1).uniform(-1, 1, 4)
    mixed = np.array([True, False, True, False])
    with jax.debug_nans(True):  # looks at every operation, as long as nothing is compiled
        for labels in (np.zeros(4), np.arange(4.0)):
            assert np.isfinite(jax.grad(cosent)(x, labels, 0.02)).all()
        for positive in (mixed, mixed | True, mixed & False):
            for present in (mixed, ~mixed, mixed | True, mixed & False):
                assert np.isfinite(jax.grad(binary_cosent)(x, positive, present, 0.02)).all()


def test_float32_stays_finite_at_the_extremes():
    similarity = np.array([1, -1, 1, -1, 0, 1], np.float32)
    for labels in (np.array([0, 1, 0, 1, 0, 0], np.float32), np.array([1, 0, 1, 0, 0, 1], np.float32)):
        for temperature in (0.001, 0.02):
            value, gradient = compiled_cosent(similarity, labels, temperature)
            binary = compiled_binary(similarity, labels > 0, np.ones(6, bool), temperature)
            expected, expected_gradient = looped_cosent(similarity.astype(float), labels, temperature)
            for loss, grad in ((value, gradient), binary):
                assert loss.dtype == grad.dtype == np.float32
                assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
                assert_allclose(grad, expected_gradient, rtol=1e-4, atol=1e-4)


@cache
def compiled(objective, size, **changes):
    """Two inputs and what belongs to them -> (loss, parts), and the gradients by the inputs."""
    compute = on_one(objective, ObjectiveSettings(**changes), size)

    def loss(one, other, third):
        if objective is cosent_ir:
            return compute(ir_examples(one, other, third))
        return compute(sts_examples(one, other, None, None, third))

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@HYPOTHESIS
@given(
    shape=st.sampled_from([(6, 3, 2, 3), (4, 4, 1, 1), (4, 1, 3, 2)]),
    temperature=st.sampled_from([0.02, 1.0]),
    density=st.floats(0, 1),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_cosent_ir_equals_loops(shape, temperature, density, ties, seed):
    b, size, positives, negatives = shape
    rng = np.random.default_rng(seed)
    queries, passages = vectors(rng, b, 4), vectors(rng, b, positives + negatives, 4)
    if ties:  # a text that is both positive and negative, and an example twice
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
    lists_of=st.sampled_from([1, 2, None]),
    temperature=st.sampled_from([0.02, 1.0]),
    ties=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_sts_objectives_equal_loops(scores, lists_of, temperature, ties, seed):
    rng = np.random.default_rng(seed)
    first, second = vectors(rng, 2, len(scores), 4)
    if ties:  # a pair twice, and a text that is another's partner, too
        first[1], second[1] = first[0], second[0]
        second[-1] = second[0]
    size = lists_of or len(scores)
    pairs = first, second, scores
    compute = compiled(cosent_sts, lists_of, list_temperature=temperature, temperature=7.0)
    (loss, parts), gradients = compute(*pairs)
    assert_close((loss, gradients), looped_cosent_sts(*pairs, size, temperature))
    assert list(parts) == ["cosent"] and parts["cosent"] == loss
    changes = {"temperature": temperature, "list_temperature": 7.0, "mid_info_nce_threshold": 0.5}
    (loss, parts), gradients = compiled(info_nce_sts, lists_of, **changes)(*pairs)
    assert_close((loss, gradients), looped_info_nce_sts(*pairs, size, temperature, 0.5))
    assert list(parts) == ["info_nce"] and parts["info_nce"] == loss


@pytest.mark.parametrize("objective", [cosent_ir, cosent_sts, info_nce_sts])
def test_the_gradients_of_the_objectives_are_those_of_central_differences(objective):
    first, second, _, _, third = sts_batch()
    if objective is cosent_ir:
        first, second, third = ir_batch()
    first, second, third = first[:6], second[:6], third[:6]
    compute = compiled(objective, 3, temperature=0.2, mid_info_nce_threshold=0.5)  # far from saturation
    _, gradients = compute(first, second, third)
    by_first = central_differences(lambda x: compute(x, second, third)[0][0], first)
    by_second = central_differences(lambda x: compute(first, x, third)[0][0], second)
    assert min(np.abs(by_first).max(), np.abs(by_second).max()) > 0.1
    assert_allclose(gradients[0], by_first, rtol=1e-6, atol=1e-6)
    assert_allclose(gradients[1], by_second, rtol=1e-6, atol=1e-6)


def test_cosent_sts_equals_sentence_transformers_on_vectors():
    first, second, _, _, scores = sts_batch()
    loss_of = CoSENTLoss(None, scale=20.0, similarity_fct=util.pairwise_dot_score)
    theirs = [torch.tensor(texts, requires_grad=True) for texts in (first, second)]
    expected = loss_of.compute_loss_from_embeddings(theirs, torch.tensor(scores))
    expected.backward()
    (loss, _), gradients = compiled(cosent_sts, None)(first, second, scores)
    assert_close((loss, gradients), (expected.item(), tuple(texts.grad.numpy() for texts in theirs)))
    # Their default is the cosine, which is the same for vectors of length 1.
    default = CoSENTLoss(None).compute_loss_from_embeddings(theirs, torch.tensor(scores))
    assert_allclose(loss, default.item(), rtol=1e-11)


def test_cosent_ir_equals_sentence_transformers_on_pairs():
    """Each query with each of its own passages, of all queries of a pool: label 1 for positives, 0 for negatives."""
    queries, passages, present = ir_batch()
    assert not present.all()
    everywhere = np.concatenate([np.ones((B, POSITIVES), bool), present], axis=1)
    labels = np.broadcast_to(np.arange(POSITIVES + NEGATIVES) < POSITIVES, everywhere.shape)
    theirs = [torch.tensor(texts, requires_grad=True) for texts in (queries, passages)]
    pairs = [theirs[0][:, None].expand(*everywhere.shape, DIM)[everywhere], theirs[1][everywhere]]
    loss_of = CoSENTLoss(None, scale=20.0, similarity_fct=util.pairwise_dot_score)
    expected = loss_of.compute_loss_from_embeddings(pairs, torch.tensor(labels[everywhere], dtype=torch.float64))
    expected.backward()
    (loss, _), gradients = compiled(cosent_ir, None)(*ir_batch())
    assert_close((loss, gradients), (expected.item(), tuple(texts.grad.numpy() for texts in theirs)))


@cache
def unsharded_ir(size):
    return values_and_grads(ir_loss(on_one(cosent_ir, SETTINGS, size)), ir_batch()[:2])


@cache
def unsharded_sts(objective, size):
    return values_and_grads(sts_loss(on_one(objective, SETTINGS, size)), sts_batch()[:4])


@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_cosent_ir_does_not_depend_on_devices(shape, size):
    sharded = per_device(cosent_ir, SETTINGS, size, shape)
    assert_same_on_devices(ir_loss(sharded), ir_batch()[:2], shape, size, unsharded_ir(size))


@pytest.mark.parametrize("objective", [cosent_sts, info_nce_sts])
@pytest.mark.parametrize(("shape", "size"), LAYOUTS)
def test_sts_objectives_do_not_depend_on_devices(objective, shape, size):
    sharded = per_device(objective, SETTINGS, size, shape)
    expected = unsharded_sts(objective, size)
    assert expected[0][0] > 0.1
    assert_same_on_devices(sts_loss(sharded), sts_batch()[:4], shape, size, expected)
    # Nothing is asked of the middle layer.
    assert all((gradient == 0).all() for gradient in expected[1][2:])


def test_a_batch_without_negatives_or_alike_pairs_teaches_nothing():
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


def test_float32_stays_float32():
    queries, passages, present = ir_batch()
    first, second, _, _, scores = (x.astype(np.float32) for x in sts_batch())
    examples = queries.astype(np.float32), passages.astype(np.float32), present
    found = [(compiled(cosent_ir, 8)(*examples), unsharded_ir(8))]
    for objective in (cosent_sts, info_nce_sts):
        value, gradients = unsharded_sts(objective, 8)
        found.append((compiled(objective, 8)(first, second, scores), (value, gradients[:2])))
    for got, expected in found:
        assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
        assert_close(got, expected, rtol=1e-4, atol=1e-5)
