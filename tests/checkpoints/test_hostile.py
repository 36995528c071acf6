"""Tests with malicious or damaged folders: no writes outside the output, no undetected damage, no traceback."""

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from codiemb_jax.checkpoints.manifest import digest
from codiemb_jax.checkpoints.model import open_checkpoint, open_folder, open_model, open_with_stored_settings
from codiemb_jax.checkpoints.run_checkpoints import RunCheckpoints, restore_run
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from scripts.make_random_checkpoint import write_random_checkpoint
from tests.helpers import read_files

TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1600,
    "torch_dtype": "float32",
}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 1.5, 1e400, "", "text", "../../escaped", "/tmp/escaped", [], [1], [None], {},
    {"a": 1}, {"../../escaped": "eA=="}, {"/tmp/escaped.py": "eA=="}, {"..": "eA=="}, {"x.py": 5}, 2**70, "\ud800",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with a tiny model and its checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint("bge_large_zh", folder / "model", **TINY)
    hf_to_orbax(["--model", str(folder / "model"), "--output", str(folder / "orbax")])
    return folder


def error_message(main: Callable[[list[str]], None], *arguments: object) -> str | None:
    """Runs a program; returns the message of its `UserError`, or None if it succeeds. Other exceptions propagate."""
    try:
        main(list(map(str, arguments)))
    except UserError as error:
        assert str(error).strip()
        assert len(str(error)) < 20_000
        return str(error)
    return None


def open_model_folder(arguments: list[str]) -> None:
    """Opens a model as the conversion does, without writing a checkpoint."""
    open_with_stored_settings(
        open_folder(Path(arguments[0])), make_mesh(MeshSettings(), jax.devices()[:1]), PromptSettings()
    )


def rewrite_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest of a checkpoint and updates its digest, as an attacker would."""
    path = checkpoint / "blueprint" / "metadata"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    change(manifest)
    path.write_text(json.dumps(manifest | {"digest": digest(manifest)}))


def paths_in(value: Any, depth: int = 2) -> Iterator[tuple[str, ...]]:
    """Yields the paths of all fields of a JSON value, up to a depth."""
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield (key,)
            yield from ((key, *rest) for rest in paths_in(inner, depth - 1))


def set_field(content: Any, path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


def manifest_fields(tiny: Path) -> list[tuple[str, ...]]:
    manifest = json.loads((tiny / "orbax" / "blueprint" / "metadata").read_text())
    blueprint = manifest["blueprint"]
    limited = {"dtypes": 2, "files": 2}  # their entries are all handled in the same way
    fields = [path for path in paths_in(blueprint) if len(path) == 1 or path[0] not in limited]
    fields += [(name, key) for name, count in limited.items() for key in list(blueprint[name])[:count]]
    arrays = [("arrays",), ("arrays", "params"), ("arrays", "params", next(iter(manifest["arrays"]["params"])))]
    return [("blueprint", *path) for path in fields] + arrays + [("blueprint",)]


@pytest.mark.slow
def test_any_manifest_value_is_harmless_or_raises_user_error(tiny, tmp_path):
    shutil.copytree(tiny / "orbax", tmp_path / "area" / "orbax")
    manifest = (tmp_path / "area" / "orbax" / "blueprint" / "metadata").read_bytes()
    orbax_to_hf(["--checkpoint", str(tiny / "orbax"), "--output", str(tmp_path / "expected")])
    expected = read_files(tmp_path / "expected")
    accepted = []
    for path in manifest_fields(tiny):
        for value in VALUES:
            (tmp_path / "area" / "orbax" / "blueprint" / "metadata").write_bytes(manifest)
            rewrite_manifest(tmp_path / "area" / "orbax", lambda m, path=path, value=value: set_field(m, path, value))
            output = tmp_path / "area" / "deep" / "export"
            error = error_message(orbax_to_hf, "--checkpoint", tmp_path / "area" / "orbax", "--output", output)
            assert error is None or not output.exists(), (path, value)
            if error is None:
                accepted.append((path, value))
                # Accepted values may change config.json, prompts and limits, but not the weights or the file names.
                exported = read_files(output)
                assert exported.keys() - {"x.py"} <= expected.keys(), (path, value)
                assert exported["model.safetensors"] == expected["model.safetensors"], (path, value)
                shutil.rmtree(output)
            assert {child.name for child in (tmp_path / "area").rglob("*") if "escaped" in child.name} == set()
            assert not Path("/tmp/escaped").exists()
            assert not Path("/tmp/escaped.py").exists()
    assert sorted(child.name for child in tmp_path.iterdir()) == ["area", "expected"]
    assert 0 < len(accepted) < 400  # of about a thousand; these values are harmless


NAMES = {
    "files": ["../../escaped", "/tmp/escaped", "tokenizer.json/../x", "config.json", "tokenizer.json\0", ".."],
    "code": ["../../escaped.py", "/tmp/escaped.py", "sub/x.py", "..", "x.sh", ".py/../x.py", "\0.py"],
}


@pytest.mark.parametrize(("field", "name"), [(field, name) for field in NAMES for name in NAMES[field]])
def test_invalid_file_name_in_manifest_raises_user_error(field, name, tiny, tmp_path):
    shutil.copytree(tiny / "orbax", tmp_path / "orbax")
    content = base64.b64encode(b"malicious").decode()
    rewrite_manifest(tmp_path / "orbax", lambda manifest: manifest["blueprint"][field].update({name: content}))
    error = error_message(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "a" / "b" / "export")
    assert error is not None and f"{field}." in error and "found" in error
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]


INVALID_MANIFESTS = {
    "heads": (lambda m: m["blueprint"]["config"].update(num_attention_heads=3), "num_attention_heads must divide"),
    "more layers": (lambda m: m["blueprint"]["config"].update(num_hidden_layers=3), "layers.q: "),
    "fewer layers": (lambda m: m["blueprint"]["config"].update(num_hidden_layers=1), "layers.q: "),
    "width": (lambda m: m["blueprint"]["config"].update(intermediate_size=25), "layers.up: "),
    "no dtypes": (lambda m: m["blueprint"].update(dtypes={}), "the checkpoint has no dtype for this weight"),
    "unknown dtype": (
        lambda m: m["blueprint"]["dtypes"].update({"embeddings.word_embeddings.weight": "F31"}), "is not one of BF16",
    ),
    "pooling": (lambda m: m["blueprint"]["encoding"].update(pooling="max"), "pooling"),
    "negative limit": (lambda m: m["blueprint"].update(max_tokens=-1), "max_tokens"),
    "limit above positions": (lambda m: m["blueprint"].update(max_tokens=10_000), "may be at most 512"),
    "another version": (lambda m: m["blueprint"].update(version=1), "another version of codiemb_jax"),
    "missing array": (lambda m: m["arrays"]["params"].pop("norm"), "norm: missing in the checkpoint"),
    "checksum": (
        lambda m: m["arrays"]["params"].update(norm=[*m["arrays"]["params"]["norm"][:2], "0" * 16]),
        "norm does not match its checksum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INVALID_MANIFESTS)
def test_inconsistent_manifest_raises_user_error(case, tiny, tmp_path):
    change, message = INVALID_MANIFESTS[case]
    shutil.copytree(tiny / "orbax", tmp_path / "orbax")
    rewrite_manifest(tmp_path / "orbax", change)
    error = error_message(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "export")
    assert error is not None and message in error and str(tmp_path / "orbax") in error
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "blueprint", "params", "blueprint/metadata"])
def test_incomplete_checkpoint_raises_user_error(name, tiny, tmp_path):
    shutil.copytree(tiny / "orbax", tmp_path / "orbax")
    path = tmp_path / "orbax" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = error_message(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "export")
    assert error is not None and str(tmp_path / "orbax") in error
    assert not (tmp_path / "export").exists()


def random_bits(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Yields random single bits of the files in a folder, as (file, offset, mask)."""
    random = np.random.default_rng(seed)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    # Half are uniform over bytes and half over files; otherwise small files would rarely be chosen.
    by_size = random.choice(len(files), count // 2, p=sizes / sizes.sum())
    for index in [*by_size, *random.integers(0, len(files), count - count // 2)]:
        yield files[index], int(random.integers(sizes[index])), 1 << int(random.integers(8))


def flip_bit(path: Path, offset: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= mask
    path.write_bytes(content)


@pytest.mark.slow
def test_flipped_bits_of_a_checkpoint_are_detected_or_harmless(tiny, tmp_path):
    orbax_to_hf(["--checkpoint", str(tiny / "orbax"), "--output", str(tmp_path / "expected")])
    expected = read_files(tmp_path / "expected")
    shutil.copytree(tiny / "orbax", tmp_path / "orbax")
    detected = 0
    for path, offset, mask in random_bits(tmp_path / "orbax", 200, seed=0):
        flip_bit(path, offset, mask)
        error = error_message(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "export")
        if error is None:
            assert read_files(tmp_path / "export") == expected, (path, offset, mask)
            shutil.rmtree(tmp_path / "export")
        else:
            detected += 1
            assert not (tmp_path / "export").exists()
        flip_bit(path, offset, mask)
    assert detected > 60


def assert_equal_trees(actual: Any, expected: Any) -> None:
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.slow
def test_flipped_bits_of_a_run_are_detected_or_harmless(tiny, tmp_path):
    settings = ModelSettings(path=str(tiny / "model"), compute_dtype="float32")
    model = open_model(settings, PromptSettings(), make_mesh(MeshSettings(), jax.devices()[:1]))
    params = model.load()
    state = {"count": jax.numpy.int32(7), "moments": jax.tree.map(lambda leaf: leaf * 2 + 1, params)}
    checkpoints = RunCheckpoints(tmp_path / "run", keep=3)
    for step in (4, 5):
        checkpoints.save(step, params, state, {}, model.blueprint)
    checkpoints.close()
    layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    assert_equal_trees(restore_run(tmp_path / "run", 5, model.abstract, layout), (params, state))
    detected = 0
    for path, offset, mask in random_bits(tmp_path / "run" / "5", 60, seed=1):
        flip_bit(path, offset, mask)
        try:
            restored = restore_run(tmp_path / "run", 5, model.abstract, layout)
        except UserError as error:
            detected += 1
            assert f"move it away to continue from the previous checkpoint, {tmp_path / 'run' / '4'}" in str(error)
        else:
            assert_equal_trees(restored, (params, state))
        flip_bit(path, offset, mask)
    assert detected > 20


def test_damaged_checkpoint_exits_with_code_2_and_one_line(tiny, tmp_path):
    """Runs in a subprocess to see everything on stderr."""
    shutil.copytree(tiny / "orbax", tmp_path / "orbax")
    for path in (tmp_path / "orbax" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = [sys.executable, "-m", "convert.orbax_to_hf", "--checkpoint", str(tmp_path / "orbax")]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "export")], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path}/orbax")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_loading_parameters_with_a_flipped_bit_raises_user_error(tiny, tmp_path):
    shutil.copytree(tiny / "orbax", tmp_path / "orbax")
    data = max((tmp_path / "orbax" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip_bit(data, data.stat().st_size // 2, 4)
    with pytest.raises(UserError, match=f"{tmp_path}/orbax: the checkpoint (is damaged|cannot be read)"):
        open_checkpoint(tmp_path / "orbax").load()


def test_any_config_value_is_accepted_or_raises_user_error(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in config:
        for value in VALUES:
            (tmp_path / "model" / "config.json").write_text(json.dumps(config | {key: value}))
            error_message(open_model_folder, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["vocab.txt", "custom.py"])
def test_links_out_of_the_folder_are_refused(name, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "secret").write_text("not part of the model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    (tmp_path / "model" / name).symlink_to("../secret")
    error = error_message(hf_to_orbax, "--model", tmp_path / "model", "--output", tmp_path / "orbax")
    assert error is not None and error.startswith(f"{tmp_path}/model/{name}: is a link to a file outside the folder; ")
    assert not (tmp_path / "orbax").exists()
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to("tokenizer_config.json")
    assert error_message(open_model_folder, tmp_path / "model") is None


@pytest.mark.parametrize("name", ["0123", "0123/subfolder"])
def test_folder_in_the_cache_of_the_hub_opens(name, tiny, tmp_path):
    """Its files are links to blobs beside the folder of snapshots."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / name, tmp_path / "models--a--b" / "blobs"
    shutil.copytree(tiny / "model", blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert error_message(open_model_folder, snapshot) is None


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
SENTENCE_FILES: dict[str, Any] = {
    "modules.json": MODULES,
    "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "include_prompt": True},
    "config_sentence_transformers.json": {"prompts": {"query": "q "}, "default_prompt_name": "query"},
    "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
}


def test_any_sentence_transformers_value_is_accepted_or_raises_user_error(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "escaped").mkdir()
    (tmp_path / "escaped" / "config.json").write_text(json.dumps(SENTENCE_FILES["1_Pooling/config.json"]))
    for name, content in SENTENCE_FILES.items():
        (tmp_path / "model" / name).write_text(json.dumps(content))
    open_model_folder([str(tmp_path / "model")])
    for name, content in SENTENCE_FILES.items():
        for corrupted in corruptions(content):
            (tmp_path / "model" / name).write_text(json.dumps(corrupted))
            error_message(open_model_folder, tmp_path / "model")
        (tmp_path / "model" / name).write_text(json.dumps(content))


def corruptions(content: Any) -> Iterator[Any]:
    """Yields a JSON value with the whole or any field replaced by each of `VALUES`, or a field removed."""
    yield from VALUES
    if isinstance(content, list):
        for i in range(len(content)):
            for corrupted in corruptions(content[i]):
                yield [*content[:i], corrupted, *content[i + 1 :]]
        yield [*content, *content]
    elif isinstance(content, dict):
        for key in content:
            for value in VALUES:
                yield content | {key: value}
            yield {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize("kind", ["evil.Pooling", "sentence_transformers.evil.Pooling", "Pooling", "models.Pooling"])
def test_unknown_module_class_raises_user_error(kind, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(SENTENCE_FILES["1_Pooling/config.json"]))
    modules = [MODULES[0], MODULES[1] | {"type": kind}]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    error = error_message(hf_to_orbax, "--model", tmp_path / "model", "--output", tmp_path / "orbax")
    assert error is not None and f"Transformer -> {kind!r} is not supported" in error


def test_any_shard_index_is_accepted_or_raises_user_error(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    names = list(open_checkpoint(tiny / "orbax").blueprint.dtypes)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    path = tmp_path / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    open_model_folder([str(tmp_path / "model")])
    shutil.copy(tiny / "model" / "model.safetensors", tmp_path / "escaped")
    single_entries = [index | {"weight_map": index["weight_map"] | {names[0]: value}} for value in VALUES]
    for corrupted in [*corruptions(index), *single_entries]:
        path.write_text(json.dumps(corrupted))
        error_message(open_model_folder, tmp_path / "model")


def test_output_inside_the_input_raises_user_error(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "tiny")
    before = read_files(tmp_path)
    for main, flag, name in ((hf_to_orbax, "--model", "model"), (orbax_to_hf, "--checkpoint", "orbax")):
        (tmp_path / "link").symlink_to(tmp_path / "tiny" / name)
        for output in (tmp_path / "tiny" / name / "deep" / "inside", tmp_path / "link" / "inside"):
            error = error_message(main, flag, tmp_path / "tiny" / name, "--output", output)
            assert error is not None and "give a folder outside it" in error
        (tmp_path / "link").unlink()
    assert read_files(tmp_path) == before


def test_empty_weight_raises_user_error(tiny, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"pooler.dense.weight": np.ones((0, 16), np.float32)}, path)
    error = error_message(hf_to_orbax, "--model", tmp_path / "model", "--output", tmp_path / "orbax")
    assert error is not None and "empty: pooler.dense.weight has no values; remove it" in error
    assert not (tmp_path / "orbax").exists()
