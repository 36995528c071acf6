"""Batches against what the prompt encoder makes of the planned examples, on one host and on pretended ones."""

import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from codiemb_jax.batch import Batch, IRBatch, MixedBatch, TokenRows, STSBatch
from codiemb_jax.config import DataSettings, PromptSettings
from codiemb_jax.data.loader import StepSource, batches, own_slices, padded_rows, to_global
from codiemb_jax.data.prepare import PreparedDataSet, prepare
from codiemb_jax.text.prompts import PromptTokenizer, Tokens
from codiemb_jax.text.records import Triple
from codiemb_jax.data.sampler import Plan, Source, StepPlan
from codiemb_jax.sharding import row_sharding

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


@pytest.fixture(scope="module")
def plan(data_sets) -> Plan:
    plan = Plan([Source(d.name, d.task, d.index) for d in data_sets], SETTINGS, 5)
    assert plan.steps_per_epoch == 4
    steps = [plan.step(number) for number in range(STEPS)]
    assert {step.task for step in steps} == {"ir", "sts"}
    ir = np.concatenate([step.parts[0].texts for step in steps if step.task == "ir"])
    assert (ir[:, 2:] < 0).any() and (ir[:, 2:] >= 0).any()  # else these tests would show little
    return plan


@pytest.fixture(scope="module")
def mixed_plan(data_sets) -> Plan:
    """Two examples for each of eight devices, some of them IR and some STS in every step."""
    settings = SETTINGS.model_copy(update={"sampler": "mixed", "ir_global_batch_size": 16})
    plan = Plan([Source(d.name, d.task, d.index) for d in data_sets], settings, 5, 8)
    assert all({data_sets[part.source].task for part in plan.step(i).parts} == {"ir", "sts"} for i in range(4))
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
        fields["segments"].append([1] * len(ids) + padding)
        fields["pooled"].append([0] * content + [1] * (len(ids) - content) + padding)
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

    def fields(self, step: StepPlan) -> list[object]:
        """TokenRows of queries, rows of passages, and present or scores; of a mixed step all of them, and is_ir."""
        if step.task == "mixed":
            return self.mixed(step)
        examples = [self.lines[step.parts[0].source][example] for example in step.parts[0].examples]
        queries = laid_out([self.query(example["query"]) for example in examples], step.query_row)
        if step.task == "sts":
            second = laid_out([self.query(example["positives"][0]) for example in examples], step.query_row)
            return [queries, second, [float(np.float32(example["positive_scores"][0])) for example in examples]]
        passages: list[Tokens | None] = []
        present = []
        for example, chosen in zip(examples, step.parts[0].texts.tolist(), strict=True):
            own = example["positives"] + example["negatives"]
            passages += [None if text < 0 else self.passage(own[text]) for text in chosen]
            present.append([bool(example["negatives"])] * 3)
        return [queries, laid_out(passages, step.passage_row), present]

    def mixed(self, step: StepPlan) -> list[object]:
        queries: list[Tokens | None] = []
        passages: list[Tokens | None] = []
        present, scores, is_ir = [], [], []
        for part in step.parts:
            for number, chosen in zip(part.examples, part.texts.tolist(), strict=True):
                example = self.lines[part.source][number]
                queries.append(self.query(example["query"]))
                is_ir.append(example["task_type"] == "ir")
                own = example["positives"] + example["negatives"] if is_ir[-1] else []
                if not is_ir[-1]:
                    passages += [self.query(example["positives"][0]), None, None, None, None]
                else:
                    passages += [None if text < 0 else self.passage(own[text]) for text in chosen]
                present.append([bool(example["negatives"])] * 3 if is_ir[-1] else [False] * 3)
                scores.append(float(np.float32(example.get("positive_scores", [0.0])[0])))
        return [laid_out(queries, step.query_row), laid_out(passages, step.passage_row), present, scores, is_ir]


@pytest.fixture(scope="module")
def expected(data_sets, encoder) -> Expected:
    return Expected(data_sets, encoder)


def assert_holds(batch: Batch, fields: list[object]) -> None:
    for found, wanted in zip(batch, fields, strict=True):
        if isinstance(found, TokenRows):
            for name in TokenRows._fields:
                value = np.asarray(getattr(found, name))
                assert value.dtype == np.int32
                assert value.tolist() == wanted[name], name
        else:
            assert np.asarray(found).tolist() == wanted


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_batches_hold_the_planned_examples_on_any_mesh(shape, plan, data_sets, expected):
    sharding = row_sharding(make_mesh(*shape))
    found = list(batches(plan, data_sets, sharding, start=0, stop=STEPS))
    assert [step.number for step, _ in found] == list(range(STEPS))
    for step, batch in found:
        assert type(batch) is (IRBatch if step.task == "ir" else STSBatch)
        assert_holds(batch, expected.fields(step))
        assert step.tokens == sum(int((rows.segment_ids > 0).sum()) for rows in batch[:2])
        assert step.computed_tokens == sum(rows.segment_ids.size for rows in batch[:2])
        for leaf in jax.tree.leaves(batch):
            assert leaf.sharding == sharding
            assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] // (shape[0] * shape[1])
        types = {"ir": bool, "sts": np.float32}
        assert batch[2].dtype == types[step.task]


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1)])
def test_a_mixed_batch_holds_what_each_device_has_been_dealt(shape, mixed_plan, data_sets, expected):
    for step, batch in batches(mixed_plan, data_sets, row_sharding(make_mesh(*shape)), start=0, stop=4):
        assert type(batch) is MixedBatch
        assert_holds(batch, expected.fields(step))
        assert step.tokens == sum(int((rows.segment_ids > 0).sum()) for rows in batch[:2])
        assert step.computed_tokens == sum(rows.segment_ids.size for rows in batch[:2])
        for device, (part, shard) in enumerate(zip(step.parts, batch.is_ir.addressable_shards, strict=True)):
            assert part.examples.size == 2
            assert shard.index == (slice(2 * device, 2 * device + 2),)
            assert np.asarray(shard.data).tolist() == [data_sets[part.source].task == "ir"] * 2


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


def test_padded_rows():
    texts = [Tokens(np.array([7, 8, 9], np.int32), 1), None, Tokens(np.array([5], np.int32), 0)]
    rows = padded_rows(texts, 4)
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
def test_own_slices_are_those_of_the_devices(hosts, shape):
    mesh = make_mesh(*shape)
    sharding = row_sharding(mesh)
    devices = list(mesh.devices.flat)
    per_shard = 16 // (shape[0] * shape[1])
    for own in HOSTS[hosts]:
        slices = own_slices(OwnDevices(sharding, [devices[i] for i in own]), 16)
        # The tensor axis is the innermost, and holds the same rows on all of its devices.
        shards = sorted({i // shape[2] for i in own})
        assert slices == [(shard * per_shard, (shard + 1) * per_shard) for shard in shards]


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
    arrays: list[dict[jax.Device, np.ndarray]] = []

    def fake(shape, layout, callback):
        indices = layout.addressable_devices_indices_map(shape)
        arrays.append({device: np.asarray(callback(index)) for device, index in indices.items()})
        return shape

    monkeypatch.setattr(jax, "make_array_from_callback", fake)
    for number in range(4):
        step = plan.step(number)
        whole = StepSource(plan, data_sets, sharding, STEPS)[number][1]
        dealt = [(data_sets[part.source].task, i) for part in step.parts for i in part.examples.tolist()]
        size = len(dealt) // 8
        seen: list[tuple[str, int]] = []
        for own in HOSTS[hosts]:
            layout = OwnDevices(sharding, [mesh.devices.flat[i] for i in own])
            source = StepSource(plan, data_sets, layout, STEPS)
            read.clear()
            assert len(source) == STEPS
            host_plan, local = source[number]
            for one, other in zip(host_plan.parts, step.parts, strict=True):
                assert (one.source, one.examples.tolist()) == (other.source, other.examples.tolist())
            assert read == [example for i in sorted(own) for example in dealt[i * size : (i + 1) * size]]
            seen += read
            for part, leaf in zip(jax.tree.leaves(local), jax.tree.leaves(whole), strict=True):
                arrays.clear()
                assert to_global(part, layout, len(dealt)) == leaf.shape
                for i in own:
                    block = leaf.shape[0] // 8
                    np.testing.assert_array_equal(arrays[0][mesh.devices.flat[i]], leaf[i * block : (i + 1) * block])
        assert sorted(seen) == sorted(dealt)
        assert_holds(whole, expected.fields(step))


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("per_example", [1, 5])
def test_to_global_keeps_the_rows_of_an_example_together(shape, per_example):
    sharding = row_sharding(make_mesh(*shape))
    local = np.arange(8 * per_example * 3).reshape(8 * per_example, 3)
    array = to_global(local, sharding, 8)
    np.testing.assert_array_equal(array, local)
    assert array.sharding == sharding
    vector = to_global(local[:, 0], sharding, 8)
    np.testing.assert_array_equal(vector, local[:, 0])
