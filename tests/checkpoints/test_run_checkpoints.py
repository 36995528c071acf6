"""Tests of the checkpoints of a run: they are saved while training continues, and only its own are deleted."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from codiemb_jax.checkpoints import run_checkpoints
from codiemb_jax.checkpoints.model import PretrainedModel, open_model
from codiemb_jax.checkpoints.orbax import is_checkpoint
from codiemb_jax.checkpoints.run_checkpoints import RunCheckpoints, restore_run, saved_steps
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from scripts.make_random_checkpoint import write_random_checkpoint

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 4096}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PretrainedModel:
    folder = tmp_path_factory.mktemp("model")
    write_random_checkpoint("youtu_embedding", folder / "model", **SIZES, torch_dtype="float32")
    settings = ModelSettings(path=str(folder / "model"), compute_dtype="float32")
    return open_model(settings, PromptSettings(), make_mesh(MeshSettings(), jax.devices()[:1]))


def test_checkpoint_is_complete_until_it_is_deleted(model, tmp_path, monkeypatch):
    """A run may be killed at any time, also while it deletes an old checkpoint."""
    params, folder = model.load(), tmp_path / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before anything is deleted
        checkpoints = RunCheckpoints(folder, keep=2)
        for step in (1, 2, 3):
            checkpoints.save(step, params, {"count": jax.numpy.int32(step)}, {}, model.blueprint)
        checkpoints.close()
    assert saved_steps(folder) == [2, 3]
    assert [path.name for path in folder.glob(".1.*.deleted")]
    RunCheckpoints(folder, keep=1).close()
    assert [path.name for path in folder.iterdir()] == ["3"]
    assert is_checkpoint(folder / "3")


def test_state_may_be_donated_while_it_is_saved(model, tmp_path):
    """`save` returns before checksums are known and files are written, and the next step reuses the memory."""
    params, folder = model.load(), tmp_path / "checkpoints"
    expected = jax.tree.map(np.array, params)
    checkpoints = RunCheckpoints(folder, keep=1)
    checkpoints.save(1, params, {"count": jax.numpy.int32(1)}, {}, model.blueprint)
    changed = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(params)
    jax.block_until_ready(changed)
    jax.tree.map(lambda leaf: leaf.delete(), params)  # JAX does not donate arrays that a CPU is still reading
    checkpoints.close()
    layout = {"count": jax.ShapeDtypeStruct((), np.int32, sharding=changed["norm"].sharding)}
    restored, optimizer = restore_run(folder, 1, model.abstract, layout)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert int(optimizer["count"]) == 1


def test_only_checkpoints_of_the_run_are_deleted(model, tmp_path):
    """Users put other folders and files into the folder of checkpoints while a run saves there."""
    params, folder = model.load(), tmp_path / "checkpoints"
    checkpoints = RunCheckpoints(folder, keep=1)
    for name in ("1", "2024", "007", "٣"):  # the last one is a decimal digit, too
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    (folder / "5").write_text("mine")
    (folder / ".10.0123abcd.deleted").symlink_to(tmp_path)
    for step in (10, 20, 30):
        checkpoints.save(step, params, {"count": jax.numpy.int32(step)}, {}, model.blueprint)
    checkpoints.close()
    names = {".10.0123abcd.deleted", "1", "2024", "007", "٣", "5", "30"}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name / "notes.txt").read_text() == "mine" for name in ("1", "2024", "007", "٣"))
    assert saved_steps(folder) == [1, 30, 2024]


def test_checkpoint_that_cannot_be_deleted_stays(model, tmp_path, monkeypatch):
    params, folder = model.load(), tmp_path / "checkpoints"
    checkpoints = RunCheckpoints(folder, keep=1)
    checkpoints.save(1, params, {"count": jax.numpy.int32(1)}, {}, model.blueprint)
    checkpoints.save(2, params, {"count": jax.numpy.int32(2)}, {}, model.blueprint)

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "rename", refuse)
    checkpoints.close()
    assert saved_steps(folder) == [1, 2]


def test_failed_save_deletes_nothing(model, tmp_path, monkeypatch):
    """The disk is full: the best checkpoint and the newest stay, although a better one was about to come."""
    params, folder = model.load(), tmp_path / "checkpoints"
    checkpoints = RunCheckpoints(folder, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, params, {"count": jax.numpy.int32(step)}, {}, model.blueprint)
        checkpoints.best = 1

    async def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run_checkpoints._ManifestHandler, "_save_fn", fail)
    checkpoints.save(4, params, {"count": jax.numpy.int32(4)}, {}, model.blueprint)
    checkpoints.best = 4
    with pytest.raises(UserError, match="the checkpoint cannot be written"):
        checkpoints.save(5, params, {"count": jax.numpy.int32(5)}, {}, model.blueprint)
    checkpoints.close()
    assert saved_steps(folder) == [1, 3]
