"""Tests batches against independently tokenized examples, on one host and on simulated hosts."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from codiemb_jax.batch import Batch, TokenRows
from codiemb_jax.config import DataSettings, PromptSettings
from codiemb_jax.data.layout import Layout, PackedLayout, PaddedLayout
from codiemb_jax.data.loader import StepSource, batches, local_ranges, to_global
from codiemb_jax.data.mixed import MixedPlan
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.sampler import Plan, Source, StepPlan
from codiemb_jax.data.store import PreparedDataset
from codiemb_jax.sharding import row_sharding
from codiemb_jax.text.prompts import PromptTokenizer, Tokens
from codiemb_jax.text.records import Triple
from codiemb_jax.text.rows import Texts, rows_per_chunk
from tests.helpers import in_memory

PROMPT = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
LIMITS = {"query_max_tokens": 64, "passage_max_tokens": 32}
SETTINGS = DataSettings(
    ir=["ir"], sts=["sts"], ir_global_batch_size=8, sts_global_batch_size=16, positives_per_query=2,
    negatives_per_query=3, **LIMITS,
)  # fmt: skip
WORDS = ["quick", "brown", "fox", "lazy", "dog", "river", "为什么", "我的", "committee", "weeks", "😀"]
STEPS = 7  # almost two epochs


def write_files(folder: Path) -> list[Path]:
    """Writes 19 IR and 35 STS examples, some without negatives, with one positive, or with long texts."""
    rng = random.Random(3)

    def triple(instruction: str = "") -> list[str]:
        return [instruction, rng.choice(["", "title "]), " ".join(rng.choices(WORDS, k=rng.randint(1, 14)))]

    ir = [
        {
            "task_type": "ir",
            "query": triple(rng.choice(["", "find it"])),
            "positives": [triple() for _ in range(rng.randint(1, 3))],
            "negatives": [triple() for _ in range(rng.choice([0, 0, 1, 2, 5]))],
        }
        for _ in range(19)
    ]
    sts = [
        {
            "task_type": "sts",
            "query": triple("compare"),
            "positives": [triple("compare")],
            "positive_scores": [rng.uniform(-1, 6)],
        }
        for _ in range(35)
    ]
    paths = [folder / "ir.jsonl", folder / "sts.jsonl"]
    for path, records in zip(paths, (ir, sts), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def prompt_tokenizer(tokenizer) -> PromptTokenizer:
    return PromptTokenizer(tokenizer, PROMPT)


@pytest.fixture(scope="module")
def datasets(prompt_tokenizer, tmp_path_factory) -> list[PreparedDataset]:
    folder = tmp_path_factory.mktemp("data")
    ir, sts = write_files(folder)
    datasets = [prepare(path, path.stem, prompt_tokenizer, cache=folder / "cache", **LIMITS) for path in (ir, sts)]
    assert in_memory(datasets[0].index).passage_tokens.max() == 32  # some passages were truncated
    return datasets


def make_sources(datasets: list[PreparedDataset]) -> list[Source]:
    return [Source(dataset.path.stem, dataset.task, dataset.index) for dataset in datasets]


def make_plan(datasets: list[PreparedDataset], layout: Layout) -> Plan:
    plan = Plan(make_sources(datasets), SETTINGS, 5, layout, {"ir": None, "sts": None}, compare_texts=True)
    assert plan.steps_per_epoch == 4
    steps = [plan.step(number) for number in range(STEPS)]
    assert {step.task for step in steps} == {"ir", "sts"}
    ir = np.concatenate([step.passages for step in steps if step.task == "ir"])
    assert (ir[:, 2:] < 0).any() and (ir[:, 2:] >= 0).any()  # otherwise the tests would prove little
    return plan


def make_mixed_plan(datasets: list[PreparedDataset], layout: Layout) -> MixedPlan:
    """Returns a plan with two examples for each of eight devices, where every step has both tasks."""
    settings = SETTINGS.model_copy(update={"sampler": "mixed", "ir_global_batch_size": 16})
    plan = MixedPlan(make_sources(datasets), settings, 5, layout, compare_texts=True)
    assert all({datasets[source].task for source in plan.step(i).sources} == {"ir", "sts"} for i in range(4))
    return plan


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        shape, ("data", "fsdp", "tensor"), devices=jax.devices()[: int(np.prod(shape))],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )  # fmt: skip


def lay_out(texts: list[Tokens | None], length: int) -> dict[str, list[list[int]]]:
    """Lays out one text per row as lists."""
    fields: dict[str, list[list[int]]] = {name: [] for name in TokenRows._fields}
    for text in texts:
        ids = [] if text is None else text.ids.tolist()
        start = 0 if text is None else text.content_start
        padding = [0] * (length - len(ids))
        fields["tokens"].append(ids + padding)
        fields["positions"].append(list(range(len(ids))) + padding)
        fields["segment_ids"].append([1] * len(ids) + padding)
        fields["pooling_mask"].append([0] * start + [1] * (len(ids) - start) + padding)
    return fields


LaidOut = tuple[list[int], list[int], list[int]]
"""The tokens, positions and pooling mask of a text."""


class ExpectedBatches:
    """Builds the expected batches from the JSON lines with `PromptTokenizer`."""

    def __init__(self, datasets: list[PreparedDataset], tokenizer: PromptTokenizer):
        self.tokenizer = tokenizer
        self.lines = [
            [json.loads(line) for line in dataset.path.read_text(encoding="utf-8").splitlines()] for dataset in datasets
        ]

    def query(self, triple: list[str]) -> Tokens:
        (text,) = self.tokenizer.tokenize_queries([Triple(*(part.strip("\t\n :") for part in triple))], 64)
        return text

    def passage(self, triple: list[str]) -> Tokens:
        (text,) = self.tokenizer.tokenize_passages([Triple(*(part.strip("\t\n :") for part in triple))], 32)
        return text

    def texts(self, example: dict[str, Any], chosen: list[int]) -> list[Tokens | None]:
        """Returns the query of an example and its chosen passages."""
        if example["task_type"] == "sts":
            assert chosen == [0] + [-1] * (len(chosen) - 1)
            padding = [None] * (len(chosen) - 1)
            return [self.query(example["query"]), self.query(example["positives"][0]), *padding]
        candidates = example["positives"] + example["negatives"]
        passages = [None if i < 0 else self.passage(candidates[i]) for i in chosen]
        # Only examples without negatives have padding.
        assert [passage is None for passage in passages] == [False] * 2 + [not example["negatives"]] * (len(chosen) - 2)
        return [self.query(example["query"]), *passages]

    def examples(self, step: StepPlan) -> list[dict[str, Any]]:
        per_source = step.examples.size // len(step.sources)
        return [self.lines[step.sources[i // per_source]][example] for i, example in enumerate(step.examples)]

    def example_texts(self, step: StepPlan) -> list[list[Tokens | None]]:
        """Returns the texts of each example: its query and its chosen passages."""
        return [self.texts(*example) for example in zip(self.examples(step), step.passages.tolist(), strict=True)]

    def present_texts(self, step: StepPlan) -> list[list[LaidOut | None]]:
        """Returns each text of each example as it should lie in a row; None for padding."""
        return [
            [
                None
                if text is None
                else (
                    text.ids.tolist(),
                    list(range(text.ids.size)),
                    [int(i >= text.content_start) for i in range(text.ids.size)],
                )
                for text in example
            ]
            for example in self.example_texts(step)
        ]

    def batch(self, step: StepPlan, devices: int) -> dict[str, Any]:
        """Returns the batch of a step whose examples are split over `devices`, with all fields as lists."""
        examples, texts = self.examples(step), self.example_texts(step)
        width = step.passages.shape[1]
        rows: list[Tokens | None] = []
        fields: dict[str, list] = {"text_ids": [], "queries": [], "passages": [], "scores": []}
        count = len(examples) // devices
        for device in range(devices):
            local = range(device * count, (device + 1) * count)
            # The rows of a device are its queries and then the passages of each example.
            order = [(i, 0) for i in local]
            order += [(i, 1 + j) for i in local for j in range(width)]
            rows += [texts[i][text] for i, text in order]
            present = [(i, text) for i, text in order if texts[i][text] is not None]
            fields["text_ids"] += [[i * (width + 1) + t if (i, t) in present else -1] for i, t in order]
            fields["queries"] += range(count)
            fields["passages"] += [
                [order.index((i, 1 + j)) if (i, 1 + j) in present else -1 for j in range(width)] for i in local
            ]
            fields["scores"] += [float(np.float32(examples[i].get("positive_scores", [np.nan])[0])) for i in local]
        return {"rows": lay_out(rows, step.layout.row_length), **fields, "texts": step.texts}


@pytest.fixture(scope="module")
def expected(datasets, prompt_tokenizer) -> ExpectedBatches:
    return ExpectedBatches(datasets, prompt_tokenizer)


def assert_equal(batch: Batch, fields: dict[str, Any]) -> None:
    assert set(fields) == set(Batch._fields)
    for name in TokenRows._fields:
        value = np.asarray(getattr(batch.rows, name))
        assert value.dtype == np.int32
        assert value.tolist() == fields["rows"][name], name
    for name in ("text_ids", "queries", "passages"):
        value = np.asarray(getattr(batch, name))
        assert value.dtype == np.int32
        assert value.tolist() == fields[name], name
    assert batch.scores.dtype == np.float32
    np.testing.assert_array_equal(batch.scores, fields["scores"])
    assert (batch.texts is None) == np.isfinite(batch.scores).all()  # only batches with IR have texts
    jax.tree.map(np.testing.assert_array_equal, batch.texts, fields["texts"])


def indices_by_example(batch: Batch, devices: int) -> list[list[tuple[int, int] | None]]:
    """Returns the (row, slot) in the global batch of each example's query and passages; None for padding."""
    rows, slots = batch.text_ids.shape
    indices = np.concatenate([np.asarray(batch.queries)[:, None], np.asarray(batch.passages)], axis=1).tolist()
    per_device = len(indices) // devices
    return [
        [None if i < 0 else (example // per_device * (rows // devices) + i // slots, i % slots) for i in own]
        for example, own in enumerate(indices)
    ]


def packed_texts(batch: Batch, devices: int) -> list[list[LaidOut | None]]:
    """Returns the texts that the indices of a batch point to, and asserts that the rows contain nothing else."""
    tokens, positions, segment_ids, pooling_mask = (np.asarray(field) for field in batch.rows)
    seen = np.zeros(tokens.shape, bool)

    def read(row: int, slot: int) -> LaidOut:
        own = segment_ids[row] == slot + 1
        assert own.any()
        assert not seen[row, own].any()
        assert np.ptp(np.flatnonzero(own)) == own.sum() - 1  # consecutive
        seen[row] |= own
        return tokens[row, own].tolist(), positions[row, own].tolist(), pooling_mask[row, own].tolist()

    texts = [[index and read(*index) for index in example] for example in indices_by_example(batch, devices)]
    for field in (tokens, positions, segment_ids, pooling_mask):
        assert field.dtype == np.int32
        assert not field[~seen].any()
    return texts


def texts_by_id(batch: Batch, devices: int) -> dict[int, LaidOut]:
    """Returns each text of a batch by its id, and asserts that ids are unique and that empty slots have none."""
    text_ids = np.asarray(batch.text_ids)
    assert text_ids.dtype == np.int32
    by_id: dict[int, LaidOut] = {}
    for places, texts in zip(indices_by_example(batch, devices), packed_texts(batch, devices), strict=True):
        for place, text in zip(places, texts, strict=True):
            if place is not None and text is not None:
                text_id = int(text_ids[place])
                assert text_id >= 0 and text_id not in by_id
                by_id[text_id] = text
    assert (text_ids >= 0).sum() == len(by_id)
    return by_id


def assert_token_counts(step: StepPlan, batch: Batch) -> None:
    assert step.tokens == int((batch.rows.segment_ids > 0).sum())
    assert step.computed_tokens == batch.rows.segment_ids.size


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_batches_have_the_planned_examples_on_any_mesh(shape, datasets, expected):
    sharding, shards = row_sharding(make_mesh(*shape)), shape[0] * shape[1]
    plan = make_plan(datasets, PaddedLayout(shards))
    steps = list(batches(plan, datasets, sharding, start=0, stop=STEPS))
    assert [step.number for step, _ in steps] == list(range(STEPS))
    for step, batch in steps:
        assert type(batch) is Batch
        assert_equal(batch, expected.batch(step, shards))
        assert_token_counts(step, batch)
        for leaf in jax.tree.leaves(batch):
            assert leaf.sharding == sharding
            assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // shards
        assert np.isnan(batch.scores).tolist() == [step.task == "ir"] * step.examples.size


def test_text_ids_do_not_depend_on_the_mesh(datasets):
    def tokens_by_id(*shape: int) -> list[dict[int, list[int]]]:
        """Returns the tokens of each text id for every step."""
        steps = []
        plan = make_plan(datasets, PaddedLayout(shape[0] * shape[1]))
        for _, batch in batches(plan, datasets, row_sharding(make_mesh(*shape)), start=0, stop=STEPS):
            assert batch.text_ids.shape == (len(batch.rows.tokens), 1)
            ids, tokens = np.asarray(batch.text_ids)[:, 0].tolist(), np.asarray(batch.rows.tokens).tolist()
            present = np.asarray(batch.rows.segment_ids).any(axis=1).tolist()
            assert [text_id >= 0 for text_id in ids] == present
            assert set(ids) - set(range(len(ids))) <= {-1}
            steps.append({text_id: row for text_id, row in zip(ids, tokens, strict=True) if text_id >= 0})
            assert len(steps[-1]) == sum(present)  # ids are unique
        return steps

    single_device = tokens_by_id(1, 1, 1)
    assert tokens_by_id(8, 1, 1) == single_device
    assert tokens_by_id(2, 2, 2) == single_device


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_packed_batches_have_the_planned_texts_on_any_mesh(shape, chunks, datasets, expected):
    sharding, shards = row_sharding(make_mesh(*shape)), shape[0] * shape[1]
    plan = make_plan(datasets, PackedLayout(64, shards, chunks))
    padded = batches(
        make_plan(datasets, PaddedLayout()), datasets, row_sharding(make_mesh(1, 1, 1)), start=0, stop=STEPS
    )
    for (step, batch), (padded_step, padded_batch) in zip(
        batches(plan, datasets, sharding, start=0, stop=STEPS), padded, strict=True
    ):
        assert type(batch) is Batch
        rows, slots = step.layout.rows * shards, 64 // 16
        assert batch.rows.tokens.shape == (rows, 64)
        assert batch.text_ids.shape == (rows, slots)
        assert step.layout.rows % rows_per_chunk(step.layout.rows, chunks) == 0
        assert_token_counts(step, batch)
        for leaf in jax.tree.leaves(batch):
            assert leaf.sharding == sharding
            assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // shards
        assert packed_texts(batch, shards) == expected.present_texts(step)
        # Ids do not depend on the layout, so neither does dropout.
        assert texts_by_id(batch, shards) == texts_by_id(padded_batch, 1)
        scores = [float(np.float32(line.get("positive_scores", [np.nan])[0])) for line in expected.examples(step)]
        np.testing.assert_array_equal(batch.scores, scores)
        assert sorted(step.examples.tolist()) == sorted(padded_step.examples.tolist())


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1)])
def test_packed_mixed_batches_have_the_planned_texts_of_each_device(shape, datasets, expected):
    plan, padded_plan = make_mixed_plan(datasets, PackedLayout(64, 8, 2)), make_mixed_plan(datasets, PaddedLayout(8))
    sharding = row_sharding(make_mesh(*shape))
    for (step, batch), (padded_step, padded_batch) in zip(
        batches(plan, datasets, sharding, start=0, stop=4),
        batches(padded_plan, datasets, sharding, start=0, stop=4),
        strict=True,
    ):
        assert step.sources == padded_step.sources
        assert step.examples.tolist() == padded_step.examples.tolist()  # devices keep their examples, and their order
        assert_token_counts(step, batch)
        assert packed_texts(batch, 8) == expected.present_texts(step)
        assert texts_by_id(batch, 8) == texts_by_id(padded_batch, 8)
        np.testing.assert_array_equal(batch.scores, padded_batch.scores)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1)])
def test_mixed_batches_have_the_planned_examples_of_each_device(shape, datasets, expected):
    plan = make_mixed_plan(datasets, PaddedLayout(8))
    for step, batch in batches(plan, datasets, row_sharding(make_mesh(*shape)), start=0, stop=4):
        assert type(batch) is Batch
        assert_equal(batch, expected.batch(step, 8))
        assert_token_counts(step, batch)
        assert step.examples.size == 2 * 8
        for device, (source, shard) in enumerate(zip(step.sources, batch.scores.addressable_shards, strict=True)):
            assert shard.index == (slice(2 * device, 2 * device + 2),)
            assert np.isnan(shard.data).tolist() == [datasets[source].task == "ir"] * 2


@pytest.mark.parametrize("layout", [PaddedLayout(2), PackedLayout(64, 2)])
def test_start_skips_earlier_steps(layout, datasets):
    plan, sharding = make_plan(datasets, layout), row_sharding(make_mesh(2, 1, 1))
    all_steps = list(batches(plan, datasets, sharding, start=0, stop=STEPS))
    for start in (1, 3, STEPS - 1):
        rest = list(batches(plan, datasets, sharding, start=start, stop=STEPS))
        assert [step.number for step, _ in rest] == list(range(start, STEPS))
        for (_, actual), (_, expected) in zip(rest, all_steps[start:], strict=True):
            jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert list(batches(plan, datasets, sharding, start=STEPS, stop=STEPS)) == []


class HostSharding:
    """A sharding as seen by a host that has only some of the devices."""

    def __init__(self, sharding: jax.sharding.Sharding, devices: list[jax.Device]):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        indices = self.sharding.devices_indices_map(shape)
        return {device: indices[device] for device in self.devices}


HOSTS = {
    "one": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "two": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "not contiguous": [[0, 1, 6, 7], [2, 3, 4, 5]],
    "interleaved": [[6, 4, 2, 0], [7, 5, 3, 1]],
    "uneven": [[3], [0, 7], [5, 1, 2, 4, 6]],
}


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_local_ranges_match_the_devices_of_the_host(hosts, shape):
    mesh = make_mesh(*shape)
    sharding = row_sharding(mesh)
    devices = list(mesh.devices.flat)
    per_shard = 16 // (shape[0] * shape[1])
    for local_devices in HOSTS[hosts]:
        ranges = local_ranges(HostSharding(sharding, [devices[i] for i in local_devices]), 16)
        # The tensor axis is the innermost, and all of its devices have the same rows.
        shards = sorted({i // shape[2] for i in local_devices})
        assert ranges == [(shard * per_shard, (shard + 1) * per_shard) for shard in shards]


@pytest.mark.parametrize("layout", [PaddedLayout(8), PackedLayout(64, 8)])
@pytest.mark.parametrize("sampler", ["dynamic", "mixed"])
@pytest.mark.parametrize("hosts", HOSTS)
def test_hosts_read_only_their_examples_and_assemble_the_global_batch(
    hosts, sampler, layout, datasets, expected, monkeypatch
):
    plan = make_mixed_plan(datasets, layout) if sampler == "mixed" else make_plan(datasets, layout)
    mesh = make_mesh(8, 1, 1)
    sharding = row_sharding(mesh)
    read: list[tuple[str, int]] = []
    original = PreparedDataset.read

    def record_read(self: PreparedDataset, examples: np.ndarray) -> tuple[Texts, np.ndarray]:
        read.extend((self.task, example) for example in examples.tolist())
        return original(self, examples)

    monkeypatch.setattr(PreparedDataset, "read", record_read)

    def make_local_arrays(shape, layout, callback):
        """Returns the shape of the global array and its blocks on the devices of the host."""
        indices = layout.addressable_devices_indices_map(shape)
        return shape, {device: np.asarray(callback(index)) for device, index in indices.items()}

    monkeypatch.setattr(jax, "make_array_from_callback", make_local_arrays)
    for number in range(4):
        step = plan.step(number)
        parts = StepSource(plan, datasets, sharding, STEPS)[number][1]
        assert len(parts) == 8
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        per_source = step.examples.size // len(step.sources)
        planned = [
            (datasets[step.sources[i // per_source]].task, example) for i, example in enumerate(step.examples.tolist())
        ]
        size = len(planned) // 8
        seen: list[tuple[str, int]] = []
        for local_devices in HOSTS[hosts]:
            host = HostSharding(sharding, [mesh.devices.flat[i] for i in local_devices])
            source = StepSource(plan, datasets, host, STEPS)
            read.clear()
            assert len(source) == STEPS
            host_plan, local = source[number]
            assert host_plan.sources == step.sources
            assert host_plan.examples.tolist() == step.examples.tolist()
            assert read == [example for i in sorted(local_devices) for example in planned[i * size : (i + 1) * size]]
            seen += read
            assert len(local) == len(local_devices)
            for part, i in zip(local, sorted(local_devices), strict=True):
                jax.tree.map(np.testing.assert_array_equal, part, parts[i])
            ((loaded, arrays),) = batches(plan, datasets, host, start=number, stop=number + 1)
            assert loaded.number == number
            placed = jax.tree.leaves(arrays, is_leaf=lambda leaf: type(leaf) is tuple)
            for (shape, blocks), leaf in zip(placed, jax.tree.leaves(whole), strict=True):
                assert shape == leaf.shape
                assert len(blocks) == len(local_devices)
                for i in local_devices:
                    block = leaf.shape[0] // 8
                    np.testing.assert_array_equal(blocks[mesh.devices.flat[i]], leaf[i * block : (i + 1) * block])
        assert sorted(seen) == sorted(planned)
        if isinstance(layout, PaddedLayout):
            assert_equal(whole, expected.batch(step, 8))
        else:
            assert expected.present_texts(step) == packed_texts(whole, 8)


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("per_example", [1, 5])
def test_to_global_keeps_the_rows_of_an_example_together(shape, per_example):
    sharding, shards = row_sharding(make_mesh(*shape)), shape[0] * shape[1]
    local = np.arange(8 * per_example * 3).reshape(8 * per_example, 3)
    array = to_global(np.split(local, shards), range(shards), shards, sharding)
    np.testing.assert_array_equal(array, local)
    assert array.sharding == sharding
    vector = to_global(np.split(local[:, 0], shards), range(shards), shards, sharding)
    np.testing.assert_array_equal(vector, local[:, 0])
    # The position of a part depends on `starts` and not on the order of the parts.
    reversed_parts = to_global(np.split(local, shards)[::-1], range(shards)[::-1], shards, sharding)
    np.testing.assert_array_equal(reversed_parts, local)
