"""The plan: pure, complete, balanced, and as long as its texts."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.batch import Task
from codiemb_jax.config import DataSettings
from codiemb_jax.data.mixed import MixedPlan
from codiemb_jax.data.sampler import Plan, Source, StepPlan
from codiemb_jax.data.store import Index
from codiemb_jax.errors import UserError
from codiemb_jax.text.rows import padded_length

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
    return tuple(value.tolist() if isinstance(value, np.ndarray) else value for value in vars(plan).values())


def parts_of(step: StepPlan) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """The data set, the examples and their passages of each of a step's equal parts."""
    count = len(step.sources)
    return list(zip(step.sources, np.split(step.examples, count), np.split(step.passages, count), strict=True))


def source_of(step: StepPlan) -> int:
    (source,) = step.sources
    return source


def by_example(step: StepPlan) -> dict[int, list[int]]:
    """The passages of each of a step's examples."""
    return dict(zip(step.examples.tolist(), step.passages.tolist(), strict=True))


def order(plan: Plan, epoch: int) -> list[tuple[int, list[int]]]:
    start = epoch * plan.steps_per_epoch
    steps = [plan.step(number) for number in range(start, start + plan.steps_per_epoch)]
    return [(source_of(step), step.examples.tolist()) for step in steps]


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
    plan.step(5).passages[:] = -1
    plan.step(5).examples[:] = -1
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
        assert step.task == SOURCES[source_of(step)].task
        assert step.passages.shape == ((4, 5) if step.task == "ir" else (6, 1))


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
    assert by_example(choices[0]) != by_example(choices[1])


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
        for example, chosen in zip(step.examples.tolist(), step.passages.tolist(), strict=True):
            own_positives, own_negatives = counts[example]
            assert_fair(chosen[:positives], 0, own_positives, positives)
            assert_fair(chosen[positives:], own_positives, own_negatives, negatives)


def test_no_negatives_wanted():
    plan = make_plan(negatives_per_query=0)
    for number in range(plan.steps_per_epoch):
        step = plan.step(number)
        assert step.passages.shape[1] == (2 if step.task == "ir" else 1)
        assert (step.passages >= 0).all()


def test_another_epoch_draws_other_texts():
    index = make_index("ir", [5] * 8, [9] * 8)
    plan = make_plan(sources=[Source("a", "ir", index)], ir_global_batch_size=8)
    drawn = []
    for epoch in range(30):
        step = plan.step(epoch)
        assert step.epoch == epoch
        drawn.append(by_example(step))
    for example in range(8):
        assert drawn[0][example] != drawn[1][example] or drawn[0][example] != drawn[2][example]
        # Nothing is favoured: in 30 epochs each text comes up.
        assert {text for epoch in drawn for text in epoch[example]} == set(range(14))


def test_draws_are_even():
    """4800 draws of one of four positives: each 1200 times, give or take five standard deviations of 30."""
    plan = make_plan(sources=[Source("a", "ir", make_index("ir", [4] * 24, [0] * 24))], ir_global_batch_size=24)
    drawn = np.concatenate([plan.step(epoch).passages[:, 0] for epoch in range(200)])
    counts = np.bincount(drawn, minlength=4)
    assert counts.sum() == 4800
    assert (np.abs(counts - 1200) < 150).all()


def lengths_of(step: StepPlan) -> tuple[list[int], list[int]]:
    """Lengths of a step's queries and of its chosen texts, looked up one by one."""
    index = SOURCES[source_of(step)].index
    queries, texts = [], []
    for example, chosen in zip(step.examples, step.passages, strict=True):
        queries.append(int(index.query_tokens[example]))
        own = index.passage_tokens[index.passage_offsets[example] : index.passage_offsets[example + 1]].tolist()
        texts += [own[text] for text in chosen if text >= 0]
    return queries, texts


ROW_LENGTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)


def shortest_allowed(longest: int, limit: int) -> int:
    allowed = [int(np.ceil(limit * part)) for part in ROW_LENGTHS]
    return min(length for length in allowed if length >= longest)


@pytest.mark.parametrize(("ir", "sts", "different"), [(4, 6, 2), (1, 1, 4)])
def test_rows_hold_the_longest_chosen_text_and_no_more(ir, sts, different):
    plan = make_plan(ir_global_batch_size=ir, sts_global_batch_size=sts)
    met = set()
    for number in range(6 * plan.steps_per_epoch):
        step = plan.step(number)
        queries, texts = lengths_of(step)
        limit = MAX["query_max_tokens"] if step.task == "sts" else MAX["passage_max_tokens"]  # the longer one
        assert step.row_length == shortest_allowed(max(queries + texts), limit)
        met.add(step.row_length)
        assert step.tokens == sum(queries) + sum(texts)
        rows = ir * (1 + 5) if step.task == "ir" else sts * (1 + 1)
        assert step.computed_tokens == rows * step.row_length
    assert len(met) >= different


def test_short_texts_get_short_rows():
    index = make_index("ir", [1] * 4, [0] * 4)
    index.query_tokens[:] = [1, 4, 2, 3]
    index.passage_tokens[:] = [13, 14, 9, 1]
    step = make_plan(sources=[Source("a", "ir", index)]).step(0)
    assert step.row_length == 25  # 13 < 14 <= 25 = 200 / 8
    assert step.tokens == 10 + 2 * 37  # the only positive twice
    assert step.computed_tokens == (4 + 4 * 5) * 25  # rows of absent negatives count, too


def test_long_queries_get_long_rows():
    index = make_index("ir", [1] * 4, [0] * 4)
    index.query_tokens[:] = [1, 104, 2, 3]
    index.passage_tokens[:] = [13, 14, 9, 1]
    limits = {"query_max_tokens": 400, "passage_max_tokens": 100}
    step = make_plan(sources=[Source("a", "ir", index)], **limits).step(0)
    assert step.row_length == 200  # 100 < 104 <= 200 = 400 / 2
    assert step.tokens == 110 + 2 * 37
    assert step.computed_tokens == (4 + 4 * 5) * 200


@HYPOTHESIS
@given(st.integers(1, 5000), st.data())
def test_padded_length(limit, data):
    longest = data.draw(st.integers(1, limit))
    length = padded_length(longest, limit)
    assert longest <= length <= limit
    assert length in {int(np.ceil(limit * part)) for part in ROW_LENGTHS}
    assert length == shortest_allowed(longest, limit)
    assert padded_length(limit, limit) == limit
    assert padded_length(length, limit) == length


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
        own = [(source_of(step), step.examples) for step in steps if step.task == task]
        assert len(own) == rounds * batches
        for turn in range(rounds):
            whole = own[turn * batches :][:batches]
            seen = [(source, example) for source, examples in whole for example in examples]
            assert len(set(seen)) == len(seen)  # no example twice before all batches of its task have had their turn
            counts = [sum(source == place for source, _ in whole) for place in range(4)]
            assert counts == (BATCHES[:2] + [0, 0] if task == "ir" else [0, 0] + BATCHES[2:])


def test_a_share_as_it_is_written_is_meant():
    plan = make_plan(ir_share=0.3)  # as a float a little less than three tenths
    assert [plan.step(number).task for number in range(10)].count("ir") == 3


def make_mixed(devices: int = 4, sources: list[Source] = SOURCES, size: int = 8, **changes) -> MixedPlan:
    sizes = {"ir_global_batch_size": size, "sts_global_batch_size": size}
    values = MAX | WANTED | sizes | {"sampler": "mixed"} | changes
    return MixedPlan(sources, DataSettings(ir=["ir"], sts=["sts"], **values), 49, devices)


def test_mixed_deals_every_device_a_batch_of_one_data_set():
    plan = make_mixed()  # two examples a device: 11, 6, 10 and 3 batches of the four data sets
    assert plan.steps_per_epoch == 30 // 4
    tasks, met = set(), set()
    for epoch in range(4):
        seen = []
        for number in range(epoch * 7, epoch * 7 + 7):
            step = plan.step(number)
            assert (step.task, step.epoch, step.examples.size, len(step.sources)) == ("mixed", epoch, 8, 4)
            for source, examples, passages in parts_of(step):
                assert passages.shape == (2, 5)
                if SOURCES[source].task == "sts":
                    assert passages.tolist() == [[0, -1, -1, -1, -1]] * 2
                else:
                    assert (passages[:, :2] >= 0).all()
                seen += [(source, example) for example in examples]
            met.add(step.sources)
            tasks.add(tuple(sorted({SOURCES[source].task for source in step.sources})))
        assert len(set(seen)) == len(seen) == 7 * 8
    assert ("ir", "sts") in tasks  # tasks do differ within a step
    assert len(met) > 10


def test_mixed_rows_hold_the_longest_text_of_any_device():
    plan = make_mixed()
    for number in range(3 * plan.steps_per_epoch):
        step = plan.step(number)
        queries, texts = [], []
        for source, examples, passages in parts_of(step):
            index = SOURCES[source].index
            queries += index.query_tokens[examples].tolist()
            for example, chosen in zip(examples, passages, strict=True):
                texts += [int(index.passage_tokens[index.passage_offsets[example] + j]) for j in chosen if j >= 0]
        assert step.row_length == shortest_allowed(max(queries + texts), 200)
        assert step.tokens == sum(queries) + sum(texts)
        assert step.computed_tokens == (8 + 40) * step.row_length


def test_mixed_needs_a_batch_for_every_device():
    with pytest.raises(UserError, match="mixed needs a batch for each of the 4 devices"):
        make_mixed(sources=[make_source("few", "ir", 7, 1)])
    with pytest.raises(UserError, match="few: 1 examples, a device's part of data.ir_global_batch_size is 2"):
        make_mixed(sources=[make_source("few", "ir", 1, 1), make_source("enough", "ir", 9, 1)])


def drawn(random: np.random.Generator, counts: list[int], wanted: int) -> list[list[int]]:
    """`wanted` of each example's `counts` texts, drawn example by example."""
    keys = random.random((len(counts), max(1, *counts)))
    orders = [np.argsort(own[:count]).tolist() for own, count in zip(keys, counts, strict=True)]
    return [[order[i % len(order)] for i in range(wanted)] if order else [-1] * wanted for order in orders]


def planned(number: int, batch_sizes: list[int], devices: int = 1) -> list[tuple[int, list[int], list[list[int]]]]:
    """The parts of a step of all of SOURCES, seed 49, from the random numbers that any run so far has used."""
    sizes = [source.index.position.size for source in SOURCES]
    batches = [(place, i) for place, size in enumerate(sizes) for i in range(size // batch_sizes[place])]
    turn, within = divmod(number, len(batches) // devices)
    order = np.random.default_rng([49, 1, turn, 0]).permutation(batches)[within * devices :][:devices].tolist()
    random = np.random.default_rng([49, 2, number])
    parts = []
    for place, batch in order:
        shuffled = np.random.default_rng([49, 0, turn, place]).permutation(sizes[place]).tolist()
        examples = shuffled[batch * batch_sizes[place] :][: batch_sizes[place]]
        index = SOURCES[place].index
        if SOURCES[place].task == "ir":
            positives = drawn(random, index.positives[examples].tolist(), WANTED["positives_per_query"])
            negatives = drawn(random, index.negatives[examples].tolist(), WANTED["negatives_per_query"])
            first = index.positives[examples].tolist()
            negatives = [[j if j < 0 else start + j for j in row] for start, row in zip(first, negatives, strict=True)]
            passages = [p + n for p, n in zip(positives, negatives, strict=True)]
        else:
            passages = [[0] if devices == 1 else [0, -1, -1, -1, -1]] * len(examples)
        parts.append((place, examples, passages))
    return parts


@pytest.mark.parametrize("most", [None, 23, 10**6])
def test_without_a_cap_the_order_is_what_it_has_always_been(most):
    """Bit for bit: a run that was begun before there was `max_examples` goes on in the same order."""
    plan, mixed = make_plan(max_examples=most), make_mixed(max_examples=most)
    for number in range(40):
        for step, expected in (
            (plan.step(number), planned(number, [4, 4, 6, 6])),
            (mixed.step(number), planned(number, [2, 2, 2, 2], 4)),
        ):
            found = [(source, own.tolist(), passages.tolist()) for source, own, passages in parts_of(step)]
            assert found == expected


def subsets(plan: Plan, epochs: int) -> list[set[int]]:
    """The examples of each data set that come up in so many epochs."""
    used: list[set[int]] = [set() for _ in plan.sources]
    for number in range(epochs * plan.steps_per_epoch):
        for source, examples, _ in parts_of(plan.step(number)):
            assert len(set(examples.tolist())) == examples.size
            used[source].update(examples.tolist())
    return used


@HYPOTHESIS
@given(most=st.integers(6, 25), seed=st.integers(0, 2**32 - 1))
def test_of_each_data_set_so_many_examples_are_used(most, seed):
    plan = make_plan(seed, max_examples=most)
    sizes = [source.index.position.size for source in SOURCES]
    counts = [min(size, most) for size in sizes]
    batch_sizes = [4, 4, 6, 6]
    assert plan.steps_per_epoch == sum(count // size for count, size in zip(counts, batch_sizes, strict=True))
    used = subsets(plan, 40)
    # Examples left out of one epoch for lack of a whole batch come up in another.
    assert [len(own) for own in used] == counts
    assert all(own <= set(range(size)) for own, size in zip(used, sizes, strict=True))


def test_the_subset_is_the_same_in_every_epoch_and_after_a_restart():
    plan = make_plan(max_examples=9)
    used = subsets(plan, 40)
    for start in (0, 17):
        again = make_plan(max_examples=9)
        for number in range(start, start + 200):
            step = again.step(number)
            assert set(step.examples.tolist()) <= used[source_of(step)]
            assert as_value(step) == as_value(plan.step(number))


def test_the_subset_depends_on_the_seed_alone():
    used = subsets(make_plan(max_examples=9), 40)
    assert [len(own) for own in used] == [9, 9, 9, 6]
    for other in (
        make_plan(max_examples=9, ir_global_batch_size=3, sts_global_batch_size=2),
        make_plan(max_examples=9, positives_per_query=1, negatives_per_query=0),
        make_plan(max_examples=9, ir_share=0.75),
        make_mixed(max_examples=9),
        make_mixed(devices=2, max_examples=9),
    ):
        assert subsets(other, 40) == used
    for seed in (0, 48, 50):
        others = subsets(make_plan(seed, max_examples=9), 40)
        assert all(one != other for one, other in zip(used[:3], others[:3], strict=True))


def test_every_example_is_as_likely_to_be_in_the_subset():
    """In 6000 subsets of 6 of 20: each example 1800 times, give or take five standard deviations of 35.5."""
    source = [make_source("pairs", "sts", 20, 3)]
    counts = np.zeros(20, int)
    for seed in range(6000):
        counts[make_plan(seed, source, max_examples=6).step(0).examples] += 1
    assert counts.sum() == 6 * 6000
    assert (np.abs(counts - 1800) < 178).all()


def test_a_cap_below_the_batch_size_is_an_error():
    with pytest.raises(UserError) as caught:
        make_plan(max_examples=5)
    assert str(caught.value).splitlines()[1:] == [
        "  pairs: 5 examples, data.sts_global_batch_size is 6",
        "  questions: 5 examples, data.sts_global_batch_size is 6",
    ]
