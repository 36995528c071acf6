"""Batches against what the prompt encoder makes of the planned examples, on one host and on pretended ones."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from codiemb_jax.batch import Batch, TokenRows
from codiemb_jax.config import DataSettings, PromptSettings
from codiemb_jax.data.loader import StepSource, batches, own_parts, to_global
from codiemb_jax.data.mixed import MixedPlan
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.sampler import Plan, Source, StepPlan
from codiemb_jax.data.store import PreparedDataSet
from codiemb_jax.sharding import row_sharding
from codiemb_jax.text.prompts import PromptTokenizer, Tokens
from codiemb_jax.text.records import Triple
from codiemb_jax.text.rows import pad

PROMPT = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
LIMITS = {"query_max_tokens": 64, "passage_max_tokens": 32}
SETTINGS = DataSettings(
    ir=["ir"], sts=["sts"], ir_global_batch_size=8, sts_global_batch_size=16, positives_per_query=2,
    negatives_per_query=3, **LIMITS,
)  # fmt: skip
WORDS = ["quick", "brown", "fox", "lazy", "dog", "river", "为什么", "我的", "committee", "weeks", "😀"]
STEPS = 7  # an epoch and a half


def write_files(folder: Path) -> list[Path]:
    """19 IR and 35 STS examples; some without negatives, with one positive, with long texts."""
    draw = random.Random(3)

    def triple(instruction: str = "") -> list[str]:
        return [instruction, draw.choice(["", "title "]), " ".join(draw.choices(WORDS, k=draw.randint(1, 14)))]

    ir = [
        {
            "task_type": "ir",
            "query": triple(draw.choice(["", "find it"])),
            "positives": [triple() for _ in range(draw.randint(1, 3))],
            "negatives": [triple() for _ in range(draw.choice([0, 0, 1, 2, 5]))],
        }
        for _ in range(19)
    ]
    sts = [
        {
            "task_type": "sts",
            "query": triple("compare"),
            "positives": [triple("compare")],
            "positive_scores": [draw.uniform(-1, 6)],
        }
        for _ in range(35)
    ]
    paths = [folder / "ir.jsonl", folder / "sts.jsonl"]
    for path, records in zip(paths, (ir, sts), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def encoder(tokenizer) -> PromptTokenizer:
    return PromptTokenizer(tokenizer, PROMPT)


@pytest.fixture(scope="module")
def data_sets(encoder, tmp_path_factory) -> list[PreparedDataSet]:
    folder = tmp_path_factory.mktemp("data")
    ir, sts = write_files(folder)
    made = [prepare(path, path.stem, encoder, cache=folder / "cache", **LIMITS) for path in (ir, sts)]
    assert made[0].index.passage_tokens.max() == 32  # some were cut off
    return made


def sources_of(data_sets: list[PreparedDataSet]) -> list[Source]:
    return [Source(data_set.path.stem, data_set.task, data_set.index) for data_set in data_sets]


@pytest.fixture(scope="module")
def plan(data_sets) -> Plan:
    plan = Plan(sources_of(data_sets), SETTINGS, 5)
    assert plan.steps_per_epoch == 4
    steps = [plan.step(number) for number in range(STEPS)]
    assert {step.task for step in steps} == {"ir", "sts"}
    ir = np.concatenate([step.passages for step in steps if step.task == "ir"])
    assert (ir[:, 2:] < 0).any() and (ir[:, 2:] >= 0).any()  # else these tests would show little
    return plan


@pytest.fixture(scope="module")
def mixed_plan(data_sets) -> MixedPlan:
    """Two examples for each of eight devices, some of them IR and some STS in every step."""
    settings = SETTINGS.model_copy(update={"sampler": "mixed", "ir_global_batch_size": 16})
    plan = MixedPlan(sources_of(data_sets), settings, 5, 8)
    assert all({data_sets[source].task for source in plan.step(i).sources} == {"ir", "sts"} for i in range(4))
    return plan


def make_mesh(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        shape, ("data", "fsdp", "tensor"), devices=jax.devices()[: int(np.prod(shape))],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )  # fmt: skip


def laid_out(texts: list[Tokens | None], length: int) -> dict[str, list[list[int]]]:
    """One text a row, written out element by element."""
    fields: dict[str, list[list[int]]] = {name: [] for name in TokenRows._fields}
    for text in texts:
        ids = [] if text is None else text.ids.tolist()
        content = 0 if text is None else text.content
        padding = [0] * (length - len(ids))
        fields["tokens"].append(ids + padding)
        fields["positions"].append(list(range(len(ids))) + padding)
        fields["segment_ids"].append([1] * len(ids) + padding)
        fields["pooling_mask"].append([0] * content + [1] * (len(ids) - content) + padding)
    return fields


class Expected:
    """What a step's batch must hold, made from the JSON lines and the prompt encoder alone."""

    def __init__(self, data_sets: list[PreparedDataSet], encoder: PromptTokenizer):
        self.encoder = encoder
        self.lines = [
            [json.loads(line) for line in data_set.path.read_text(encoding="utf-8").splitlines()]
            for data_set in data_sets
        ]

    def query(self, triple: list[str]) -> Tokens:
        (text,) = self.encoder.tokenize_queries([Triple(*(part.strip("\t\n :") for part in triple))], 64)
        return text

    def passage(self, triple: list[str]) -> Tokens:
        (text,) = self.encoder.tokenize_passages([Triple(*(part.strip("\t\n :") for part in triple))], 32)
        return text

    def texts(self, example: dict[str, Any], chosen: list[int]) -> list[Tokens | None]:
        """An example's query and its chosen passages."""
        if example["task_type"] == "sts":
            assert chosen == [0] + [-1] * (len(chosen) - 1)
            absent = [None] * (len(chosen) - 1)
            return [self.query(example["query"]), self.query(example["positives"][0]), *absent]
        own = example["positives"] + example["negatives"]
        passages = [None if text < 0 else self.passage(own[text]) for text in chosen]
        # Only what does not exist is absent: negatives of an example without any.
        assert [text is None for text in passages] == [False] * 2 + [not example["negatives"]] * (len(chosen) - 2)
        return [self.query(example["query"]), *passages]

    def batch(self, step: StepPlan, devices: int) -> dict[str, Any]:
        """A step's batch, of examples split over so many devices; every field as lists."""
        per_source = step.examples.size // len(step.sources)
        examples = [
            self.lines[step.sources[place // per_source]][example] for place, example in enumerate(step.examples)
        ]
        texts = [self.texts(*example) for example in zip(examples, step.passages.tolist(), strict=True)]
        width = step.passages.shape[1]
        rows: list[Tokens | None] = []
        fields: dict[str, list] = {"text_ids": [], "queries": [], "passages": [], "scores": []}
        count = len(examples) // devices
        for device in range(devices):
            places = range(device * count, (device + 1) * count)
            # A device's rows are its queries, then its passages, example by example.
            order = [(place, 0) for place in places]
            order += [(place, 1 + j) for place in places for j in range(width)]
            rows += [texts[place][text] for place, text in order]
            present = [(place, text) for place, text in order if texts[place][text] is not None]
            fields["text_ids"] += [[p * (width + 1) + t if (p, t) in present else -1] for p, t in order]
            fields["queries"] += range(count)
            fields["passages"] += [
                [order.index((place, 1 + j)) if (place, 1 + j) in present else -1 for j in range(width)]
                for place in places
            ]
            fields["scores"] += [float(np.float32(examples[p].get("positive_scores", [np.nan])[0])) for p in places]
        return {"rows": laid_out(rows, step.row_length), **fields}


@pytest.fixture(scope="module")
def expected(data_sets, encoder) -> Expected:
    return Expected(data_sets, encoder)


def assert_holds(batch: Batch, fields: dict[str, Any]) -> None:
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


def assert_counts_tokens(step: StepPlan, batch: Batch) -> None:
    assert step.tokens == int((batch.rows.segment_ids > 0).sum())
    assert step.computed_tokens == batch.rows.segment_ids.size


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_batches_hold_the_planned_examples_on_any_mesh(shape, plan, data_sets, expected):
    sharding, shards = row_sharding(make_mesh(*shape)), shape[0] * shape[1]
    found = list(batches(plan, data_sets, sharding, start=0, stop=STEPS))
    assert [step.number for step, _ in found] == list(range(STEPS))
    for step, batch in found:
        assert type(batch) is Batch
        assert_holds(batch, expected.batch(step, shards))
        assert_counts_tokens(step, batch)
        for leaf in jax.tree.leaves(batch):
            assert leaf.sharding == sharding
            assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // shards
        assert np.isnan(batch.scores).tolist() == [step.task == "ir"] * step.examples.size


def test_a_text_has_the_same_number_on_any_mesh(plan, data_sets):
    def by_number(*shape: int) -> list[dict[int, list[int]]]:
        """The tokens of each numbered text of every step."""
        numbered = []
        for _, batch in batches(plan, data_sets, row_sharding(make_mesh(*shape)), start=0, stop=STEPS):
            assert batch.text_ids.shape == (len(batch.rows.tokens), 1)
            numbers, tokens = np.asarray(batch.text_ids)[:, 0].tolist(), np.asarray(batch.rows.tokens).tolist()
            present = np.asarray(batch.rows.segment_ids).any(axis=1).tolist()
            assert [number >= 0 for number in numbers] == present
            assert set(numbers) - set(range(len(numbers))) <= {-1}
            numbered.append({n: row for n, row in zip(numbers, tokens, strict=True) if n >= 0})
            assert len(numbered[-1]) == sum(present)  # no number twice
        return numbered

    alone = by_number(1, 1, 1)
    assert by_number(8, 1, 1) == alone
    assert by_number(2, 2, 2) == alone


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1)])
def test_a_mixed_batch_holds_what_each_device_has_been_dealt(shape, mixed_plan, data_sets, expected):
    for step, batch in batches(mixed_plan, data_sets, row_sharding(make_mesh(*shape)), start=0, stop=4):
        assert type(batch) is Batch
        assert_holds(batch, expected.batch(step, 8))
        assert_counts_tokens(step, batch)
        assert step.examples.size == 2 * 8
        for device, (source, shard) in enumerate(zip(step.sources, batch.scores.addressable_shards, strict=True)):
            assert shard.index == (slice(2 * device, 2 * device + 2),)
            assert np.isnan(shard.data).tolist() == [data_sets[source].task == "ir"] * 2


def test_starting_later_leaves_out_the_steps_before(plan, data_sets):
    sharding = row_sharding(make_mesh(2, 1, 1))
    everything = list(batches(plan, data_sets, sharding, start=0, stop=STEPS))
    for start in (1, 3, STEPS - 1):
        rest = list(batches(plan, data_sets, sharding, start=start, stop=STEPS))
        assert [step.number for step, _ in rest] == list(range(start, STEPS))
        for (_, batch), (_, whole) in zip(rest, everything[start:], strict=True):
            for one, other in zip(jax.tree.leaves(batch), jax.tree.leaves(whole), strict=True):
                np.testing.assert_array_equal(one, other)
    assert list(batches(plan, data_sets, sharding, start=STEPS, stop=STEPS)) == []


def test_pad():
    texts = [Tokens(np.array([7, 8, 9], np.int32), 1), None, Tokens(np.array([5], np.int32), 0)]
    rows = pad(texts, 4)
    assert rows.tokens.tolist() == [[7, 8, 9, 0], [0, 0, 0, 0], [5, 0, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert rows.pooling_mask.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert {field.dtype.name for field in rows} == {"int32"}


class OwnDevices:
    """A sharding as a process sees it that owns some of the devices only."""

    def __init__(self, sharding: jax.sharding.Sharding, devices: list[jax.Device]):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        indices = self.sharding.devices_indices_map(shape)
        return {device: indices[device] for device in self.devices}


HOSTS = {
    "one": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "two": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "apart": [[0, 1, 6, 7], [2, 3, 4, 5]],
    "every other": [[6, 4, 2, 0], [7, 5, 3, 1]],
    "uneven": [[3], [0, 7], [5, 1, 2, 4, 6]],
}


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)])
def test_own_parts_are_those_of_the_devices(hosts, shape):
    mesh = make_mesh(*shape)
    sharding = row_sharding(mesh)
    devices = list(mesh.devices.flat)
    per_shard = 16 // (shape[0] * shape[1])
    for own in HOSTS[hosts]:
        parts = own_parts(OwnDevices(sharding, [devices[i] for i in own]), 16)
        # The tensor axis is the innermost, and holds the same rows on all of its devices.
        shards = sorted({i // shape[2] for i in own})
        assert parts == [(shard * per_shard, (shard + 1) * per_shard) for shard in shards]


@pytest.mark.parametrize("sampler", ["dynamic", "mixed"])
@pytest.mark.parametrize("hosts", HOSTS)
def test_hosts_read_their_own_examples_alone_and_make_up_the_global_batch(
    hosts, sampler, plan, mixed_plan, data_sets, expected, monkeypatch
):
    plan = mixed_plan if sampler == "mixed" else plan
    mesh = make_mesh(8, 1, 1)
    sharding = row_sharding(mesh)
    read: list[tuple[str, int]] = []
    original = PreparedDataSet.read

    def recorded(self: PreparedDataSet, examples: np.ndarray) -> list[list[Tokens]]:
        read.extend((self.task, example) for example in examples.tolist())
        return original(self, examples)

    monkeypatch.setattr(PreparedDataSet, "read", recorded)

    def fake(shape, layout, callback):
        """What of the global array lies on each of the host's devices, and its shape."""
        indices = layout.addressable_devices_indices_map(shape)
        return shape, {device: np.asarray(callback(index)) for device, index in indices.items()}

    monkeypatch.setattr(jax, "make_array_from_callback", fake)
    for number in range(4):
        step = plan.step(number)
        parts = StepSource(plan, data_sets, sharding, STEPS)[number][1]
        assert len(parts) == 8
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        per_source = step.examples.size // len(step.sources)
        dealt = [
            (data_sets[step.sources[place // per_source]].task, example)
            for place, example in enumerate(step.examples.tolist())
        ]
        size = len(dealt) // 8
        seen: list[tuple[str, int]] = []
        for own in HOSTS[hosts]:
            layout = OwnDevices(sharding, [mesh.devices.flat[i] for i in own])
            source = StepSource(plan, data_sets, layout, STEPS)
            read.clear()
            assert len(source) == STEPS
            host_plan, local = source[number]
            assert host_plan.sources == step.sources
            assert host_plan.examples.tolist() == step.examples.tolist()
            assert read == [example for i in sorted(own) for example in dealt[i * size : (i + 1) * size]]
            seen += read
            assert len(local) == len(own)
            for found, i in zip(local, sorted(own), strict=True):
                jax.tree.map(np.testing.assert_array_equal, found, parts[i])
            ((again, arrays),) = batches(plan, data_sets, layout, start=number, stop=number + 1)
            assert again.number == number
            for (shape, blocks), leaf in zip([*arrays.rows, *arrays[1:]], jax.tree.leaves(whole), strict=True):
                assert shape == leaf.shape
                assert len(blocks) == len(own)
                for i in own:
                    block = leaf.shape[0] // 8
                    np.testing.assert_array_equal(blocks[mesh.devices.flat[i]], leaf[i * block : (i + 1) * block])
        assert sorted(seen) == sorted(dealt)
        assert_holds(whole, expected.batch(step, 8))


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
    # Which part is which says `starts`, not the order in which they come.
    backwards = to_global(np.split(local, shards)[::-1], range(shards)[::-1], shards, sharding)
    np.testing.assert_array_equal(backwards, local)
