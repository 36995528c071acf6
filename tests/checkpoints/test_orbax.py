"""What a checkpoint holds and how it lies on disk; what is said of one that cannot be read."""

import shutil
import weakref

import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.checkpoints.safetensors import LazyArray
from codiemb_jax.checkpoints.orbax import restore_blueprint, save_model
from codiemb_jax.sharding import make_mesh
from codiemb_jax.checkpoints.model import open_model
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from scripts.make_random_checkpoint import make

WIDE = {
    "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 4096,
    "torch_dtype": "float32",
}  # fmt: skip


def bytes_read() -> int:
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_one_device_of_a_mesh_reads_little_more_than_its_own_part(tmp_path):
    prime = {"vocab_size": 4093, "num_hidden_layers": 8}
    make("youtu_embedding", tmp_path / "model", **WIDE | prime)
    hf_to_orbax(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "orbax")])
    for name, shape in {"layers.up": (8, 1024, 2048), "embedding": (4093, 1024)}.items():
        store = {"driver": "ocdbt", "base": f"file://{tmp_path / 'orbax' / 'params'}", "path": f"{name}/"}
        array = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
        assert array.shape == shape
        before = bytes_read()
        array[..., 128:256, :].read().result() if len(shape) == 3 else array[:, 128:256].read().result()
        eighth = bytes_read() - before
        assert 0.1 < eighth / (4 * np.prod(shape)) < 0.14, name


def test_a_conversion_holds_few_weights_at_a_time(tmp_path, monkeypatch):
    alive: list[weakref.ref] = []
    most = 0
    original = LazyArray.__array__

    def read(self: LazyArray, *arguments, **options) -> np.ndarray:
        nonlocal most
        value = original(self, *arguments, **options)
        alive.append(weakref.ref(value))
        most = max(most, sum(array.nbytes for ref in alive if (array := ref()) is not None))
        return value

    monkeypatch.setattr(LazyArray, "__array__", read)
    make("youtu_embedding", tmp_path / "model", **WIDE | {"num_hidden_layers": 6})
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    largest = 6 * 1024 * 2048 * 4  # the layers' MLP
    most = 0
    hf_to_orbax(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "orbax")])
    assert largest <= most <= 2 * largest < 0.3 * size
    most = 0
    orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export")])
    assert largest <= most <= 2.5 * largest < 0.4 * size  # the embeddings wait in the export's file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make("bge_large_zh", folder / "model", **WIDE | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 2000})
    hf_to_orbax(["--model", str(folder / "model"), "--output", str(folder / "orbax")])
    return folder


@pytest.mark.parametrize("part", ["params", "blueprint"])
def test_a_damaged_checkpoint_is_told(part, tiny, tmp_path):
    folder = tmp_path / "orbax"
    shutil.copytree(tiny / "orbax", folder)
    for path in (folder / part).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{folder}.*: the checkpoint cannot be read"):
        open_model(ModelSettings(path=str(folder)), PromptSettings(), make_mesh(MeshSettings())).load()
    with pytest.raises(UserError, match=f"{folder}.*: the checkpoint cannot be read"):
        orbax_to_hf(["--checkpoint", str(folder), "--output", str(tmp_path / "export")])
    assert not list(tmp_path.glob("export*"))


def test_a_checkpoint_that_lacks_a_weight_of_the_model_is_told(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"pooler.dense.weight": np.ones((64, 64), np.float32)}, path)
    hf_to_orbax(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "orbax")])
    shutil.rmtree(tmp_path / "orbax" / "passthrough")
    with pytest.raises(UserError, match="the checkpoint is not whole, it lacks pooler.dense.weight"):
        orbax_to_hf(["--checkpoint", str(tmp_path / "orbax"), "--output", str(tmp_path / "export")])
    assert not list(tmp_path.glob("export*"))


class OfAnotherVersion:
    def to_json(self) -> dict:
        return {"config": {}, "attention": "causal"}


def test_a_checkpoint_of_another_version_is_told(tmp_path):
    weight = LazyArray((2,), np.float32, lambda: np.ones(2, np.float32))
    save_model(tmp_path / "orbax", {"norm": weight}, {}, OfAnotherVersion())
    with pytest.raises(UserError, match=f"{tmp_path}/orbax: was written by another version of codiemb_jax"):
        restore_blueprint(tmp_path / "orbax")
