"""Broken inputs of every kind: each is read as if it were intact, or refused with a `UserError` that names it.

Any other exception fails these tests, and so does a hang (the timeout) or a file that appears anywhere.
"""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint
from codiemb_jax.checkpoints.run_checkpoints import RunCheckpoints, restore_run, saved_steps
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.config_file import load_settings
from codiemb_jax.data.index import INDEX
from codiemb_jax.data.prepare import prepare
from codiemb_jax.data.store import PreparedDataset
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import read_records
from scripts.make_random_checkpoint import write_random_checkpoint
from tests.checkpoints.test_hostile import TINY
from tests.helpers import golden_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(),
    st.sampled_from([
        "", "ir", "sts", "../../escaped", "/tmp/escaped", "\0", "\ud800", "a" * 300, "!!python/object:os.system", "F32",
        "1e400", "nan", "日本",
    ]),
    st.text(max_size=8),
)  # fmt: skip
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def broken_json(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value in which one to three fields have other values, are missing, or have other names."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        parent, node = None, value
        while isinstance(node, dict | list) and node and draw(st.integers(0, 4)):
            keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, draw(st.sampled_from(keys))
            node = parent[key]
        if parent is None:
            return draw(JSON)
        match draw(st.sampled_from(["replace", "replace", "delete", "add"])):
            case "replace":
                parent[key] = draw(JSON)
            case "delete":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = draw(JSON)
            case "add":
                parent.append(draw(JSON))
    return value


@st.composite
def broken_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A copy of a file with one to three changes: flipped bits, cut off, pieces repeated, removed or inserted."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        size = draw(st.integers(0, 16))
        match draw(st.sampled_from(["flip", "flip", "cut", "remove", "repeat", "insert"])):
            case "flip" if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[at:]
            case "remove":
                del content[at : at + size]
            case "repeat":
                content[at:at] = content[at : at + size]
            case _:
                content[at:at] = draw(st.binary(max_size=16))
    return bytes(content)


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def check(folder: Path, read: Any) -> bool:
    """Reads a broken input; returns whether it was refused. Nothing in `folder` may be added or removed."""
    before = sorted(path for path in folder.rglob("*"))
    try:
        read()
        refused = False
    except UserError as error:
        assert str(error).strip()
        refused = True
    assert sorted(path for path in folder.rglob("*")) == before
    assert not Path("/tmp/escaped").exists()
    return refused


@pytest.mark.parametrize(("task", "name"), [("ir", "news"), ("sts", "questions")])
def test_data_files(task, name, golden, tmp_path):
    """1,000 broken .json and .jsonl files of each task."""
    lines = (golden / "data" / f"{name}.jsonl").read_text().splitlines()[:3]
    records = [json.loads(line) for line in lines]
    refused = []

    @settings(max_examples=1000)
    @given(st.data(), st.sampled_from([".json", ".jsonl"]), st.booleans())
    def test(data, suffix, structured):
        if structured:
            broken = [data.draw(broken_json(record)) for record in records]
            content = dump(broken) if suffix == ".json" else b"\n".join(map(dump, broken))
        else:
            valid = dump(records) if suffix == ".json" else b"\n".join(map(dump, records))
            content = data.draw(broken_bytes(valid))
        path = tmp_path / f"data{suffix}"
        path.write_bytes(content)
        refused.append(check(tmp_path, lambda: list(read_records(path, task))))

    test()
    assert len(refused) >= 1000
    assert 0.5 < np.mean(refused) < 1


def test_settings_files(golden, tmp_path):
    """1,000 broken YAML files."""
    valid = golden_settings(golden, tmp_path / "run", data={"ir": ["a.jsonl"]}, mesh={"data": 2})
    text = yaml.safe_dump(valid).encode()
    path = tmp_path / "settings.yaml"
    refused = []

    @settings(max_examples=1000)
    @given(st.data(), st.booleans())
    def test(data, structured):
        path.write_bytes(dump(data.draw(broken_json(valid))) if structured else data.draw(broken_bytes(text)))
        refused.append(check(tmp_path, lambda: load_settings(path)))

    test()
    assert len(refused) >= 1000
    assert 0.5 < np.mean(refused) < 1


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    write_random_checkpoint("bge_large_zh", folder, **TINY)
    return folder


def open_and_load(folder: Path) -> Any:
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    model_settings = ModelSettings(path=str(folder), compute_dtype="float32")
    with jax.set_mesh(mesh):
        return open_model(model_settings, PromptSettings(), mesh).load()


def test_weight_files(model, tmp_path):
    """1,000 broken safetensors headers and 500 broken config.json."""
    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    config = json.loads((folder / "config.json").read_text())
    refused = []

    @settings(max_examples=1000)
    @given(st.data(), st.booleans())
    def test_header(data, structured):
        if structured:
            broken = dump(data.draw(broken_json(header)))
            weights.write_bytes(len(broken).to_bytes(8, "little") + broken + body)
        else:
            weights.write_bytes(data.draw(broken_bytes(content[: 8 + size])) + body)
        refused.append(check(tmp_path, lambda: open_and_load(folder)))

    @settings(max_examples=500)
    @given(st.data())
    def test_config(data):
        (folder / "config.json").write_bytes(dump(data.draw(broken_json(config))))
        refused.append(check(tmp_path, lambda: open_and_load(folder)))

    test_header()
    weights.write_bytes(content)
    test_config()
    assert len(refused) >= 1500
    assert 0.5 < np.mean(refused) < 1


def test_prepared_datasets(golden, tokenizer, tmp_path):
    """1,000 broken files of a prepared dataset: index, manifest and records. What is read must be what was written."""
    source = golden / "data" / "news.jsonl"
    prepared = prepare(
        source, "ir", PromptTokenizer(tokenizer, PromptSettings()), query_max_tokens=64, passage_max_tokens=64,
        cache=tmp_path / "cache",
    )  # fmt: skip
    files = sorted(path for path in prepared.folder.rglob("*") if path.is_file())
    assert any(path.parent.name == INDEX for path in files)
    examples = np.arange(len(prepared))

    def content(data: PreparedDataset) -> list[bytes]:
        texts, queries = data.read(examples)
        arrays = [*texts, queries, *data.index.counts(examples), *data.index.positive_hashes(examples)]
        return [array.tobytes() for array in arrays]

    expected = content(prepared)
    refused = []

    def read() -> None:
        assert content(PreparedDataset(source, "ir", prepared.folder)) == expected

    @settings(max_examples=1000)
    @given(st.data(), st.sampled_from(files))
    def test(data, path):
        valid = path.read_bytes()
        structured = path.suffix == ".json" and data.draw(st.booleans())
        broken = dump(data.draw(broken_json(json.loads(valid)))) if structured else data.draw(broken_bytes(valid))
        path.write_bytes(broken)
        try:
            refused.append(check(tmp_path, read))
        finally:
            path.write_bytes(valid)

    test()
    assert len(refused) >= 1000
    assert 0.5 < np.mean(refused) < 1


# Reads that Orbax has not begun yet when another one fails are never awaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning")
def test_checkpoints(model, tmp_path):
    """500 broken files of a checkpoint. What is read must be bitwise what was saved."""
    opened = open_model(
        ModelSettings(path=str(model), compute_dtype="float32"),
        PromptSettings(),
        make_mesh(MeshSettings(), jax.devices()[:1]),
    )
    params = opened.load()
    state = {"moments": jax.tree.map(lambda leaf: leaf * 2 + 1, params)}
    run = tmp_path / "run"
    checkpoints = RunCheckpoints(run, keep=3)
    checkpoints.save(5, params, state, {}, opened.blueprint)
    checkpoints.close()
    assert saved_steps(run) == [5]
    layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    expected = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((params, state))]
    files = sorted(path for path in (run / "5").rglob("*") if path.is_file())
    refused = []

    def read() -> None:
        OrbaxCheckpoint(run / "5")
        restored = restore_run(run, 5, opened.abstract, layout)
        assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(restored)] == expected

    @settings(max_examples=500)
    @given(st.data(), st.sampled_from(files))
    def test(data, path):
        valid = path.read_bytes()
        path.write_bytes(data.draw(broken_bytes(valid)))
        try:
            refused.append(check(tmp_path, read))
        finally:
            path.write_bytes(valid)

    test()
    gc.collect()
    assert len(refused) >= 500
    assert 0.2 < np.mean(refused) < 1
