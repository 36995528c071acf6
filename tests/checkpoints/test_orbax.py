"""Tests of single Orbax checkpoints: their layout on disk, memory use, and errors for damaged ones."""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

from codiemb_jax.checkpoints.model import PretrainedModel, open_model
from codiemb_jax.checkpoints.orbax import OrbaxCheckpoint, save_model
from codiemb_jax.checkpoints.safetensors import LazyArray
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from scripts.make_random_checkpoint import write_random_checkpoint

WIDE = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 4096,
    "torch_dtype": "float32",
}  # fmt: skip


def bytes_read() -> int:
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def open_array(item: Path, name: str) -> tensorstore.TensorStore:
    """Opens an array on disk."""
    store = {"driver": "ocdbt", "base": f"file://{item}", "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}).result()


def test_device_reads_little_more_than_its_own_shard(tmp_path):
    prime = {"vocab_size": 4093, "num_hidden_layers": 8}
    write_random_checkpoint("youtu_embedding", tmp_path / "model", **WIDE | prime)
    hf_to_orbax(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "orbax")])
    for name, shape in {"layers.up": (8, 1024, 2048), "embedding": (4093, 1024)}.items():
        array = open_array(tmp_path / "orbax" / "params", name)
        assert array.shape == shape
        before = bytes_read()
        array[..., 128:256, :].read().result() if len(shape) == 3 else array[:, 128:256].read().result()
        eighth = bytes_read() - before
        assert 0.1 < eighth / (4 * np.prod(shape)) < 0.14, name


def test_conversion_keeps_few_weights_in_memory(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    peak = 0
    original = LazyArray.__array__

    def read(self: LazyArray, *arguments, **options) -> np.ndarray:
        nonlocal peak
        value = original(self, *arguments, **options)
        alive.append(weakref.ref(value))
        peak = max(peak, sum(array.nbytes for ref in alive if (array := ref()) is not None))
        return value

    monkeypatch.setattr(LazyArray, "__array__", read)
    write_random_checkpoint("youtu_embedding", tmp_path / "model", **WIDE | {"num_hidden_layers": 6})
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    largest = 6 * 1024 * 2048 * 4  # an MLP weight, stacked over layers
    peak = 0
    hf_to_orbax(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "orbax")])
    assert largest <= peak <= 2 * largest < 0.3 * size
    peak = 0
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export")])
    assert largest <= peak <= 2.5 * largest < 0.4 * size  # the embeddings are buffered until their shard is written


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(
        "bge_large_zh", folder / "model", **WIDE | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 2000}
    )
    hf_to_orbax(["--model", str(folder / "model"), "--output", str(folder / "orbax")])
    return folder


@pytest.mark.parametrize("part", ["params", "blueprint"])
def test_truncated_checkpoint_raises_user_error(part, tiny, tmp_path):
    folder = tmp_path / "orbax"
    shutil.copytree(tiny / "orbax", folder)
    for path in (folder / part).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{folder}.*: the checkpoint cannot be read"):
        open_with_defaults(folder).load()
    with pytest.raises(UserError, match=f"{folder}.*: the checkpoint cannot be read"):
        export(folder, tmp_path / "export")
    assert not list(tmp_path.glob("*export*"))


def export(checkpoint: Path, output: Path) -> None:
    orbax_to_hf(["--checkpoint", str(checkpoint), "--output", str(output)])


def open_with_defaults(folder: Path, mesh: MeshSettings | None = None) -> PretrainedModel:
    return open_model(ModelSettings(path=str(folder)), PromptSettings(), make_mesh(mesh or MeshSettings()))


@pytest.fixture(scope="module")
def with_pooler(tiny, tmp_path_factory):
    """A model with a passthrough weight, and its checkpoint."""
    folder = tmp_path_factory.mktemp("with_pooler")
    shutil.copytree(tiny / "model", folder / "model")
    path = folder / "model" / "model.safetensors"
    save_file(load_file(path) | {"pooler.dense.weight": np.ones((64, 64), np.float32)}, path)
    hf_to_orbax(["--model", str(folder / "model"), "--output", str(folder / "orbax")])
    return folder


def test_checkpoint_with_a_missing_weight_raises_user_error(with_pooler, tmp_path):
    model = open_with_defaults(with_pooler / "model")
    save_model(tmp_path / "orbax", model.stream(), {}, model.blueprint)
    with pytest.raises(UserError, match=r"the checkpoint is inconsistent:\n  pooler\.dense\.weight: missing"):
        export(tmp_path / "orbax", tmp_path / "export")
    shutil.copytree(with_pooler / "orbax", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "passthrough")
    with pytest.raises(UserError, match=f"{tmp_path}/other/passthrough: the checkpoint cannot be read"):
        export(tmp_path / "other", tmp_path / "export")
    assert not list(tmp_path.glob("*export*"))


@pytest.mark.parametrize(
    ("item", "name", "index"),
    [
        ("params", "embedding", (1999, 63)),
        ("params", "norm_bias", (5,)),
        ("passthrough", "pooler.dense.weight", (0, 0)),
    ],
)
def test_changed_value_raises_user_error(item, name, index, with_pooler, tmp_path):
    folder = tmp_path / "orbax"
    shutil.copytree(with_pooler / "orbax", folder)
    array = open_array(folder / item, name)
    array[index] = np.nextafter(array[index].read().result(), np.float32(9))
    message = f"{folder}: the checkpoint is damaged: {item}: {name} does not match its checksum"
    if item == "params":
        with pytest.raises(UserError, match=message):
            open_with_defaults(folder, MeshSettings(fsdp=4, tensor=2)).load()
    with pytest.raises(UserError, match=message):
        export(folder, tmp_path / "export")
    assert not list(tmp_path.glob("*export*"))


def change_manifest(folder: Path, change: Callable[[dict], Any]) -> None:
    """Rewrites the manifest without updating its digest."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        manifest = change(checkpointer.restore(folder / "blueprint"))
        checkpointer.save(folder / "blueprint", args=ocp.args.JsonSave(manifest), force=True)


def test_changed_blueprint_raises_user_error(tiny, tmp_path):
    folder = tmp_path / "orbax"
    shutil.copytree(tiny / "orbax", folder)
    change_manifest(folder, lambda manifest: manifest)
    assert OrbaxCheckpoint(folder).max_tokens == 512
    change_manifest(folder, lambda manifest: manifest | {"blueprint": manifest["blueprint"] | {"max_tokens": 511}})
    with pytest.raises(UserError, match=f"{folder}: the checkpoint is damaged: the manifest does not match its digest"):
        OrbaxCheckpoint(folder)


@pytest.mark.parametrize("part", ["params", "blueprint", "_CHECKPOINT_METADATA"])
def test_incomplete_checkpoint_raises_user_error(part, tiny, tmp_path):
    folder = tmp_path / "orbax"
    shutil.copytree(tiny / "orbax", folder)
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=rf"{folder} is not a checkpoint \({part} missing\)"):
        export(folder, tmp_path / "export")
    with pytest.raises(UserError, match=f"{folder}: config.json is missing"):
        open_with_defaults(folder)


class OldBlueprint:
    def model_dump(self, mode: str) -> dict:
        return {"version": 1, "config": {}, "attention": "causal"}


def test_checkpoint_of_another_version_raises_user_error(tmp_path):
    weight = LazyArray((2,), np.float32, lambda: np.ones(2, np.float32))
    save_model(tmp_path / "orbax", {"norm": weight}, {}, OldBlueprint())
    with pytest.raises(UserError, match=f"{tmp_path}/orbax: was written by another version of codiemb_jax"):
        OrbaxCheckpoint(tmp_path / "orbax")
    change_manifest(tmp_path / "orbax", lambda manifest: {"config": {}, "attention": "causal"})  # not a manifest
    with pytest.raises(UserError, match=f"{tmp_path}/orbax: was written by another version of codiemb_jax"):
        OrbaxCheckpoint(tmp_path / "orbax")


def test_failed_save_leaves_no_files(tiny, tmp_path):
    model = open_with_defaults(tiny / "model")

    def fail() -> np.ndarray:
        raise UserError("unreadable")

    params = model.stream() | {"norm": LazyArray((64,), np.float32, fail)}
    with pytest.raises(UserError, match="unreadable"):
        save_model(tmp_path / "orbax", params, {}, model.blueprint)
    assert list(tmp_path.iterdir()) == []
