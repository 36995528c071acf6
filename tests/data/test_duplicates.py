"""Tests which passages of a planned batch have the same text, against sets of hashes."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.config import DataSettings
from codiemb_jax.data.index import Index
from codiemb_jax.data.layout import PackedLayout, PaddedLayout
from codiemb_jax.data.mixed import MixedPlan
from codiemb_jax.data.sampler import Plan, Source

SIZES = {"ir_global_batch_size": 8, "sts_global_batch_size": 8}


def make_source(rng: np.random.Generator, name: str, task: str, count: int, num_texts: int, most: int) -> Source:
    """Returns a dataset of examples with up to `most` positives and negatives, from `num_texts` different texts."""
    positives = rng.integers(1, most + 1, count) if task == "ir" else np.ones(count, int)
    negatives = rng.integers(0, most + 1, count) if task == "ir" else np.zeros(count, int)
    passages = int((positives + negatives).sum())
    hashes = rng.integers(0, 2**64, num_texts, np.uint64)
    index = Index(
        score=np.zeros(count),
        query_tokens=np.full(count, 8, np.int32),
        positives=positives.astype(np.int32),
        negatives=negatives.astype(np.int32),
        passage_offsets=np.concatenate([[0], np.cumsum(positives + negatives)]).astype(np.int64),
        passage_tokens=rng.integers(1, 16, passages).astype(np.int32),
        passage_hashes=hashes[rng.integers(0, num_texts, passages)],
    )
    return Source(name, task, index)


def check_step(step, sources):
    """Compares the texts of a step with the hashes of its passages, and returns the number of texts per example."""
    part = step.examples.size // len(step.sources)
    hashes, known = {}, Counter()
    for i, (example, passages) in enumerate(zip(step.examples, step.passages, strict=True)):
        index = sources[step.sources[i // part]].index
        start = index.passage_offsets[example]
        for j, passage in enumerate(passages):
            hashes[i, j] = int(index.passage_hashes[start + passage]) if passage >= 0 else None
            known[hashes[i, j]] += 1
    numbers: dict = {}
    for (i, j), value in hashes.items():
        number = step.texts.passages[i, j]
        assert (number == -1) == (value is None)
        if value is not None:  # equal numbers if and only if equal texts
            assert numbers.setdefault(value, number) == number
    assert len(set(numbers.values())) == len(numbers)
    for i, example in enumerate(step.examples):
        index = sources[step.sources[i // part]].index
        start = index.passage_offsets[example]
        positives = {int(value) for value in index.passage_hashes[start : start + index.positives[example]]}
        expected = sorted(numbers[value] for value in positives if value in numbers)
        actual = step.texts.positives[i]
        assert sorted(actual[actual >= 0]) == expected
        assert set(actual[actual < 0]) <= {-2}
    assert step.texts.passages.dtype == step.texts.positives.dtype == np.int32
    return step.texts.positives.shape[1], max((step.texts.positives >= 0).sum(axis=1))


@settings(max_examples=25)
@given(
    num_texts=st.sampled_from([1, 6, 40, 1000]),
    most=st.sampled_from([1, 3, 9]),
    packing=st.booleans(),
    pool=st.sampled_from([None, 2]),
    seed=st.integers(0, 10**6),
)
def test_texts_of_a_step(num_texts, most, packing, pool, seed):
    rng = np.random.default_rng(seed)
    sources = [make_source(rng, "a", "ir", 11, num_texts, most), make_source(rng, "b", "sts", 9, num_texts, most)]
    data = DataSettings(ir=["a"], sts=["b"], positives_per_query=2, negatives_per_query=3, **SIZES)
    layout = PackedLayout(32, 4) if packing else PaddedLayout(4)
    plan = Plan(sources, data, 49, layout, {"ir": pool, "sts": None}, compare_texts=True)
    steps = [plan.step(number) for number in range(4)]
    assert {step.task for step in steps} == {"ir", "sts"}
    for step in steps:
        if step.task == "sts":
            assert step.texts is None
            continue
        width, most_used = check_step(step, sources)
        assert width in (4, 8, 16)  # powers of two, and no larger than needed
        assert width == 4 or width < 2 * most_used


def test_texts_of_a_mixed_step():
    rng = np.random.default_rng(0)
    sources = [make_source(rng, name, task, 20, 12, 3) for name, task in (("a", "ir"), ("b", "ir"), ("c", "sts"))]
    data = DataSettings(ir=["a", "b"], sts=["c"], sampler="mixed", negatives_per_query=3, **SIZES)
    plan = MixedPlan(sources, data, 49, PackedLayout(32, 4), compare_texts=True)
    steps = [plan.step(number) for number in range(4)]
    assert any(len({sources[source].task for source in step.sources}) == 2 for step in steps)
    for step in steps:
        check_step(step, sources)


def test_texts_are_not_compared_unless_asked():
    sources = [make_source(np.random.default_rng(0), "a", "ir", 11, 6, 2)]
    plan = Plan(sources, DataSettings(ir=["a"], **SIZES), 49, PaddedLayout(), {"ir": None})
    assert plan.step(0).texts is None
