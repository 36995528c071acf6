"""The plan: pure, complete, balanced, and as long as its texts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.config import DataSettings
from codiemb_jax.data.prepare import Index
from codiemb_jax.text.records import Task
from codiemb_jax.data.sampler import Plan, Source, StepPlan, row_length
from codiemb_jax.errors import UserError

MAX = {"query_max_tokens": 64, "passage_max_tokens": 200}
SIZES = {"ir_global_batch_size": 4, "sts_global_batch_size": 6}
WANTED = {"positives_per_query": 2, "negatives_per_query": 3}
HYPOTHESIS = settings(derandomize=True, deadline=None, max_examples=25)


def make_index(task: Task, positives: list[int], negatives: list[int], seed: int = 0) -> Index:
    """An index of examples with so many positives and negatives each, and random lengths."""
    random = np.random.default_rng(seed)
    count = len(positives)
    passages = np.array(positives, np.int64) + np.array(negatives, np.int64)
    longest = MAX["query_max_tokens"] if task == "sts" else MAX["passage_max_tokens"]
    return Index(
        position=random.permutation(count).astype(np.int64),
        score=random.random(count) if task == "sts" else np.zeros(count),
        query_tokens=random.integers(1, MAX["query_max_tokens"] + 1, count, np.int32),
        positives=np.array(positives, np.int32),
        negatives=np.array(negatives, np.int32),
        passage_offsets=np.concatenate([[0], np.cumsum(passages)]).astype(np.int64),
        passage_tokens=random.integers(1, longest + 1, passages.sum(), np.int32),
    )


def make_source(name: str, task: Task, count: int, seed: int) -> Source:
    random = np.random.default_rng(seed)
    if task == "sts":
        return Source(name, task, make_index(task, [1] * count, [0] * count, seed))
    positives, negatives = random.integers(1, 5, count).tolist(), random.integers(0, 6, count).tolist()
    return Source(name, task, make_index(task, positives, negatives, seed))


SOURCES = [
    make_source("news", "ir", 23, 1),
    make_source("support", "ir", 12, 2),
    make_source("pairs", "sts", 20, 3),
    make_source("questions", "sts", 6, 4),
]
BATCHES = [5, 3, 3, 1]  # 23 // 4, 12 // 4, 20 // 6, 6 // 6


def make_plan(seed: int = 49, sources: list[Source] = SOURCES, **changes) -> Plan:
    return Plan(sources, DataSettings(ir=["ir"], sts=["sts"], **(MAX | SIZES | WANTED | changes)), seed)


def as_value(plan: StepPlan) -> tuple:
    """All fields of a plan, arrays as lists."""
    parts = [(part.source, part.examples.tolist(), part.texts.tolist()) for part in plan.parts]
    return (*(value for name, value in vars(plan).items() if name != "parts"), parts)


def order(plan: Plan, epoch: int) -> list[tuple[int, list[int]]]:
    start = epoch * plan.steps_per_epoch
    steps = [plan.step(number) for number in range(start, start + plan.steps_per_epoch)]
    return [(step.parts[0].source, step.parts[0].examples.tolist()) for step in steps]


def test_a_step_is_the_same_in_any_order_of_calls():
    one, other = make_plan(), make_plan()
    numbers = list(range(4 * one.steps_per_epoch))
    expected = [as_value(one.step(number)) for number in numbers]
    shuffled = np.random.default_rng(0).permutation(numbers * 2).tolist()
    for number in [*shuffled, 10**6, 3]:
        if number < len(expected):
            assert as_value(other.step(number)) == expected[number]
        else:
            assert as_value(other.step(number)) == as_value(make_plan().step(number))


def test_a_step_is_not_changed_by_who_used_it_before():
    plan = make_plan()
    expected = as_value(plan.step(5))
    plan.step(5).parts[0].texts[:] = -1
    assert as_value(plan.step(5)) == expected


def test_an_epoch_holds_all_whole_batches_of_every_data_set():
    plan = make_plan()
    assert plan.steps_per_epoch == sum(BATCHES)
    for epoch in range(3):
        seen: dict[int, list[int]] = {place: [] for place in range(len(SOURCES))}
        for source, examples in order(plan, epoch):
            assert len(examples) == (4 if SOURCES[source].task == "ir" else 6)
            seen[source] += examples
        for place, source in enumerate(SOURCES):
            size, count = (4 if source.task == "ir" else 6), source.index.position.size
            assert len(seen[place]) == size * BATCHES[place] == count // size * size
            assert len(set(seen[place])) == len(seen[place])
            assert set(seen[place]) <= set(range(count))


def test_a_step_says_what_it_is():
    plan = make_plan()
    for number in range(3 * sum(BATCHES)):
        step = plan.step(number)
        assert step.number == number
        assert step.epoch == number // sum(BATCHES)
        assert step.task == SOURCES[step.parts[0].source].task
        assert step.parts[0].texts.shape == ((4, 5) if step.task == "ir" else (6, 1))


def test_every_epoch_is_another_order_and_leaves_out_others():
    plan = make_plan()
    epochs = [order(plan, epoch) for epoch in range(8)]
    for one, other in pairwise(epochs):
        assert one != other
        assert [source for source, _ in one] != [source for source, _ in other]
        assert {frozenset(e) for s, e in one if s == 0} != {frozenset(e) for s, e in other if s == 0}
    ever = {example for epoch in epochs for source, examples in epoch if source == 0 for example in examples}
    assert ever == set(range(23))  # who was left out of one epoch comes in another


def test_data_sets_are_mixed_within_an_epoch():
    sources = [source for source, _ in order(make_plan(), 0)]
    assert sources != sorted(sources)
    assert sorted(sources) == [0] * 5 + [1] * 3 + [2] * 3 + [3]


def test_another_seed_is_another_order():
    orders = [order(make_plan(seed), 0) for seed in (0, 1, 49, 2**40)]
    assert len({str(one) for one in orders}) == 4
    # The seeds differ in the choice of texts, too, not in the order alone.
    one_batch = [make_source("tiny", "ir", 4, 9)]
    choices = [make_plan(seed, one_batch).step(0) for seed in (0, 1)]
    by_example = [dict(zip(c.parts[0].examples.tolist(), c.parts[0].texts.tolist(), strict=True)) for c in choices]
    assert by_example[0] != by_example[1]


def assert_fair(chosen: list[int], first: int, count: int, wanted: int) -> None:
    """`chosen` are `wanted` of `count` texts numbered from `first`, each used once before any repeats."""
    assert len(chosen) == wanted
    if count == 0:
        assert chosen == [-1] * wanted
        return
    assert set(chosen) <= set(range(first, first + count))
    for start in range(0, wanted, count):
        turn = chosen[start : start + count]
        assert len(set(turn)) == len(turn)
    assert len(set(chosen)) == min(count, wanted)


@HYPOTHESIS
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=2, max_size=9),
    st.integers(1, 7),
    st.integers(0, 7),
    st.integers(0, 2**32),
)
def test_each_text_is_used_once_before_any_repeats(counts, positives, negatives, seed):
    index = make_index("ir", [p for p, _ in counts], [n for _, n in counts])
    plan = make_plan(
        seed, [Source("a", "ir", index)], ir_global_batch_size=2, positives_per_query=positives,
        negatives_per_query=negatives,
    )  # fmt: skip
    for number in range(2 * plan.steps_per_epoch):
        step = plan.step(number)
        for example, chosen in zip(step.parts[0].examples.tolist(), step.parts[0].texts.tolist(), strict=True):
            own_positives, own_negatives = counts[example]
            assert_fair(chosen[:positives], 0, own_positives, positives)
            assert_fair(chosen[positives:], own_positives, own_negatives, negatives)


def test_no_negatives_wanted():
    plan = make_plan(negatives_per_query=0)
    for number in range(plan.steps_per_epoch):
        step = plan.step(number)
        assert step.parts[0].texts.shape[1] == (2 if step.task == "ir" else 1)
        assert (step.parts[0].texts >= 0).all()


def test_another_epoch_draws_other_texts():
    index = make_index("ir", [5] * 8, [9] * 8)
    plan = make_plan(sources=[Source("a", "ir", index)], ir_global_batch_size=8)
    drawn = []
    for epoch in range(30):
        step = plan.step(epoch)
        assert step.epoch == epoch
        drawn.append(dict(zip(step.parts[0].examples.tolist(), step.parts[0].texts.tolist(), strict=True)))
    for example in range(8):
        assert drawn[0][example] != drawn[1][example] or drawn[0][example] != drawn[2][example]
        # Nothing is favoured: in 30 epochs each text comes up.
        assert {text for epoch in drawn for text in epoch[example]} == set(range(14))


def test_draws_are_even():
    """4800 draws of one of four positives: each 1200 times, give or take five standard deviations of 30."""
    plan = make_plan(sources=[Source("a", "ir", make_index("ir", [4] * 24, [0] * 24))], ir_global_batch_size=24)
    drawn = np.concatenate([plan.step(epoch).parts[0].texts[:, 0] for epoch in range(200)])
    counts = np.bincount(drawn, minlength=4)
    assert counts.sum() == 4800
    assert (np.abs(counts - 1200) < 150).all()


def lengths_of(step: StepPlan) -> tuple[list[int], list[int]]:
    """Lengths of a step's queries and of its chosen texts, looked up one by one."""
    index = SOURCES[step.parts[0].source].index
    queries, texts = [], []
    for example, chosen in zip(step.parts[0].examples, step.parts[0].texts, strict=True):
        queries.append(int(index.query_tokens[example]))
        own = index.passage_tokens[index.passage_offsets[example] : index.passage_offsets[example + 1]].tolist()
        texts += [own[text] for text in chosen if text >= 0]
    return queries, texts


def shortest_allowed(longest: int, limit: int) -> int:
    allowed = sorted(int(np.ceil(limit / part)) for part in (1, 2, 4, 8, 16))
    return min(length for length in allowed if length >= longest)


def test_rows_hold_the_longest_chosen_text_and_no_more():
    plan = make_plan()
    met = set()
    for number in range(6 * plan.steps_per_epoch):
        step = plan.step(number)
        queries, texts = lengths_of(step)
        if step.task == "ir":
            assert step.query_row == shortest_allowed(max(queries), MAX["query_max_tokens"])
            assert step.passage_row == shortest_allowed(max(texts), MAX["passage_max_tokens"])
        else:
            assert step.query_row == step.passage_row
            assert step.query_row == shortest_allowed(max(queries + texts), MAX["query_max_tokens"])
        met.add(step.passage_row)
        assert step.tokens == sum(queries) + sum(texts)
        rows = (4, 4 * 5) if step.task == "ir" else (6, 6)
        assert step.computed_tokens == rows[0] * step.query_row + rows[1] * step.passage_row
    assert len(met) > 1


def test_short_texts_get_short_rows():
    index = make_index("ir", [1] * 4, [0] * 4)
    index.query_tokens[:] = [1, 4, 2, 3]
    index.passage_tokens[:] = [13, 14, 9, 1]
    step = make_plan(sources=[Source("a", "ir", index)]).step(0)
    assert (step.query_row, step.passage_row) == (4, 25)  # 64 / 16; 13 < 14 <= 25 = 200 / 8
    assert step.tokens == 10 + 2 * 37  # the only positive twice
    assert step.computed_tokens == 4 * 4 + 4 * 5 * 25  # rows of absent negatives count, too


@HYPOTHESIS
@given(st.integers(1, 5000), st.data())
def test_row_length(limit, data):
    longest = data.draw(st.integers(1, limit))
    length = row_length(longest, limit)
    assert longest <= length <= limit
    assert length in {int(np.ceil(limit / part)) for part in (1, 2, 4, 8, 16)}
    assert length == shortest_allowed(longest, limit)
    assert row_length(limit, limit) == limit
    assert row_length(length, limit) == length


def test_data_sets_smaller_than_a_batch_are_named_with_the_setting():
    sources = [make_source("few", "ir", 3, 1), make_source("enough", "ir", 4, 2), make_source("pairs", "sts", 5, 3)]
    with pytest.raises(UserError) as caught:
        make_plan(sources=sources)
    head, *problems = str(caught.value).splitlines()
    assert "lower the batch size" in head
    assert problems == [
        "  few: 3 examples, data.ir_global_batch_size is 4",
        "  pairs: 5 examples, data.sts_global_batch_size is 6",
    ]


@HYPOTHESIS
@given(share=st.decimals("0.001", "0.999", places=3), steps=st.integers(1, 400))
def test_the_share_of_ir_steps_holds_at_every_step_count(share, steps):
    plan = make_plan(ir_share=float(share))
    tasks = [plan.step(number).task for number in range(steps)]
    for count in range(1, steps + 1):
        # Within one step of the share, and exact where it comes out even.
        assert tasks[:count].count("ir") == int(share * count)


def test_a_share_leaves_an_epoch_as_long_as_it_was_and_uses_data_evenly():
    plan = make_plan(ir_share=0.75)
    assert plan.steps_per_epoch == make_plan().steps_per_epoch == sum(BATCHES)
    steps = [plan.step(number) for number in range(8 * 4 * 8)]  # 24 rounds of IR's 8 batches, 16 of STS' 4
    assert [step.epoch for step in steps] == [number // 12 for number in range(256)]
    for task, rounds, batches in (("ir", 24, 8), ("sts", 16, 4)):
        own = [step.parts[0] for step in steps if step.task == task]
        assert len(own) == rounds * batches
        for turn in range(rounds):
            seen = [(part.source, example) for part in own[turn * batches :][:batches] for example in part.examples]
            assert len(set(seen)) == len(seen)  # no example twice before all batches of its task have had their turn
            counts = [sum(part.source == place for part in own[turn * batches :][:batches]) for place in range(4)]
            assert counts == (BATCHES[:2] + [0, 0] if task == "ir" else [0, 0] + BATCHES[2:])


def test_a_share_as_it_is_written_is_meant():
    plan = make_plan(ir_share=0.3)  # as a float a little less than three tenths
    assert [plan.step(number).task for number in range(10)].count("ir") == 3


def make_mixed(devices: int = 4, sources: list[Source] = SOURCES, size: int = 8, **changes) -> Plan:
    sizes = {"ir_global_batch_size": size, "sts_global_batch_size": size}
    values = MAX | WANTED | sizes | {"sampler": "mixed"} | changes
    return Plan(sources, DataSettings(ir=["ir"], sts=["sts"], **values), 49, devices)


def test_mixed_deals_every_device_a_batch_of_one_data_set():
    plan = make_mixed()  # two examples a device: 11, 6, 10 and 3 batches of the four data sets
    assert plan.steps_per_epoch == 30 // 4
    tasks, met = set(), set()
    for epoch in range(4):
        seen = []
        for number in range(epoch * 7, epoch * 7 + 7):
            step = plan.step(number)
            assert (step.task, step.epoch, step.size, len(step.parts)) == ("mixed", epoch, 8, 4)
            for part in step.parts:
                source = SOURCES[part.source]
                assert part.texts.shape == (2, 5)
                if source.task == "sts":
                    assert part.texts.tolist() == [[0, -1, -1, -1, -1]] * 2
                else:
                    assert (part.texts[:, :2] >= 0).all()
                seen += [(part.source, example) for example in part.examples]
            met.add(tuple(part.source for part in step.parts))
            tasks.add(tuple(sorted({SOURCES[part.source].task for part in step.parts})))
        assert len(set(seen)) == len(seen) == 7 * 8
    assert ("ir", "sts") in tasks  # tasks do differ within a step
    assert len(met) > 10


def test_mixed_rows_hold_the_longest_text_of_any_device():
    plan = make_mixed()
    for number in range(3 * plan.steps_per_epoch):
        step = plan.step(number)
        queries, texts = [], []
        for part in step.parts:
            index = SOURCES[part.source].index
            queries += index.query_tokens[part.examples].tolist()
            for example, chosen in zip(part.examples, part.texts, strict=True):
                texts += [int(index.passage_tokens[index.passage_offsets[example] + j]) for j in chosen if j >= 0]
        assert step.query_row == shortest_allowed(max(queries), 64)
        assert step.passage_row == shortest_allowed(max(texts), 200)
        assert step.tokens == sum(queries) + sum(texts)
        assert step.computed_tokens == 8 * step.query_row + 40 * step.passage_row


def test_mixed_needs_a_batch_for_every_device():
    with pytest.raises(UserError, match="mixed needs a batch for each of the 4 devices"):
        make_mixed(sources=[make_source("few", "ir", 7, 1)])
    with pytest.raises(UserError, match="few: 1 examples, a device's part of data.ir_global_batch_size is 2"):
        make_mixed(sources=[make_source("few", "ir", 1, 1), make_source("enough", "ir", 9, 1)])
