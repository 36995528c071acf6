"""Tests of the program that encodes the texts of a file, with the model of the quickstart."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import codiemb_jax
from codiemb_jax import Embedder, encoding
from codiemb_jax.cli import main as codiemb
from codiemb_jax.encode import model_files
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import EmptyContentError
from tests.processes import free_port

MODEL = Path(codiemb_jax.__file__).parent / "quickstart" / "model"
WORDS = ("plants", "make", "sugar", "from", "light", "while", "water", "and", "salt", "move", "through", "stones")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.from_pretrained(MODEL)


@pytest.fixture
def texts(tmp_path) -> list[str]:
    rng = np.random.default_rng(3)
    lines = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(150)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def encode(folder: Path, output: str, *flags: str, source: str = "texts.txt") -> np.ndarray:
    codiemb(
        ["encode", "--model", str(MODEL), "--input", str(folder / source), "--output", str(folder / output), *flags]
    )
    return np.load(folder / output) if output.endswith(".npy") else np.empty(0)


@pytest.mark.parametrize("kind", ["query", "document"])
def test_vectors_match_embedder(kind, embedder, texts, tmp_path):
    expected = embedder.encode_query(texts) if kind == "query" else embedder.encode_document(texts)
    found = encode(tmp_path, "o.npy", "--kind", kind)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.npy", "texts.txt"]


def test_precisions_and_dimensions(embedder, texts, tmp_path):
    vectors = embedder.encode_document(texts).astype(np.float64)
    cut = vectors[:, :16] / np.linalg.norm(vectors[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(encode(tmp_path, "cut.npy", "--dim", "16"), cut, atol=1e-6)
    small = encode(tmp_path, "int8.npy", "--dim", "16", "--precision", "int8")
    assert small.dtype == np.int8
    np.testing.assert_allclose(small, cut * 127, atol=0.501)
    bits = encode(tmp_path, "bits.npy", "--precision", "binary")
    unpacked = np.unpackbits((bits.astype(np.int16) + 128).astype(np.uint8), axis=1)
    clear = np.abs(vectors) > 1e-6
    np.testing.assert_array_equal(unpacked[clear], (vectors > 0)[clear])


def test_parquet_has_the_same_vectors(texts, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    encode(tmp_path, "o.parquet", source="texts.jsonl")
    rows = parquet.read_table(tmp_path / "o.parquet")["embedding"].to_pylist()
    np.testing.assert_array_equal(np.array(rows, np.float32), encode(tmp_path, "o.npy"))


def test_interrupted_run_continues_without_a_gap_or_a_double(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "TEXTS_PER_BLOCK", 32)
    expected = encode(tmp_path, "whole.npy")
    embed, encoded = encoding._embed, []

    def interrupted(embedder, block, settings):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(block))
        return embed(embedder, block, settings)

    monkeypatch.setattr(encoding, "_embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path, "o.npy")
    partial = tmp_path / ".o.npy.partial"
    with (partial / "vectors.npy").open("ab") as file:
        file.write(b"half a row")  # written, but not recorded
    with pytest.raises(UserError, match="left from an interrupted run with other texts or settings"):
        encode(tmp_path, "o.npy", "--dim", "16")
    rest = []
    monkeypatch.setattr(encoding, "_embed", lambda *args: (rest.append(len(args[1])), embed(*args))[1])
    np.testing.assert_array_equal(encode(tmp_path, "o.npy"), expected)
    assert encoded == [32, 32]
    assert rest == [32, 32, 22]
    assert not partial.exists()


def test_long_texts_are_counted(embedder, tmp_path, capsys):
    long = " ".join(WORDS * embedder.max_seq_length)
    (tmp_path / "texts.txt").write_text(f"{long}\nshort\n{long}\n")
    found = encode(tmp_path, "o.npy")
    limit = embedder.max_seq_length
    output = " ".join(capsys.readouterr().err.split())
    assert f"warning: 2 texts have more than {limit} tokens and were truncated" in output
    np.testing.assert_allclose(found[0], embedder.encode_document([long])[0], atol=1e-6)


def test_byte_order_mark_is_left_out(embedder, tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfplants make sugar\nsalt\n")
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "plants make sugar"}\n{"text": "salt"}\n')
    expected = embedder.encode_document(["plants make sugar", "salt"])
    for source in ("texts.txt", "t.jsonl"):
        np.testing.assert_allclose(encode(tmp_path, f"{source}.npy", source=source), expected, atol=1e-6)


def test_prompt_that_leaves_no_room_is_refused(embedder, texts, tmp_path):
    settings = encoding.EncodeSettings("sugar " * 3000)
    with pytest.raises(UserError, match="tokens per text leave no room next to the prompt; give a shorter prompt"):
        encoding.encode_file(embedder, tmp_path / "texts.txt", tmp_path / "o.npy", settings, {})
    assert not (tmp_path / "o.npy").exists()


def test_model_may_have_files_whose_names_are_not_utf8(texts, tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    (Path(os.fsdecode(bytes(model) + b"/x\xff"))).write_text("")
    assert len(encode(tmp_path, "o.npy", "--model", str(model))) == len(texts)
    assert "x\\udcff" in model_files(model)


BAD = {
    "empty line": (b"a\n\nb\n", "texts.txt:2: empty text"),
    "not UTF-8": (b"a\nb\xff\n", "texts.txt:2: not valid UTF-8"),
    "no text": (b"", "contains no texts"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_texts_leave_nothing(case, tmp_path):
    content, message = BAD[case]
    (tmp_path / "texts.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        encode(tmp_path, "o.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_invalid_json_names_each_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": 1}\n[]\n{"text": "\\ud800"}\n{\n')
    with pytest.raises(UserError) as error:
        encode(tmp_path, "o.npy", source="t.jsonl")
    assert [line.partition("t.jsonl:")[2][:8] for line in str(error.value).splitlines()[1:]] == [
        "2: text:", "3: text:", "4: text:", "5: inval",
    ]  # fmt: skip


FLAGS = {
    "--dim 100000": (("--dim", "100000"), "--dim 100000: the model's vectors have"),
    "--dim 12 binary": (("--dim", "12", "--precision", "binary"), "give a multiple of 8"),
    "--dim 0": (("--dim", "0"), "expected an integer from 1"),
    "instruction": (("--instruction", "x"), "add --kind query"),
    "bytes": (("--instruction", "\udcff", "--kind", "query"), "--instruction: '.udcff': is not valid UTF-8"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_invalid_flags(case, texts, tmp_path):
    flags, message = FLAGS[case]
    with pytest.raises(UserError, match=message):
        encode(tmp_path, "o.npy", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_output_that_exists_is_kept(texts, tmp_path):
    (tmp_path / "o.npy").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        encode(tmp_path, "o.npy")
    assert (tmp_path / "o.npy").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.npy", "texts.txt"]


def start_processes(folder: Path, output: str, count: int, *flags: str) -> list[subprocess.Popen]:
    """Starts the processes of one run, with two simulated devices each."""
    command = [sys.executable, "-m", "codiemb_jax.encode", "--model", str(MODEL), "--input", str(folder / "texts.txt")]
    command += ["--output", str(folder / output), "--distributed.coordinator", f"localhost:{free_port()}", *flags]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return [
        subprocess.Popen(
            [*command, "--distributed.num_processes", str(count), "--distributed.process_id", str(i)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def wait(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Returns the exit code and the output of each process."""
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_several_processes_encode_together(texts, tmp_path):
    expected = encode(tmp_path, "alone.npy")
    (code, output), other = wait(start_processes(tmp_path, "together.npy", 2))
    assert code == 0, output
    assert "encoded 150 texts" in output
    assert other[0] == 0 and "encoded" not in other[1]
    np.testing.assert_allclose(np.load(tmp_path / "together.npy"), expected, atol=1e-6)
    assert not (tmp_path / ".together.npy.partial").exists()
    # Both processes end if one of them cannot go on.
    (tmp_path / ".third.npy.partial").symlink_to(tmp_path)
    failed = wait(start_processes(tmp_path, "third.npy", 2))
    assert [code for code, _ in failed] == [2, 2], failed
    assert all("is a link; remove it" in output for _, output in failed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed.process_id", "1"], "give coordinator, num_processes and process_id together"),
        (["--distributed.num_processes", "0"], "--distributed.num_processes: Input should be greater than 0"),
        (["--distributed.num_processes", "two"], "argument --distributed.num_processes: invalid int value: 'two'"),
        (["--distributed.coordinator", "here"], "--distributed.coordinator: String should match pattern"),
    ],
)
def test_invalid_flags_of_processes(flags, message, texts, tmp_path):
    with pytest.raises(UserError, match=message):
        encode(tmp_path, "o.npy", *flags)


@pytest.fixture
def interrupted(texts, tmp_path, monkeypatch) -> Path:
    """The folder of unfinished output, with 64 of 150 vectors."""
    monkeypatch.setattr(encoding, "TEXTS_PER_BLOCK", 64)
    calls, embed = [], encoding._embed

    def stop(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_embed", stop)
        with pytest.raises(KeyboardInterrupt):
            encode(tmp_path, "o.npy")
    return tmp_path / ".o.npy.partial"


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of the header": partial(flip_bit, position=30),
    "a bit of a vector": partial(flip_bit, position=2000),
    "cut short": lambda path: os.truncate(path, 200),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_partial_output_is_refused(damage, interrupted, tmp_path):
    DAMAGES[damage](interrupted / "vectors.npy")
    with pytest.raises(UserError, match="vectors.npy: is damaged; remove the folder"):
        encode(tmp_path, "o.npy")
    assert not (tmp_path / "o.npy").exists()


def change_state(folder: Path, **changes: object) -> None:
    path = folder / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("changes", [{}, {"checksum": None}])
def test_progress_beyond_the_vectors_is_refused(changes, interrupted, tmp_path):
    change_state(interrupted, done=150, **changes)
    with pytest.raises(UserError, match="vectors.npy: is damaged; remove the folder"):
        encode(tmp_path, "o.npy")
    assert not (tmp_path / "o.npy").exists()


def test_damaged_progress_is_refused(interrupted, tmp_path):
    (interrupted / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state.json: not valid JSON: .*; remove the folder .* to start over"):
        encode(tmp_path, "o.npy")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_in_the_folder_of_partial_output_is_kept(kind, texts, tmp_path):
    path = tmp_path / ".o.npy.partial" / "vectors.npy"
    path.parent.mkdir()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(UserError, match="vectors.npy: is not a file; move it away"):
        encode(tmp_path, "o.npy")
    assert path.exists()


def test_file_in_place_of_the_folder_of_partial_output_is_kept(texts, tmp_path):
    (tmp_path / ".o.npy.partial").write_text("mine")
    with pytest.raises(UserError, match=r"\.o\.npy\.partial: is not a folder; move it away"):
        encode(tmp_path, "o.npy")
    assert (tmp_path / ".o.npy.partial").read_text() == "mine"


def test_other_files_in_the_folder_of_partial_output_are_kept(interrupted, tmp_path):
    (interrupted / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"contains other files \(notes.txt\); move it away"):
        encode(tmp_path, "o.npy")
    assert (interrupted / "notes.txt").read_text() == "mine"


def test_texts_that_change_meanwhile_are_refused(texts, tmp_path, monkeypatch):
    def change(embedder, block, settings):
        (tmp_path / "texts.txt").write_text("\n".join(reversed(texts)) + "\n")
        return np.zeros((len(block), embedder.get_embedding_dimension()), np.float32), 0

    monkeypatch.setattr(encoding, "TEXTS_PER_BLOCK", 8)
    monkeypatch.setattr(encoding, "_embed", change)
    (tmp_path / "texts.txt").write_text("\n".join(texts * 40) + "\n")
    texts *= 40
    with pytest.raises(UserError, match="has changed while it was read; start again"):
        encode(tmp_path, "o.npy")
    assert not (tmp_path / "o.npy").exists()


def test_text_without_tokens_is_named(embedder, texts, tmp_path, monkeypatch):
    def fail(*_):
        raise EmptyContentError({}, [3])

    monkeypatch.setattr(encoding, "_embed", fail)
    with pytest.raises(UserError, match=r"texts.txt:4: the tokenizer produces no tokens"):
        encode(tmp_path, "o.npy")


def test_output_in_the_folder_of_the_model_can_be_continued(texts, tmp_path, monkeypatch):
    model = shutil.copytree(MODEL, tmp_path / "model")
    files = model_files(model)
    (model / ".o.npy.partial").mkdir()
    (model / ".o.npy.partial" / "vectors.npy").write_text("")
    assert model_files(model) == files
    assert files.keys() == {path.name for path in MODEL.iterdir()}
