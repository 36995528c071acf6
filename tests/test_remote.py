"""Tests remote files and folders against an emulator of Google Cloud Storage."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from base64 import b64encode
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from etils import epath
from gcsfs import GCSFileSystem

from codiemb_jax.cache import cache_folder, remote_cache
from codiemb_jax.checkpoints.model import resolve_model_path
from codiemb_jax.checkpoints.orbax import is_checkpoint, missing_items
from codiemb_jax.checkpoints.run_checkpoints import saved_steps
from codiemb_jax.data.find import dataset_names, find_files
from codiemb_jax.data.prepare import prepare
from codiemb_jax.errors import UserError
from codiemb_jax.remote import fetch_file, list_files, list_names, original, remote_path, upload, upload_folder
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.training.monitor import publish_after_failure
from codiemb_jax.training.remote_folder import open_run_folder
from codiemb_jax.training.run import check_cache
from convert.hf_to_orbax import main as hf_to_orbax
from tests import test_distributed
from tests.data.test_prepare import LIMITS, PROMPT, write_ir
from tests.helpers import load_weights
from tests.processes import Processes
from tests.storage_emulator import Object, StorageEmulator
from tests.training.test_resume import SETTINGS, STEPS, read_metrics

BUCKET = epath.Path("gs://bucket")


@pytest.fixture
def storage(monkeypatch):
    with StorageEmulator() as emulator:
        for name, value in emulator.environment.items():
            monkeypatch.setenv(name, value)
        GCSFileSystem.clear_instance_cache()  # they remember the address of another emulator
        yield emulator


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("gs://", "is not a valid address; expected gs://bucket/folder"),
        ("gs://Bucket/run", "is not a valid address"),
        ("gs://bucket/../run", "folders must have names"),
        ("gs://bucket//run", "folders must have names"),
        ("gs://bucket/run*", "without any of"),
        ("gs://bucket/run#1", "without any of"),
    ],
)
def test_invalid_address_raises_value_error(address, problem):
    with pytest.raises(ValueError, match=problem):
        remote_path(address)


@pytest.mark.parametrize("address", ["gs://bucket", "gs://bucket/", "gs://my.bucket_1/runs/a b/c.jsonl"])
def test_valid_address(address):
    assert str(remote_path(address)) == address.rstrip("/")


def test_data_files_are_copied_once_per_version(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path))
    for name in ("a.json", "deep/b.jsonl", "c.txt"):
        storage.put(f"folder/{name}", name.encode())
    storage.put("folder-2/d.json", b"another folder")
    first = find_files([BUCKET / "folder"], "data.ir")
    assert [original(path, tmp_path) for path in first] == [BUCKET / "folder/a.json", BUCKET / "folder/deep/b.jsonl"]
    assert [path.read_text() for path in first] == ["a.json", "deep/b.jsonl"]
    downloads = []
    storage.fault = lambda command, address: downloads.append(address) if "alt=media" in address else 0
    assert find_files([BUCKET / "folder"], "data.ir") == first
    assert downloads == []
    storage.put("folder/a.json", b"A.json")  # of the same length, and in the same second
    del storage.objects["folder/deep/b.jsonl"]
    (second,) = find_files([BUCKET / "folder"], "data.ir")
    assert second.read_text() == "A.json"
    assert [path.read_text() for path in first] == ["a.json", "deep/b.jsonl"]  # somebody may be reading them
    assert find_files([BUCKET / "folder" / "a.json"], "data.ir") == [second]
    assert original(Path("/data/a.json"), tmp_path) == Path("/data/a.json")
    assert not os.access(second, os.W_OK) or os.geteuid() == 0
    assert second.stat().st_mode & 0o222 == 0


def test_names_and_order_of_remote_files_do_not_depend_on_the_cache(storage, tmp_path, monkeypatch):
    for name in ("z/train.jsonl", "a/train.jsonl"):
        storage.put(name, name.encode())
    found = []
    for cache in ("first", "second"):
        monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / cache))
        files = find_files([BUCKET / "z", BUCKET / "a"], "data.ir")
        found.append((dataset_names(files), [path.read_text() for path in files]))
    names = ["gs://bucket/a/train.jsonl", "gs://bucket/z/train.jsonl"]
    assert found == [(names, ["a/train.jsonl", "z/train.jsonl"])] * 2


@pytest.mark.parametrize("name", ["../outside.json", "x/../../outside.json", "x\\..\\y.json"])
def test_names_that_lead_out_of_a_folder_are_refused(name, storage, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    storage.put("folder/a.json", b"{}")
    storage.put(f"folder/{name}", b"{}")
    with pytest.raises(UserError, match="gs://bucket/folder: contains a file with an invalid name"):
        find_files([BUCKET / "folder"], "data.ir")
    assert not list(tmp_path.rglob("*outside*")) and not list(tmp_path.rglob("*y.json"))


@pytest.mark.parametrize("status", [400, 403])
def test_refused_listing_raises_user_error(status, storage):
    storage.put("folder/a.json", b"{}")
    storage.fault = lambda command, address: status if address.startswith("/storage/v1/b/bucket/o?") else 0
    for read in (list_files, list_names, saved_steps, missing_items):
        with pytest.raises(UserError, match="gs://bucket/folder: cannot be read or written: "):
            read(BUCKET / "folder")


def test_file_that_changes_while_it_is_read_raises_user_error(storage, tmp_path):
    storage.put("a.bin", b"a" * 2**20)

    def replace(command: str, address: str) -> int:
        if "alt=media" in address:
            storage.put("a.bin", b"b" * 2**20)
        return 0

    storage.fault = replace
    with pytest.raises(UserError, match="gs://bucket/a.bin: changed while it was read; run again"):
        fetch_file(BUCKET / "a.bin", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.suffix != ".lock"] == [tmp_path / "remote"]


def test_interrupted_upload_leaves_the_old_file(storage, tmp_path):
    storage.put("metrics.jsonl", b"old")
    (tmp_path / "metrics.jsonl").write_bytes(b"x" * 60_000_000)  # in several requests
    requests = []

    def refuse_second(command: str, address: str) -> int:
        if "upload_id" in address:
            requests.append(address)
        return 400 if len(requests) > 1 else 0

    storage.fault = refuse_second
    with pytest.raises(UserError, match="gs://bucket/metrics.jsonl: cannot be read or written"):
        upload(tmp_path / "metrics.jsonl", BUCKET / "metrics.jsonl")
    assert storage.objects["metrics.jsonl"].content == b"old"
    storage.fault = lambda command, address: 0
    upload(tmp_path / "metrics.jsonl", BUCKET / "metrics.jsonl")
    assert storage.objects["metrics.jsonl"].content == b"x" * 60_000_000


def test_run_folder_ignores_what_stands_for_a_folder_and_notices_other_files(storage, tmp_path):
    storage.put("run/", b"")  # the Cloud Console makes these
    folder = open_run_folder(BUCKET / "run", tmp_path)
    folder.check_location({})
    storage.put("run/tensorboard/plugins/x.pb", b"")
    storage.put("run/export/model.safetensors", b"")
    with pytest.raises(UserError, match=re.escape("gs://bucket/run contains other files (export, tensorboard)")):
        folder.check_location({})
    with pytest.raises(UserError, match="output_dir: gs://bucket/run overlaps with data.ir gs://bucket/run/data"):
        folder.check_location({"data.ir": [BUCKET / "run" / "data"]})


def test_run_that_starts_elsewhere_stops_the_earlier_one(storage, tmp_path):
    folders = [open_run_folder(BUCKET / "run", tmp_path / cache) for cache in ("first", "second")]
    with folders[0].locked(), folders[1].locked():
        for folder in folders:
            folder.metrics.write_text(f"{folder.token}\n")
            folder.tensorboard.mkdir()
        folders[1].publish_logs()
        folders[1].write_before({"a": 1.0})
        for publish in (folders[0].publish_logs, lambda: folders[0].write_before({"a": 2.0})):
            with pytest.raises(UserError, match="another run has started in gs://bucket/run; this one stops"):
                publish()
    assert storage.objects["run/metrics.jsonl"].content.decode() == f"{folders[1].token}\n"
    assert json.loads(storage.objects["run/evaluation.json"].content) == {"before": {"a": 1.0}}
    assert not folders[1].path.exists()


def test_run_that_was_saved_since_the_folder_was_opened_is_not_continued(storage, tmp_path):
    folder = open_run_folder(BUCKET / "run", tmp_path)
    storage.put("run/checkpoints/4/_CHECKPOINT_METADATA", b"")
    storage.put("run/checkpoints/4/commit_success.txt", b"")
    with pytest.raises(UserError, match="another run has written to gs://bucket/run; run the same"), folder.locked():
        pass
    assert ".owner" not in " ".join(storage.names())


def test_last_file_of_a_checkpoint_alone_is_no_checkpoint(storage):
    for name in ("4/_CHECKPOINT_METADATA", "4/commit_success.txt", "6/commit_success.txt", "8/params/x"):
        storage.put(f"run/checkpoints/{name}", b"")
    assert saved_steps(BUCKET / "run" / "checkpoints") == [4]


def test_metrics_since_the_last_checkpoint_are_published_after_a_failure(storage, tmp_path):
    folder = open_run_folder(BUCKET / "run", tmp_path)
    with pytest.raises(ZeroDivisionError), folder.locked(), ExitStack() as stack:
        stack.push(partial(publish_after_failure, folder))
        folder.tensorboard.mkdir()
        folder.metrics.write_text("a line\n")
        raise ZeroDivisionError
    assert storage.objects["run/metrics.jsonl"].content == b"a line\n"


def test_messages_have_the_addresses_of_remote_files(storage, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path))
    storage.put("data/a.jsonl", b"{}\n")
    (path,) = find_files([BUCKET / "data"], "data.ir")
    with pytest.raises(UserError, match="^invalid ir data:\n  gs://bucket/data/a.jsonl:1: "):
        prepare(path, "ir", PromptTokenizer(tokenizer, PROMPT), cache=tmp_path, **LIMITS)
    storage.put("run/inputs.json", b"{}")
    storage.put("run/config.yaml", b"{}")
    storage.put("run/evaluation.json", b"[]")
    folder = open_run_folder(BUCKET / "run", tmp_path)
    with pytest.raises(UserError, match="gs://bucket/run/inputs.json is not from a run of this version"):
        folder.check_location({})
    with pytest.raises(UserError, match="^gs://bucket/run/evaluation.json: expected a JSON object"):
        folder._read_before()


@pytest.mark.parametrize("again", ["data/deep", "data/deep/b.jsonl"])
def test_file_that_is_listed_twice_is_refused(again, storage, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path))
    storage.put("data/deep/b.jsonl", b"{}")
    name = "gs://bucket/data/deep/b.jsonl"
    with pytest.raises(UserError, match=f"{name} and {name}: the same file is listed 2 times"):
        find_files([BUCKET / "data", BUCKET / again], "data.ir")


def test_copy_that_was_interrupted_is_started_again(storage, tmp_path):
    storage.put("data/a.jsonl", b"content")
    path = fetch_file(BUCKET / "data" / "a.jsonl", tmp_path)
    copy = tmp_path / "remote" / path.relative_to(tmp_path / "remote").parts[0]
    copy.rename(copy.with_name(f".{copy.name}.unfinished"))
    assert fetch_file(BUCKET / "data" / "a.jsonl", tmp_path) == path
    assert path.read_bytes() == b"content"
    assert sorted(child.name for child in copy.parent.iterdir()) == [copy.name, f"{copy.name}.lock"]


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_copy_that_lacks_something_is_made_again(damage, storage, tmp_path):
    storage.put("data/a.jsonl", b"content")
    path = fetch_file(BUCKET / "data" / "a.jsonl", tmp_path)
    path.chmod(0o600)
    path.unlink() if damage == "deleted" else path.write_bytes(b"cont")
    assert fetch_file(BUCKET / "data" / "a.jsonl", tmp_path) == path
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("checksum", ["md5Hash", "crc32c"])
def test_download_is_compared_with_its_checksum(checksum, storage, tmp_path, monkeypatch):
    content = storage.put("a.bin", b"a" * 1000)
    crc32c = google_crc32c.Checksum(b"a" * 1000).digest()
    described = content.describe("a.bin") | {"crc32c": b64encode(crc32c).decode()}
    if checksum == "crc32c":  # of a composed object
        del described["md5Hash"]
        monkeypatch.setattr(Object, "describe", lambda self, name: described)
    assert fetch_file(BUCKET / "a.bin", tmp_path / "good").read_bytes() == b"a" * 1000
    storage.objects["a.bin"] = content._replace(content=b"a" * 999 + b"b")
    monkeypatch.setattr(Object, "describe", lambda self, name: described)
    with pytest.raises(UserError, match="gs://bucket/a.bin: was damaged on its way; run again"):
        fetch_file(BUCKET / "a.bin", tmp_path / "bad")
    assert not list((tmp_path / "bad").rglob("a.bin"))


@pytest.mark.parametrize("cache", ["gs://bucket/data/cache", "gs://bucket/run"])
def test_remote_cache_inside_of_data_or_output_is_refused(cache, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", cache)
    with pytest.raises(UserError, match=f"the cache {cache} is inside gs://bucket"):
        check_cache(BUCKET / "run", [BUCKET / "data"])
    check_cache(BUCKET / "runs", [BUCKET / "data" / "cache" / "ir", Path("/data")])


def test_shared_dataset_that_is_damaged_is_prepared_again(storage, tmp_path, tokenizer, capsys):
    path = write_ir(tmp_path / "a.jsonl", 3)

    def prepare_in(name: str) -> Path:
        shared = BUCKET / "cache"
        return prepare(path, "ir", PromptTokenizer(tokenizer, PROMPT), cache=tmp_path / name, shared=shared, **LIMITS)

    name = f"cache/{prepare_in('first').folder.name}/index/positives.npy"
    content = storage.objects.pop(name).content
    assert len(prepare_in("second")) == 3
    assert "note: the shared dataset is not used, but prepared again: " in capsys.readouterr().err
    assert storage.objects[name].content == content
    # A dataset that is complete is never written again: another machine may be reading it.
    generations = {name: object.generation for name, object in storage.objects.items()}
    assert len(prepare_in("third")) == 3
    upload_folder(tmp_path / "third", BUCKET / "cache", replace=False)
    assert {name: object.generation for name, object in storage.objects.items()} == generations


def test_missing_remote_files_are_listed_with_their_setting(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="data.ir:\n.*gs://bucket/data/a.jsonl: no such file or folder"):
        find_files([BUCKET / "data" / "a.jsonl"], "data.ir")
    storage.put("data/readme.txt", b"")
    with pytest.raises(UserError, match="gs://bucket/data: the folder contains no .json or .jsonl files"):
        find_files([BUCKET / "data"], "data.ir")
    with pytest.raises(UserError, match="gs://bucket/absent: there are no .json or .jsonl files"):
        find_files([BUCKET / "absent"], "data.ir")


def test_model_files_are_copied_but_no_other_weights(storage, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path))
    wanted = ["1_Pooling/config.json", "config.json", "model.safetensors"]
    for name in (*wanted, "pytorch_model.bin", "optimizer.pt", "checkpoint-500/model.safetensors", "onnx/config.json"):
        storage.put(f"model/{name}", b"{}")
    folder = resolve_model_path("gs://bucket/model")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*")) == wanted
    storage.put("run/config.yaml", b"")
    for step in ("900", "1000"):
        storage.put(f"steps/{step}/_CHECKPOINT_METADATA", b"")
    for name, problem in {
        "other": "no such folder, or it is empty",
        "run": "is a run without an export; give one of its checkpoints",
        "steps": "contains no model; give a checkpoint, for example gs://bucket/steps/1000",
        "steps/1000": r"the checkpoint is incomplete \(blueprint, params missing\)",
    }.items():
        with pytest.raises(UserError, match=f"gs://bucket/{name}:? {problem}"):
            resolve_model_path(f"gs://bucket/{name}")


def test_converted_checkpoint_may_be_copied_to_a_bucket(storage, golden, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    local = tmp_path / "orbax"
    hf_to_orbax(["--model", str(golden / "youtu_tiny"), "--output", str(local)])
    files = {path.relative_to(local).as_posix(): path.read_bytes() for path in local.rglob("*") if path.is_file()}
    for name, content in files.items():
        storage.put(f"tiny-orbax/{name}", content)
    folder = resolve_model_path("gs://bucket/tiny-orbax")
    assert {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    } == files
    assert is_checkpoint(folder)


def test_without_gcsfs_the_error_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from pathlib import Path\n"
        "from codiemb_jax.remote import fetch_file, remote_path\n"
        "fetch_file(remote_path('gs://bucket/x'), Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    message = 'gs://bucket/x: remote files need another package: pip install "codiemb-jax[gcs]"'
    assert done.stderr.splitlines()[-1] == f"codiemb_jax.errors.UserError: {message}"


def test_prepared_datasets_are_shared_by_a_remote_cache(storage, tmp_path, tokenizer, monkeypatch, capsys):
    prompt_tokenizer = PromptTokenizer(tokenizer, PROMPT)
    monkeypatch.setenv("CODIEMB_JAX_CACHE", "gs://bucket/cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "codiemb_jax"
    shared = remote_cache()
    path = write_ir(tmp_path / "a.jsonl", 3)
    first = prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "first", shared=shared, **LIMITS)
    names = storage.names("cache/")
    generations = {name: storage.objects[name].generation for name in names}
    assert max(names, key=generations.get) == f"cache/{first.folder.name}/index/manifest.json"

    def fail(*_: object) -> None:
        raise AssertionError("the dataset was prepared again")

    with monkeypatch.context() as patch:
        patch.setattr("codiemb_jax.data.prepare.write_dataset", fail)
        second = prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "second", shared=shared, **LIMITS)
    for file in first.folder.rglob("*"):
        if file.is_file():
            assert (second.folder / file.relative_to(first.folder)).read_bytes() == file.read_bytes()
    assert [path.name for path in (tmp_path / "second").iterdir()] == [first.folder.name]
    # An upload that was interrupted is not used.
    del storage.objects[f"cache/{first.folder.name}/index/manifest.json"]
    third = prepare(path, "ir", prompt_tokenizer, cache=tmp_path / "third", shared=shared, **LIMITS)
    assert third.folder.name == first.folder.name
    assert f"cache/{first.folder.name}/index/manifest.json" in storage.objects
    # Nor is it an error that the remote cache cannot be written.
    other = write_ir(tmp_path / "b.jsonl", 4)
    storage.fault = lambda command, address: 403 if command == "POST" else 0
    fourth = prepare(other, "ir", prompt_tokenizer, cache=tmp_path / "third", shared=shared, **LIMITS)
    assert len(fourth) == 4
    assert (
        f"note: the prepared dataset is not shared: gs://bucket/cache/{fourth.folder.name}/" in capsys.readouterr().err
    )
    storage.fault = lambda command, address: 0
    prepare(other, "ir", prompt_tokenizer, cache=tmp_path / "third", shared=shared, **LIMITS)
    assert f"cache/{fourth.folder.name}/index/manifest.json" in storage.objects


def start(folder: Path, *flags: str) -> subprocess.Popen:
    environment = os.environ | {"CODIEMB_JAX_CACHE": str(folder / "cache"), "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(folder / "config.yaml"), *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    assert "Traceback" not in output, output
    return process.returncode, output


@pytest.mark.slow
def test_remote_run_that_is_killed_continues_like_a_local_one(storage, golden, tmp_path):
    upload_folder(golden / "youtu_tiny", BUCKET / "model")
    upload_folder(golden / "data", BUCKET / "data")
    config = SETTINGS.replace("{golden}/youtu_tiny", "gs://bucket/model").replace("{golden}/", "gs://bucket/")
    (tmp_path / "config.yaml").write_text(config.format(output_dir="gs://bucket/run"))
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "config.yaml").write_text(SETTINGS.format(output_dir=tmp_path / "run", golden=golden))
    code, output = finish(start(tmp_path / "local"))
    assert code == 0, output

    for wanted, sent in (
        ("config.yaml", signal.SIGKILL),
        ("checkpoints/4/", signal.SIGKILL),
        ("checkpoints/8/", signal.SIGTERM),
    ):
        process = start(tmp_path)
        deadline = time.monotonic() + 200
        while not storage.names(f"run/{wanted}"):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(sent)
        code, output = finish(process)
        assert code == (0 if sent == signal.SIGTERM else -signal.SIGKILL), output
    code, output = finish(start(tmp_path))
    assert code == 0, output
    assert "continuing from step" in output
    assert "exported to gs://bucket/run/export" in output

    (tmp_path / "metrics.jsonl").write_bytes(storage.objects["run/metrics.jsonl"].content)
    expected = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in expected] == list(range(STEPS))
    assert read_metrics(tmp_path / "metrics.jsonl") == expected
    export = tmp_path / "run" / "export"
    names = sorted(path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file())
    assert storage.names("run/export/") == [f"run/export/{name}" for name in names]
    for name in names:
        if name != "README.md":
            assert storage.objects[f"run/export/{name}"].content == (export / name).read_bytes(), name
    uploaded = max(storage.names("run/export/"), key=lambda name: storage.objects[name].generation)
    assert uploaded == "run/export/modules.json"
    steps = {name.split("/")[2] for name in storage.names("run/checkpoints/")}
    assert len(steps) == 2 and str(STEPS) in steps  # SIGTERM may save at an odd step
    assert json.loads(storage.objects["run/evaluation.json"].content) == {"before": {}, "after": {}, "step": STEPS}

    # The finished run, once more, on a machine with an empty cache.
    code, output = finish(start_elsewhere(tmp_path, "again"))
    assert code == 0, output
    # A file that somebody has changed is not replaced, and other data or settings are noticed.
    storage.put("run/export/config.json", b"{}")
    code, output = finish(start(tmp_path))
    assert code == 2
    assert "error: gs://bucket/run/export: already exists, and was not written by this run or was changed" in output
    code, output = finish(start(tmp_path, "--optimizer.learning_rate", "2e-3"))
    assert code == 2
    assert "gs://bucket/run contains a run with other settings" in output
    lines = storage.objects["data/news.jsonl"].content.splitlines(keepends=True)
    storage.put("data/news.jsonl", b"".join(lines[:-1]))
    code, output = finish(start(tmp_path, "--export", "false"))
    assert code == 2
    assert re.search(r"gs://bucket/data/news.jsonl: its content, or how it is tokenized, has changed", output)


def start_elsewhere(folder: Path, name: str) -> subprocess.Popen:
    (folder / name).mkdir()
    (folder / name / "config.yaml").write_text((folder / "config.yaml").read_text())
    return start(folder / name)


@pytest.mark.slow
def test_processes_with_sharded_weights_share_a_remote_folder(storage, golden, tmp_path):
    config = test_distributed.write_config(tmp_path, golden, steps=6)
    with Processes(tmp_path, config, "local", 1, 1) as run:
        run.finish()
    flags = ("--mesh.fsdp", "4", "--checkpoint.every_steps", "2")
    for stopped_after in (4, None):
        with Processes(tmp_path, config, "remote", 2, 2, *flags, output="gs://bucket/run") as processes:
            if stopped_after:
                deadline = time.monotonic() + 200
                while f"run/checkpoints/{stopped_after}/commit_success.txt" not in storage.objects:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                continue  # the processes are killed
            outputs = processes.finish()
    assert "continuing from step 4 of 6" in outputs[0]
    (tmp_path / "metrics.jsonl").write_bytes(storage.objects["run/metrics.jsonl"].content)
    test_distributed.assert_close(
        test_distributed.read_metrics(tmp_path), test_distributed.read_metrics(tmp_path / "local")
    )
    export = resolve_model_path("gs://bucket/run")
    actual, expected = load_weights(export), load_weights(tmp_path / "local" / "export")
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(
            actual[name].astype(np.float32), weight.astype(np.float32), rtol=0, atol=2e-5, err_msg=name
        )


@pytest.mark.slow
def test_second_run_in_a_remote_folder_and_other_files_there_are_refused(storage, golden, tmp_path):
    (tmp_path / "config.yaml").write_text(SETTINGS.format(output_dir="gs://bucket/run", golden=golden))
    storage.put("run/notes.txt", b"mine")
    code, output = finish(start(tmp_path))
    assert code == 2
    assert "error: output_dir: gs://bucket/run contains other files (notes.txt)" in output
    assert storage.names() == ["run/notes.txt"]
    del storage.objects["run/notes.txt"]
    first = start(tmp_path)
    while not storage.names("run/config.yaml"):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.005)
    code, output = finish(start(tmp_path))
    assert code == 2
    assert "error: output_dir: gs://bucket/run is in use by another run" in output
    code, output = finish(first)
    assert code == 0, output


@pytest.mark.slow
def test_storage_that_does_not_answer_ends_the_run_with_an_error(golden, tmp_path, monkeypatch):
    with StorageEmulator() as emulator:
        environment = emulator.environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config.yaml").write_text(SETTINGS.format(output_dir="gs://bucket/run", golden=golden))
    code, output = finish(start(tmp_path))
    assert code == 2
    assert "error: gs://bucket/run/checkpoints: cannot be read or written: " in output
