"""Folders that mean harm or are damaged: nothing is written outside, nothing wrong is accepted, no traceback."""

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

from codiemb_jax.checkpoints import orbax
from codiemb_jax.checkpoints.model import open_as_stored, open_checkpoint, open_folder, open_model
from codiemb_jax.checkpoints.orbax import RunCheckpoints, restore_run
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.sharding import make_mesh
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf
from scripts.make_random_checkpoint import make
from tests.helpers import content_of

TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 1600,
    "torch_dtype": "float32",
}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 1.5, 1e400, "", "text", "../../escaped", "/tmp/escaped", [], [1], [None], {},
    {"a": 1}, {"../../escaped": "eA=="}, {"/tmp/escaped.py": "eA=="}, {"..": "eA=="}, {"x.py": 5}, 2**70, "\ud800",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny model, and the checkpoint made of it."""
    folder = tmp_path_factory.mktemp("made")
    make("bge_large_zh", folder / "model", **TINY)
    hf_to_orbax(["--model", str(folder / "model"), "--output", str(folder / "orbax")])
    return folder


def outcome(main: Callable[[list[str]], None], *arguments: object) -> str | None:
    """What a program says that refuses; None if it succeeds.  Any other exception fails the test."""
    try:
        main(list(map(str, arguments)))
    except UserError as error:
        assert str(error).strip()
        assert len(str(error)) < 20_000
        return str(error)
    return None


def open_described(arguments: list[str]) -> None:
    """All of a conversion but the writing."""
    open_as_stored(open_folder(Path(arguments[0])), make_mesh(MeshSettings(), jax.devices()[:1]), PromptSettings())


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a checkpoint's manifest as someone would who knows how its digest is made."""
    path = checkpoint / "blueprint" / "metadata"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    change(manifest)
    path.write_text(json.dumps(manifest | {"digest": orbax._digest(manifest)}))


def paths_in(value: Any, depth: int = 2) -> Iterator[tuple[str, ...]]:
    """The paths of all fields of an object, to a depth."""
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield (key,)
            yield from ((key, *rest) for rest in paths_in(inner, depth - 1))


def put(value: Any, path: tuple[str, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


def manifest_fields(made: Path) -> list[tuple[str, ...]]:
    manifest = json.loads((made / "orbax" / "blueprint" / "metadata").read_text())
    blueprint = manifest["blueprint"]
    few = {"dtypes": 2, "files": 2}  # of these, one name is like another
    fields = [path for path in paths_in(blueprint) if len(path) == 1 or path[0] not in few]
    fields += [(name, key) for name, count in few.items() for key in list(blueprint[name])[:count]]
    arrays = [("arrays",), ("arrays", "params"), ("arrays", "params", next(iter(manifest["arrays"]["params"])))]
    return [("blueprint", *path) for path in fields] + arrays + [("blueprint",)]


def test_no_value_of_a_manifest_escapes_or_ends_in_a_traceback(made, tmp_path):
    shutil.copytree(made / "orbax", tmp_path / "area" / "orbax")
    manifest = (tmp_path / "area" / "orbax" / "blueprint" / "metadata").read_bytes()
    orbax_to_hf(["--checkpoint", str(made / "orbax"), "--output", str(tmp_path / "expected")])
    expected = content_of(tmp_path / "expected")
    accepted = []
    for path in manifest_fields(made):
        for value in VALUES:
            (tmp_path / "area" / "orbax" / "blueprint" / "metadata").write_bytes(manifest)
            rewrite(tmp_path / "area" / "orbax", lambda m, path=path, value=value: put(m, path, value))
            output = tmp_path / "area" / "deep" / "export"
            said = outcome(orbax_to_hf, "--checkpoint", tmp_path / "area" / "orbax", "--output", output)
            assert said is None or not output.exists(), (path, value)
            if said is None:
                accepted.append((path, value))
                # What is accepted may change config.json, prompts and lengths, but neither weights nor names of files.
                found = content_of(output)
                assert found.keys() - {"x.py"} <= expected.keys(), (path, value)
                assert found["model.safetensors"] == expected["model.safetensors"], (path, value)
                shutil.rmtree(output)
            assert {child.name for child in (tmp_path / "area").rglob("*") if "escaped" in child.name} == set()
            assert not Path("/tmp/escaped").exists()
            assert not Path("/tmp/escaped.py").exists()
    assert sorted(child.name for child in tmp_path.iterdir()) == ["area", "expected"]
    assert 0 < len(accepted) < 400  # of some thousand: a harmless value of a key that does not matter


NAMES = {
    "files": ["../../escaped", "/tmp/escaped", "tokenizer.json/../x", "config.json", "tokenizer.json\0", ".."],
    "code": ["../../escaped.py", "/tmp/escaped.py", "sub/x.py", "..", "x.sh", ".py/../x.py", "\0.py"],
}


@pytest.mark.parametrize(("field", "name"), [(field, name) for field in NAMES for name in NAMES[field]])
def test_a_file_name_that_is_no_bare_known_name_raises_user_error(field, name, made, tmp_path):
    shutil.copytree(made / "orbax", tmp_path / "orbax")
    content = base64.b64encode(b"mine now").decode()
    rewrite(tmp_path / "orbax", lambda manifest: manifest["blueprint"][field].update({name: content}))
    said = outcome(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "a" / "b" / "export")
    assert said is not None and f"{field}." in said and "found" in said
    assert [path.name for path in tmp_path.iterdir()] == ["orbax"]


WRONG = {
    "heads": (lambda m: m["blueprint"]["config"].update(num_attention_heads=3), "num_attention_heads must divide"),
    "more layers": (lambda m: m["blueprint"]["config"].update(num_hidden_layers=3), "layers.q: "),
    "fewer layers": (lambda m: m["blueprint"]["config"].update(num_hidden_layers=1), "layers.q: "),
    "width": (lambda m: m["blueprint"]["config"].update(intermediate_size=25), "layers.up: "),
    "no dtypes": (lambda m: m["blueprint"].update(dtypes={}), "does not say its type"),
    "a dtype that is none": (
        lambda m: m["blueprint"]["dtypes"].update({"embeddings.word_embeddings.weight": "F31"}), "is none of BF16",
    ),
    "pooling": (lambda m: m["blueprint"]["encoding"].update(pooling="max"), "pooling"),
    "limit": (lambda m: m["blueprint"].update(max_tokens=-1), "max_tokens"),
    "too long": (lambda m: m["blueprint"].update(max_tokens=10_000), "may be at most 512"),
    "another version": (lambda m: m["blueprint"].update(version=1), "another version of codiemb_jax"),
    "no array": (lambda m: m["arrays"]["params"].pop("norm"), "norm: missing in the checkpoint"),
    "a checksum": (
        lambda m: m["arrays"]["params"].update(norm=[*m["arrays"]["params"]["norm"][:2], "0" * 16]),
        "norm does not match its checksum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_manifest_that_does_not_fit_raises_user_error(wrong, made, tmp_path):
    change, message = WRONG[wrong]
    shutil.copytree(made / "orbax", tmp_path / "orbax")
    rewrite(tmp_path / "orbax", change)
    said = outcome(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "export")
    assert said is not None and message in said and str(tmp_path / "orbax") in said
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "blueprint", "params", "blueprint/metadata"])
def test_a_checkpoint_without_one_of_its_parts_raises_user_error(name, made, tmp_path):
    shutil.copytree(made / "orbax", tmp_path / "orbax")
    path = tmp_path / "orbax" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    said = outcome(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "export")
    assert said is not None and str(tmp_path / "orbax") in said
    assert not (tmp_path / "export").exists()


def flips(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, int, int]]:
    """Files, places and masks of single flipped bits, spread over all bytes of a folder."""
    random = np.random.default_rng(seed)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    # Half of them by size, half by file: small files would else hardly be hit.
    by_size = random.choice(len(files), count // 2, p=sizes / sizes.sum())
    for index in [*by_size, *random.integers(0, len(files), count - count // 2)]:
        yield files[index], int(random.integers(sizes[index])), 1 << int(random.integers(8))


def flip(path: Path, place: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def test_each_of_200_flipped_bits_is_noticed_or_harmless(made, tmp_path):
    orbax_to_hf(["--checkpoint", str(made / "orbax"), "--output", str(tmp_path / "expected")])
    expected = content_of(tmp_path / "expected")
    shutil.copytree(made / "orbax", tmp_path / "orbax")
    noticed = 0
    for path, place, mask in flips(tmp_path / "orbax", 200, seed=0):
        flip(path, place, mask)
        said = outcome(orbax_to_hf, "--checkpoint", tmp_path / "orbax", "--output", tmp_path / "export")
        if said is None:
            assert content_of(tmp_path / "export") == expected, (path, place, mask)
            shutil.rmtree(tmp_path / "export")
        else:
            noticed += 1
            assert not (tmp_path / "export").exists()
        flip(path, place, mask)
    assert noticed > 60


def assert_restored(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_flipped_bits_of_a_run_are_noticed_or_harmless(made, tmp_path):
    settings = ModelSettings(path=str(made / "model"), compute_dtype="float32")
    model = open_model(settings, PromptSettings(), make_mesh(MeshSettings(), jax.devices()[:1]))
    params = model.load()
    state = {"count": jax.numpy.int32(7), "moments": jax.tree.map(lambda leaf: leaf * 2 + 1, params)}
    checkpoints = RunCheckpoints(tmp_path / "run", keep=3)
    for step in (4, 5):
        checkpoints.save(step, params, state, {}, model.blueprint)
    checkpoints.close()
    layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    assert_restored(restore_run(tmp_path / "run", 5, model.abstract, layout), (params, state))
    noticed = 0
    for path, place, mask in flips(tmp_path / "run" / "5", 60, seed=1):
        flip(path, place, mask)
        try:
            restored = restore_run(tmp_path / "run", 5, model.abstract, layout)
        except UserError as error:
            noticed += 1
            assert f"remove it to continue from the one before it, {tmp_path / 'run' / '4'}" in str(error)
        else:
            assert_restored(restored, (params, state))
        flip(path, place, mask)
    assert noticed > 20


def test_a_damaged_checkpoint_ends_a_program_with_one_message(made, tmp_path):
    """Nothing beside it on stderr, which a test in this process would not see."""
    shutil.copytree(made / "orbax", tmp_path / "orbax")
    for path in (tmp_path / "orbax" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    command = [sys.executable, "-m", "convert.orbax_to_hf", "--checkpoint", str(tmp_path / "orbax")]
    ended = subprocess.run(
        [*command, "--output", str(tmp_path / "export")], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {tmp_path}/orbax")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_a_flipped_bit_is_noticed_by_training(made, tmp_path):
    """Of the parameters' own data: the model is not loaded."""
    shutil.copytree(made / "orbax", tmp_path / "orbax")
    data = max((tmp_path / "orbax" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(data, data.stat().st_size // 2, 4)
    with pytest.raises(UserError, match=f"{tmp_path}/orbax: the checkpoint (is damaged|cannot be read)"):
        open_checkpoint(tmp_path / "orbax").load()


def test_no_value_of_a_config_ends_in_a_traceback(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in config:
        for value in VALUES:
            (tmp_path / "model" / "config.json").write_text(json.dumps(config | {key: value}))
            outcome(open_described, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
DESCRIBED: dict[str, Any] = {
    "modules.json": MODULES,
    "1_Pooling/config.json": {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "include_prompt": True},
    "config_sentence_transformers.json": {"prompts": {"query": "q "}, "default_prompt_name": "query"},
    "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
}


def test_no_value_of_what_describes_a_folder_ends_in_a_traceback(made, tmp_path):
    """modules.json and the files that it names."""
    shutil.copytree(made / "model", tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "escaped").mkdir()
    (tmp_path / "escaped" / "config.json").write_text(json.dumps(DESCRIBED["1_Pooling/config.json"]))
    for name, content in DESCRIBED.items():
        (tmp_path / "model" / name).write_text(json.dumps(content))
    open_described([str(tmp_path / "model")])
    for name, content in DESCRIBED.items():
        for spoilt in spoilings(content):
            (tmp_path / "model" / name).write_text(json.dumps(spoilt))
            outcome(open_described, tmp_path / "model")
        (tmp_path / "model" / name).write_text(json.dumps(content))


def spoilings(content: Any) -> Iterator[Any]:
    """A value of each kind in place of the whole, and of each field."""
    yield from VALUES
    if isinstance(content, list):
        for place in range(len(content)):
            for spoilt in spoilings(content[place]):
                yield [*content[:place], spoilt, *content[place + 1 :]]
        yield [*content, *content]
    elif isinstance(content, dict):
        for key in content:
            for value in VALUES:
                yield content | {key: value}
            yield {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize("kind", ["evil.Pooling", "sentence_transformers.evil.Pooling", "Pooling", "models.Pooling"])
def test_a_module_of_a_foreign_class_raises_user_error(kind, made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(DESCRIBED["1_Pooling/config.json"]))
    modules = [MODULES[0], MODULES[1] | {"type": kind}]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    said = outcome(hf_to_orbax, "--model", tmp_path / "model", "--output", tmp_path / "orbax")
    assert said is not None and f"Transformer -> {kind!r} is not supported" in said


def test_no_value_of_an_index_of_shards_ends_in_a_traceback(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    names = list(open_checkpoint(made / "orbax").blueprint.dtypes)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    path = tmp_path / "model" / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    open_described([str(tmp_path / "model")])
    shutil.copy(made / "model" / "model.safetensors", tmp_path / "escaped")
    one_of_many = [index | {"weight_map": index["weight_map"] | {names[0]: value}} for value in VALUES]
    for spoilt in [*spoilings(index), *one_of_many]:
        path.write_text(json.dumps(spoilt))
        outcome(open_described, tmp_path / "model")


def test_an_output_inside_of_what_is_read_raises_user_error(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    before = content_of(tmp_path)
    for main, flag, name in ((hf_to_orbax, "--model", "model"), (orbax_to_hf, "--checkpoint", "orbax")):
        (tmp_path / "link").symlink_to(tmp_path / "made" / name)
        for output in (tmp_path / "made" / name / "deep" / "inside", tmp_path / "link" / "inside"):
            said = outcome(main, flag, tmp_path / "made" / name, "--output", output)
            assert said is not None and "give a folder outside of it" in said
        (tmp_path / "link").unlink()
    assert content_of(tmp_path) == before


def test_a_weight_without_values_raises_user_error(made, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(made / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path) | {"pooler.dense.weight": np.ones((0, 16), np.float32)}, path)
    said = outcome(hf_to_orbax, "--model", tmp_path / "model", "--output", tmp_path / "orbax")
    assert said is not None and "empty: pooler.dense.weight has no values; remove it" in said
    assert not (tmp_path / "orbax").exists()
