"""Tests the plan of steps: that it is deterministic and complete, and its choices and row lengths."""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.batch import Task
from codiemb_jax.config import DataSettings
from codiemb_jax.data import sampler
from codiemb_jax.data.index import Index
from codiemb_jax.data.layout import BatchLayout, Layout, PackedLayout, PaddedLayout
from codiemb_jax.data.mixed import MixedPlan
from codiemb_jax.data.permutation import permute
from codiemb_jax.data.sampler import Plan, Source, StepPlan
from codiemb_jax.errors import UserError
from codiemb_jax.text.rows import padded_length

MAX = {"query_max_tokens": 64, "passage_max_tokens": 200}
SIZES = {"ir_global_batch_size": 4, "sts_global_batch_size": 6}
DRAWS = {"positives_per_query": 2, "negatives_per_query": 3}
HYPOTHESIS = settings(derandomize=True, deadline=None, max_examples=25)


def make_index(task: Task, positives: list[int], negatives: list[int], seed: int = 0) -> Index:
    """Returns an index of examples with the given numbers of positives and negatives and random lengths."""
    random = np.random.default_rng(seed)
    count = len(positives)
    passages = np.array(positives, np.int64) + np.array(negatives, np.int64)
    longest = MAX["query_max_tokens"] if task == "sts" else MAX["passage_max_tokens"]
    return Index(
        score=random.random(count) if task == "sts" else np.zeros(count),
        query_tokens=random.integers(1, MAX["query_max_tokens"] + 1, count, np.int32),
        positives=np.array(positives, np.int32),
        negatives=np.array(negatives, np.int32),
        passage_offsets=np.concatenate([[0], np.cumsum(passages)]).astype(np.int64),
        passage_tokens=random.integers(1, longest + 1, passages.sum(), np.int32),
        passage_hashes=random.integers(0, 2**64, passages.sum(), np.uint64),
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


PADDED = PaddedLayout()
NO_GROUPS: dict[Task, int | None] = {"ir": None, "sts": None}


def make_plan(
    seed: int = 49,
    sources: list[Source] = SOURCES,
    layout: Layout = PADDED,
    group_sizes: Mapping[Task, int | None] = NO_GROUPS,
    **changes,
) -> Plan:
    settings = DataSettings(ir=["ir"], sts=["sts"], **(MAX | SIZES | DRAWS | changes))
    return Plan(sources, settings, seed, layout, group_sizes)


def as_tuple(step: StepPlan) -> tuple:
    """Returns all fields of a step and of its layout, with arrays as lists."""
    values = [value for value in vars(step).values() if not isinstance(value, BatchLayout)]
    return tuple(
        value.tolist() if isinstance(value, np.ndarray) else value for value in (*values, *vars(step.layout).values())
    )


def split_parts(step: StepPlan) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Returns the (dataset, examples, passages) parts of a step."""
    count = len(step.sources)
    return list(zip(step.sources, np.split(step.examples, count), np.split(step.passages, count), strict=True))


def get_source(step: StepPlan) -> int:
    (source,) = step.sources
    return source


def by_example(step: StepPlan) -> dict[int, list[int]]:
    """Returns the passages of each example of a step."""
    return dict(zip(step.examples.tolist(), step.passages.tolist(), strict=True))


def epoch_order(plan: Plan, epoch: int) -> list[tuple[int, list[int]]]:
    """Returns the (dataset, examples) of all steps of an epoch."""
    start = epoch * plan.steps_per_epoch
    steps = [plan.step(number) for number in range(start, start + plan.steps_per_epoch)]
    return [(get_source(step), step.examples.tolist()) for step in steps]


@pytest.mark.parametrize("layout", [PADDED, PackedLayout(200, 2)])
def test_steps_do_not_depend_on_the_order_of_calls(layout):
    in_order, shuffled_calls = make_plan(layout=layout), make_plan(layout=layout)
    numbers = list(range(4 * in_order.steps_per_epoch))
    expected = [as_tuple(in_order.step(number)) for number in numbers]
    shuffled = np.random.default_rng(0).permutation(numbers * 2).tolist()
    for number in [*shuffled, 10**6, 3]:
        if number < len(expected):
            assert as_tuple(shuffled_calls.step(number)) == expected[number]
        else:
            assert as_tuple(shuffled_calls.step(number)) == as_tuple(make_plan(layout=layout).step(number))


def test_modifying_a_step_does_not_change_the_plan():
    plan = make_plan()
    expected = as_tuple(plan.step(5))
    plan.step(5).passages[:] = -1
    plan.step(5).examples[:] = -1
    assert as_tuple(plan.step(5)) == expected


def test_epoch_has_all_whole_batches_of_every_dataset():
    plan = make_plan()
    assert plan.steps_per_epoch == sum(BATCHES)
    for epoch in range(3):
        seen: dict[int, list[int]] = {i: [] for i in range(len(SOURCES))}
        for source, examples in epoch_order(plan, epoch):
            assert len(examples) == (4 if SOURCES[source].task == "ir" else 6)
            seen[source] += examples
        for i, source in enumerate(SOURCES):
            size, count = (4 if source.task == "ir" else 6), len(source.index)
            assert len(seen[i]) == size * BATCHES[i] == count // size * size
            assert len(set(seen[i])) == len(seen[i])
            assert set(seen[i]) <= set(range(count))


def test_step_has_number_epoch_task_and_passages():
    plan = make_plan()
    for number in range(3 * sum(BATCHES)):
        step = plan.step(number)
        assert step.number == number
        assert step.epoch == number // sum(BATCHES)
        assert step.task == SOURCES[get_source(step)].task
        assert step.passages.shape == ((4, 5) if step.task == "ir" else (6, 1))


def test_epochs_differ_in_order_and_in_leftover_examples():
    plan = make_plan()
    epochs = [epoch_order(plan, epoch) for epoch in range(8)]
    for epoch, next_epoch in pairwise(epochs):
        assert epoch != next_epoch
        assert [source for source, _ in epoch] != [source for source, _ in next_epoch]
        assert {frozenset(e) for s, e in epoch if s == 0} != {frozenset(e) for s, e in next_epoch if s == 0}
    used = {example for epoch in epochs for source, examples in epoch if source == 0 for example in examples}
    assert used == set(range(23))  # leftovers of one epoch are used in another


def test_datasets_are_shuffled_within_an_epoch():
    sources = [source for source, _ in epoch_order(make_plan(), 0)]
    assert sources != sorted(sources)
    assert sorted(sources) == [0] * 5 + [1] * 3 + [2] * 3 + [3]


def test_seeds_give_different_orders_and_choices():
    orders = [epoch_order(make_plan(seed), 0) for seed in (0, 1, 49, 2**40)]
    assert len({str(order) for order in orders}) == 4
    # Seeds also give different choices of passages.
    one_batch = [make_source("tiny", "ir", 4, 9)]
    choices = [make_plan(seed, one_batch).step(0) for seed in (0, 1)]
    assert by_example(choices[0]) != by_example(choices[1])


def assert_no_early_repeats(chosen: list[int], first: int, count: int, num_draws: int) -> None:
    """Asserts that every text in `first` … `first + count - 1` is drawn once before any repeats."""
    assert len(chosen) == num_draws
    if count == 0:
        assert chosen == [-1] * num_draws
        return
    assert set(chosen) <= set(range(first, first + count))
    for start in range(0, num_draws, count):
        draws = chosen[start : start + count]
        assert len(set(draws)) == len(draws)
    assert len(set(chosen)) == min(count, num_draws)


@HYPOTHESIS
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=2, max_size=9),
    st.integers(1, 7),
    st.integers(0, 7),
    st.integers(0, 2**32),
)
def test_every_text_is_drawn_once_before_any_repeats(counts, positives, negatives, seed):
    index = make_index("ir", [p for p, _ in counts], [n for _, n in counts])
    plan = make_plan(
        seed, [Source("a", "ir", index)], ir_global_batch_size=2, positives_per_query=positives,
        negatives_per_query=negatives,
    )  # fmt: skip
    for number in range(2 * plan.steps_per_epoch):
        step = plan.step(number)
        for example, chosen in zip(step.examples.tolist(), step.passages.tolist(), strict=True):
            num_positives, num_negatives = counts[example]
            assert_no_early_repeats(chosen[:positives], 0, num_positives, positives)
            assert_no_early_repeats(chosen[positives:], num_positives, num_negatives, negatives)


def test_zero_negatives_per_query():
    plan = make_plan(negatives_per_query=0)
    for number in range(plan.steps_per_epoch):
        step = plan.step(number)
        assert step.passages.shape[1] == (2 if step.task == "ir" else 1)
        assert (step.passages >= 0).all()


def test_epochs_draw_different_texts():
    index = make_index("ir", [5] * 8, [9] * 8)
    plan = make_plan(sources=[Source("a", "ir", index)], ir_global_batch_size=8)
    drawn = []
    for epoch in range(30):
        step = plan.step(epoch)
        assert step.epoch == epoch
        drawn.append(by_example(step))
    for example in range(8):
        assert drawn[0][example] != drawn[1][example] or drawn[0][example] != drawn[2][example]
        # Every text is drawn within 30 epochs.
        assert {text for epoch in drawn for text in epoch[example]} == set(range(14))


def test_draws_are_uniform():
    """Each of four positives has 1200 of 4800 draws, with a tolerance of five standard deviations of 30."""
    plan = make_plan(sources=[Source("a", "ir", make_index("ir", [4] * 24, [0] * 24))], ir_global_batch_size=24)
    drawn = np.concatenate([plan.step(epoch).passages[:, 0] for epoch in range(200)])
    counts = np.bincount(drawn, minlength=4)
    assert counts.sum() == 4800
    assert (np.abs(counts - 1200) < 150).all()


def get_lengths(step: StepPlan) -> tuple[list[int], list[int]]:
    """Returns the lengths of the queries and of the chosen passages of a step."""
    index = SOURCES[get_source(step)].index
    queries, passages = [], []
    for example, chosen in zip(step.examples, step.passages, strict=True):
        queries.append(int(index.query_tokens[example]))
        lengths = index.passage_tokens[index.passage_offsets[example] : index.passage_offsets[example + 1]].tolist()
        passages += [lengths[i] for i in chosen if i >= 0]
    return queries, passages


ROW_LENGTHS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)


def shortest_row_length(longest: int, limit: int) -> int:
    allowed = [int(np.ceil(limit * part)) for part in ROW_LENGTHS]
    return min(length for length in allowed if length >= longest)


@pytest.mark.parametrize(("ir", "sts", "min_lengths"), [(4, 6, 2), (1, 1, 4)])
def test_row_length_fits_the_longest_chosen_text(ir, sts, min_lengths):
    plan = make_plan(ir_global_batch_size=ir, sts_global_batch_size=sts)
    seen = set()
    for number in range(6 * plan.steps_per_epoch):
        step = plan.step(number)
        queries, passages = get_lengths(step)
        limit = MAX["query_max_tokens"] if step.task == "sts" else MAX["passage_max_tokens"]
        assert step.layout.row_length == shortest_row_length(max(queries + passages), limit)
        seen.add(step.layout.row_length)
        assert step.tokens == sum(queries) + sum(passages)
        rows = ir * (1 + 5) if step.task == "ir" else sts * (1 + 1)
        assert step.computed_tokens == rows * step.layout.row_length
    assert len(seen) >= min_lengths


def test_short_texts_have_short_rows():
    index = make_index("ir", [1] * 4, [0] * 4)
    index.query_tokens[:] = [1, 4, 2, 3]
    index.passage_tokens[:] = [13, 14, 9, 1]
    step = make_plan(sources=[Source("a", "ir", index)]).step(0)
    assert step.layout.row_length == 25  # 13 < 14 <= 25 = 200 / 8
    assert step.tokens == 10 + 2 * 37  # the only positive is drawn twice
    assert step.computed_tokens == (4 + 4 * 5) * 25  # includes rows of padding negatives


def test_long_queries_have_long_rows():
    index = make_index("ir", [1] * 4, [0] * 4)
    index.query_tokens[:] = [1, 104, 2, 3]
    index.passage_tokens[:] = [13, 14, 9, 1]
    limits = {"query_max_tokens": 400, "passage_max_tokens": 100}
    step = make_plan(sources=[Source("a", "ir", index)], **limits).step(0)
    assert step.layout.row_length == 200  # 100 < 104 <= 200 = 400 / 2
    assert step.tokens == 110 + 2 * 37
    assert step.computed_tokens == (4 + 4 * 5) * 200


@HYPOTHESIS
@given(st.integers(1, 5000), st.data())
def test_padded_length_is_the_shortest_row_length(limit, data):
    longest = data.draw(st.integers(1, limit))
    length = padded_length(longest, limit)
    assert longest <= length <= limit
    assert length in {int(np.ceil(limit * part)) for part in ROW_LENGTHS}
    assert length == shortest_row_length(longest, limit)
    assert padded_length(limit, limit) == limit
    assert padded_length(length, limit) == length


def test_datasets_smaller_than_a_batch_raise_user_error():
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
def test_ir_share_is_kept_at_every_step_count(share, steps):
    plan = make_plan(ir_share=float(share))
    tasks = [plan.step(number).task for number in range(steps)]
    for count in range(1, steps + 1):
        # Within one step of the share, and exact if the share is a whole number of steps.
        assert tasks[:count].count("ir") == int(share * count)


def test_ir_share_keeps_the_epoch_length_and_uses_examples_evenly():
    plan = make_plan(ir_share=0.75)
    assert plan.steps_per_epoch == make_plan().steps_per_epoch == sum(BATCHES)
    # 24 rounds of 8 IR batches and 16 rounds of 4 STS batches.
    steps = [plan.step(number) for number in range(8 * 4 * 8)]
    assert [step.epoch for step in steps] == [number // 12 for number in range(256)]
    for task, rounds, batches in (("ir", 24, 8), ("sts", 16, 4)):
        task_steps = [(get_source(step), step.examples) for step in steps if step.task == task]
        assert len(task_steps) == rounds * batches
        for number in range(rounds):
            one_round = task_steps[number * batches :][:batches]
            seen = [(source, example) for source, examples in one_round for example in examples]
            assert len(set(seen)) == len(seen)  # examples are not repeated within a round
            counts = [sum(source == i for source, _ in one_round) for i in range(4)]
            assert counts == (BATCHES[:2] + [0, 0] if task == "ir" else [0, 0] + BATCHES[2:])


def test_ir_share_is_an_exact_decimal():
    plan = make_plan(ir_share=0.3)  # the float is slightly less than 3/10
    assert [plan.step(number).task for number in range(10)].count("ir") == 3


def make_mixed(
    devices: int = 4, sources: list[Source] = SOURCES, size: int = 8, layout: Layout | None = None, **changes
) -> MixedPlan:
    sizes = {"ir_global_batch_size": size, "sts_global_batch_size": size}
    values = MAX | DRAWS | sizes | {"sampler": "mixed"} | changes
    return MixedPlan(sources, DataSettings(ir=["ir"], sts=["sts"], **values), 49, layout or PaddedLayout(devices))


def test_mixed_step_has_one_dataset_per_device():
    plan = make_mixed()  # two examples per device: 11, 6, 10 and 3 batches of the four datasets
    assert plan.steps_per_epoch == 30 // 4
    tasks, assignments = set(), set()
    for epoch in range(4):
        seen = []
        for number in range(epoch * 7, epoch * 7 + 7):
            step = plan.step(number)
            assert (step.task, step.epoch, step.examples.size, len(step.sources)) == ("mixed", epoch, 8, 4)
            for source, examples, passages in split_parts(step):
                assert passages.shape == (2, 5)
                if SOURCES[source].task == "sts":
                    assert passages.tolist() == [[0, -1, -1, -1, -1]] * 2
                else:
                    assert (passages[:, :2] >= 0).all()
                seen += [(source, example) for example in examples]
            assignments.add(step.sources)
            tasks.add(tuple(sorted({SOURCES[source].task for source in step.sources})))
        assert len(set(seen)) == len(seen) == 7 * 8
    assert ("ir", "sts") in tasks  # some steps have both tasks
    assert len(assignments) > 10


def test_mixed_row_length_fits_the_longest_text_of_all_devices():
    plan = make_mixed()
    for number in range(3 * plan.steps_per_epoch):
        step = plan.step(number)
        lengths = []
        for source, examples, passages in split_parts(step):
            index = SOURCES[source].index
            lengths += index.query_tokens[examples].tolist()
            for example, chosen in zip(examples, passages, strict=True):
                lengths += [int(index.passage_tokens[index.passage_offsets[example] + j]) for j in chosen if j >= 0]
        assert step.layout.row_length == shortest_row_length(max(lengths), 200)
        assert step.tokens == sum(lengths)
        assert step.computed_tokens == (8 + 40) * step.layout.row_length


def passages_by_example(step: StepPlan) -> dict[int, list[int]]:
    assert len(set(step.examples.tolist())) == step.examples.size
    return by_example(step)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("group_size", [None, 2, 4])
def test_packing_does_not_change_the_examples_of_a_group(devices, group_size):
    sizes = {"ir_global_batch_size": 8, "sts_global_batch_size": 8}
    sources = [source for source in SOURCES if len(source.index) >= 8]
    padded = make_plan(sources=sources, **sizes)
    packed = make_plan(
        sources=sources,
        layout=PackedLayout(200, devices),
        group_sizes={"ir": group_size, "sts": group_size},
        **sizes,
    )
    moved = 0
    for number in range(2 * padded.steps_per_epoch):
        expected, actual = padded.step(number), packed.step(number)
        assert (actual.sources, actual.task, actual.tokens) == (expected.sources, expected.task, expected.tokens)
        assert passages_by_example(actual) == passages_by_example(expected)
        assert actual.examples.tolist() == expected.examples[actual.layout.order].tolist()
        assert actual.computed_tokens == devices * actual.layout.rows * 200
        groups = [
            {frozenset(group) for group in step.examples.reshape(-1, group_size or 8).tolist()}
            for step in (actual, expected)
        ]
        assert groups[0] == groups[1]
        moved += actual.examples.tolist() != expected.examples.tolist()
    assert (moved > 0) == (devices > 1 and group_size != 8 // devices)  # one group per device stays where it is


def test_packing_does_not_change_mixed_steps():
    padded, packed = make_mixed(), make_mixed(layout=PackedLayout(200, 4))
    for number in range(2 * padded.steps_per_epoch):
        expected, actual = padded.step(number), packed.step(number)
        assert actual.sources == expected.sources
        assert actual.examples.tolist() == expected.examples.tolist()
        assert actual.passages.tolist() == expected.passages.tolist()
        assert actual.tokens == expected.tokens
        assert actual.computed_tokens == 4 * actual.layout.rows * 200


def test_mixed_with_too_few_batches_raises_user_error():
    with pytest.raises(UserError, match=r"mixed needs one batch per device \(4\)"):
        make_mixed(sources=[make_source("few", "ir", 7, 1)])
    with pytest.raises(UserError, match="few: 1 examples, a device's part of data.ir_global_batch_size is 2"):
        make_mixed(sources=[make_source("few", "ir", 1, 1), make_source("enough", "ir", 9, 1)])


def draw(rng: np.random.Generator, counts: list[int], num_draws: int) -> list[list[int]]:
    """Draws texts for one example after the other."""
    keys = rng.random((len(counts), max(1, *counts)))
    orders = [np.argsort(row[:count]).tolist() for row, count in zip(keys, counts, strict=True)]
    return [[order[i % len(order)] for i in range(num_draws)] if order else [-1] * num_draws for order in orders]


def expected_parts(number: int, batch_sizes: list[int], devices: int = 1) -> list[tuple[int, list, list]]:
    """Returns the parts of a step of a plan of SOURCES with seed 49, computed directly from the random streams."""
    sizes = [len(source.index) for source in SOURCES]
    batches = [(source, i) for source, size in enumerate(sizes) for i in range(size // batch_sizes[source])]
    epoch, step = divmod(number, len(batches) // devices)
    places = permute(np.arange(step * devices, (step + 1) * devices), len(batches), [49, 1, epoch, 0])
    order = [batches[place] for place in places]
    rng = np.random.default_rng([49, 2, number])
    parts = []
    for source, batch in order:
        shuffled = permute(np.arange(sizes[source]), sizes[source], [49, 0, epoch, source]).tolist()
        examples = shuffled[batch * batch_sizes[source] :][: batch_sizes[source]]
        index = SOURCES[source].index
        if SOURCES[source].task == "ir":
            positives = draw(rng, index.positives[examples].tolist(), DRAWS["positives_per_query"])
            negatives = draw(rng, index.negatives[examples].tolist(), DRAWS["negatives_per_query"])
            first = index.positives[examples].tolist()
            negatives = [[j if j < 0 else start + j for j in row] for start, row in zip(first, negatives, strict=True)]
            passages = [p + n for p, n in zip(positives, negatives, strict=True)]
        else:
            passages = [[0] if devices == 1 else [0, -1, -1, -1, -1]] * len(examples)
        parts.append((source, examples, passages))
    return parts


@pytest.mark.parametrize("max_examples", [None, 23, 10**6])
def test_order_is_stable_across_versions(max_examples):
    """Resumed runs must continue in the order of the version that started them, if `max_examples` has no effect."""
    plan, mixed = make_plan(max_examples=max_examples), make_mixed(max_examples=max_examples)
    for number in range(40):
        for step, expected in (
            (plan.step(number), expected_parts(number, [4, 4, 6, 6])),
            (mixed.step(number), expected_parts(number, [2, 2, 2, 2], 4)),
        ):
            actual = [
                (source, examples.tolist(), passages.tolist()) for source, examples, passages in split_parts(step)
            ]
            assert actual == expected


def used_examples(plan: Plan, epochs: int) -> list[set[int]]:
    """Returns the examples of each dataset that are used in the given number of epochs."""
    used: list[set[int]] = [set() for _ in plan.sources]
    for number in range(epochs * plan.steps_per_epoch):
        for source, examples, _ in split_parts(plan.step(number)):
            assert len(set(examples.tolist())) == examples.size
            used[source].update(examples.tolist())
    return used


@HYPOTHESIS
@given(max_examples=st.integers(6, 25), seed=st.integers(0, 2**32 - 1))
def test_max_examples_of_each_dataset_are_used(max_examples, seed):
    plan = make_plan(seed, max_examples=max_examples)
    sizes = [len(source.index) for source in SOURCES]
    counts = [min(size, max_examples) for size in sizes]
    batch_sizes = [4, 4, 6, 6]
    assert plan.steps_per_epoch == sum(count // size for count, size in zip(counts, batch_sizes, strict=True))
    used = used_examples(plan, 40)
    # Leftover examples of one epoch are used in another.
    assert [len(examples) for examples in used] == counts
    assert all(examples <= set(range(size)) for examples, size in zip(used, sizes, strict=True))


def test_subset_is_the_same_in_every_epoch_and_after_a_restart():
    plan = make_plan(max_examples=9)
    used = used_examples(plan, 40)
    for start in (0, 17):
        restarted = make_plan(max_examples=9)
        for number in range(start, start + 200):
            step = restarted.step(number)
            assert set(step.examples.tolist()) <= used[get_source(step)]
            assert as_tuple(step) == as_tuple(plan.step(number))


def test_subset_depends_only_on_the_seed():
    used = used_examples(make_plan(max_examples=9), 40)
    assert [len(examples) for examples in used] == [9, 9, 9, 6]
    for plan in (
        make_plan(max_examples=9, ir_global_batch_size=3, sts_global_batch_size=2),
        make_plan(max_examples=9, positives_per_query=1, negatives_per_query=0),
        make_plan(max_examples=9, ir_share=0.75),
        make_mixed(max_examples=9),
        make_mixed(devices=2, max_examples=9),
    ):
        assert used_examples(plan, 40) == used
    for seed in (0, 48, 50):
        other_used = used_examples(make_plan(seed, max_examples=9), 40)
        assert all(x != y for x, y in zip(used[:3], other_used[:3], strict=True))


def test_subsets_are_uniform():
    """Each of 20 examples is in 1800 of 6000 subsets of 6, with a tolerance of five standard deviations of 35.5."""
    source = [make_source("pairs", "sts", 20, 3)]
    counts = np.zeros(20, int)
    for seed in range(6000):
        counts[make_plan(seed, source, max_examples=6).step(0).examples] += 1
    assert counts.sum() == 6 * 6000
    assert (np.abs(counts - 1800) < 178).all()


def test_max_examples_below_the_batch_size_raises_user_error():
    with pytest.raises(UserError) as caught:
        make_plan(max_examples=5)
    assert str(caught.value).splitlines()[1:] == [
        "  pairs: 5 examples, data.sts_global_batch_size is 6",
        "  questions: 5 examples, data.sts_global_batch_size is 6",
    ]


def test_chosen_passages_do_not_depend_on_how_many_examples_are_handled_at_a_time(monkeypatch):
    counts = np.random.default_rng(1).integers(0, 50, size=200)
    expected = sampler._choose(counts, 7, np.random.default_rng(2))
    monkeypatch.setattr(sampler, "_BLOCK_KEYS", 150)  # three examples
    np.testing.assert_array_equal(sampler._choose(counts, 7, np.random.default_rng(2)), expected)
    assert (expected[counts == 0] == -1).all()
    for count, chosen in zip(counts, expected, strict=True):
        if count >= 7:
            assert len(set(chosen)) == 7
        assert (chosen < count).all()
