"""Tests of the training program: parity with the original, output files and error messages."""

import json
import logging
import math
import os
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tensorboard.compat.proto.event_pb2 import Event

from codiemb_jax.errors import UserError
from codiemb_jax.train import main
from convert.hf_to_orbax import main as hf_to_orbax
from tests.helpers import golden_settings, read_files, run

IR = "data/news.jsonl"
STS = "data/questions.jsonl"
METRICS = [
    "step", "epoch", "task", "dataset", "loss", "grad_norm", "learning_rate", "tokens", "computed_tokens", "seconds",
]  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Reads TensorBoard scalars by tag and step. A record has a length, a checksum, an event and a checksum."""
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                values[value.tag][event.step] = value.simple_value
            content = content[16 + size :]
    return values


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("task", ["ir", "sts"])
def test_trajectory_matches_original(task, packing, golden, tmp_path):
    data = {"ir": [str(golden / IR)]} if task == "ir" else {"sts": [str(golden / STS)]}
    data["packing"] = packing
    lines = run(golden_settings(golden, tmp_path / "run", data=data), tmp_path)
    expected = json.loads((golden / f"trajectory_{task}.json").read_text())
    assert len(lines) == len(expected) == 8
    for line, golden_line in zip(lines, expected, strict=True):
        assert line["step"] == golden_line["step"]
        assert line["learning_rate"] == pytest.approx(golden_line["lr"], rel=1e-6)
        assert line["loss"] == pytest.approx(golden_line["loss"], rel=5e-4)
        assert line["grad_norm"] == pytest.approx(golden_line["grad_norm"], rel=1e-3)
        # The original pads each pair with four negatives "nothing" of three tokens.
        extra_tokens = 16 * 4 * 3 if task == "sts" else 0
        assert line["tokens"] == golden_line["q_tokens"] + golden_line["p_tokens"] - extra_tokens
        assert line["computed_tokens"] >= line["tokens"]
        if packing:  # equally many rows of 128 tokens on each of the eight devices
            assert line["computed_tokens"] % (8 * 128) == 0
            assert line["computed_tokens"] <= {"ir": 8 * 6, "sts": 16 * 2}[task] * 128
        else:  # one of the row lengths for each text
            lengths = [{"ir": 8 * 6, "sts": 16 * 2}[task] * length for length in (8, 16, 32, 64, 96, 128)]
            assert line["computed_tokens"] in lengths


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("task", ["ir", "sts"])
def test_trajectory_of_pretrained_encoder_matches_original(task, packing, golden, minilm, tmp_path):
    name = {"ir": "small_news", "sts": "small_questions"}[task]
    settings = golden_settings(
        golden, tmp_path / "run",
        model={"path": str(minilm), "pooling": "cls", "dropout": 0.0},
        prompt={"begin": "[CLS]", "passage": "Passage: ", "end": "[SEP]"},
        data={
            task: [str(golden / "data" / f"{name}.jsonl")], "ir_global_batch_size": 4, "sts_global_batch_size": 8,
            "negatives_per_query": 2, "query_max_tokens": 400, "passage_max_tokens": 400, "packing": packing,
        },
        optimizer={"learning_rate": 1e-5, "warmup_steps": 1, "max_steps": 4},
        mesh={"tensor": 2}, export=False,
    )  # fmt: skip
    lines = run(settings, tmp_path)
    expected = json.loads((golden / f"bge_minilm_trajectory_{task}.json").read_text())
    assert len(lines) == len(expected) == 4
    for line, golden_line in zip(lines, expected, strict=True):
        assert line["learning_rate"] == pytest.approx(golden_line["lr"], rel=1e-6)
        # The loss falls to 0.002, from scores of about 50, where float32 numbers are 4e-6 apart.
        assert line["loss"] == pytest.approx(golden_line["loss"], rel=5e-4, abs=2e-6)
        assert line["grad_norm"] == pytest.approx(golden_line["grad_norm"], rel=1e-3)


class MessageHandler(logging.Handler):
    """Collects log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def both_tasks(golden, tmp_path_factory):
    """The folder, metrics and log messages of a run on both tasks for two epochs at learning rate 0."""
    folder = tmp_path_factory.mktemp("both")
    data = {"ir": [str(golden / IR)], "sts": [str(golden / STS)], "ir_global_batch_size": 8}
    evaluation = {"ir": [str(golden / IR)], "sts": [str(golden / STS)]}
    settings = golden_settings(
        golden, folder / "run", data=data, evaluation=evaluation, optimizer={"max_steps": None, "epochs": 2}
    )
    handler = MessageHandler()
    logger = logging.getLogger("jax._src.dispatch")
    logger.addHandler(handler)
    with jax.log_compiles():
        lines = run(settings, folder, "--optimizer.learning_rate", "0")
    logger.removeHandler(handler)
    return folder / "run", lines, handler.messages


def test_compiles_once_per_task_and_shape(both_tasks):
    _, lines, messages = both_tasks
    seen = {(line["task"], line["computed_tokens"]) for line in lines}
    first_epoch = {(line["task"], line["computed_tokens"]) for line in lines if line["epoch"] == 0}
    assert seen == first_epoch  # nothing is compiled in the second epoch
    compiled = [message for message in messages if message.startswith("Finished XLA compilation of jit(step)")]
    assert len(compiled) == len(seen) == 2


def test_export_at_learning_rate_0_is_bitwise_equal(both_tasks, golden):
    folder, _, _ = both_tasks
    original, exported = (load_file(path / "model.safetensors") for path in (golden / "youtu_tiny", folder / "export"))
    assert original.keys() == exported.keys()
    for name, weight in original.items():
        assert weight.dtype == exported[name].dtype
        assert weight.tobytes() == exported[name].tobytes(), name


def test_run_writes_documented_files_and_metrics(both_tasks):
    folder, lines, _ = both_tasks
    names = {
        ".lock",
        "config.yaml",
        "inputs.json",
        "metrics.jsonl",
        "evaluation.json",
        "checkpoints",
        "tensorboard",
        "export",
    }
    assert {path.name for path in folder.iterdir()} == names
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["optimizer"]["learning_rate"] == 0
    assert resolved["seed"] == 49
    assert resolved["model"]["compute_dtype"] == "float32"  # the default on a CPU
    parts = {"ir": ["info_nce", "masked"], "sts": ["mid_info_nce", "pearson", "pro", "rank_kl"]}
    for line in lines:
        assert sorted(line) == sorted(METRICS + parts[line["task"]])
        assert line["dataset"] == {"ir": "news", "sts": "questions"}[line["task"]]
    board = scalars(folder / "tensorboard")
    for line in lines:
        assert board[f"{line['task']}/loss"][line["step"]] == pytest.approx(line["loss"], rel=1e-6)
    assert sum(map(len, (board["ir/loss"], board["sts/loss"]))) == len(lines)


def test_sts_loss_is_weighted_sum_of_parts(both_tasks):
    for line in both_tasks[1]:
        if line["task"] == "sts":
            total = line["mid_info_nce"] + 2 * line["pearson"] + 5 * line["rank_kl"] + 0.5 * line["pro"]
            assert line["loss"] == pytest.approx(total, rel=1e-6)


RETRIEVAL_METRICS = ("nDCG@10", "MRR@10", "Recall@10", "Recall@100", "MAP")


def test_held_out_metrics_do_not_change_at_learning_rate_0(both_tasks):
    metrics = json.loads((both_tasks[0] / "evaluation.json").read_text())
    assert metrics["before"] == metrics["after"]
    retrieval = {f"news {metric}" for metric in RETRIEVAL_METRICS}
    assert metrics["before"].keys() == retrieval | {"questions Spearman", "questions Pearson"}


def snapshot(folder: Path) -> dict[str, Any]:
    """Returns the content of everything in a folder: the bytes of files and the targets of links."""

    def content(path: Path) -> Any:
        if path.is_symlink():
            return "link", str(path.readlink())
        if path.is_file():
            return path.read_bytes()
        return "folder" if path.is_dir() else "other"

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def first_line(path: Path, **changes: Any) -> str:
    """Returns the first line of a JSONL file with other values."""
    return json.dumps(json.loads(path.read_text(encoding="utf-8").splitlines()[0]) | changes, ensure_ascii=False)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy_model(golden: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in (golden / "youtu_tiny").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def remove_pad_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))


def set_string_length(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "512"}))


INVALID_MODELS = {
    "unsupported architecture": (lambda f: change_config(f, model_type="t5"), "model_type 't5' is not supported"),
    "too few layers": (lambda f: change_config(f, num_hidden_layers=5), "missing: layers.4.mlp.up_proj.weight"),
    "too many layers": (lambda f: change_config(f, num_hidden_layers=3), "unexpected: layers.3.mlp.up_proj.weight"),
    "wrong width": (lambda f: change_config(f, intermediate_size=64), "shape: layers.0.mlp.up_proj.weight"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors not found"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no pad token": (remove_pad_token, "no pad token"),
    "string for a length": (set_string_length, "model_max_length: expected a number of at least 1, found '512'"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "unsupported rope": (lambda f: change_config(f, rope_scaling={"type": "yarn"}), "default, linear, llama3"),
    "too few positions": (lambda f: change_config(f, max_position_embeddings=64), "may be at most 64"),
}


@pytest.mark.parametrize("name", INVALID_MODELS)
def test_invalid_model_raises_user_error(name, golden, tmp_path):
    corrupt, message = INVALID_MODELS[name]
    folder = copy_model(golden, tmp_path / "model")
    corrupt(folder)
    settings = golden_settings(golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_run_without_export_as_model_raises_user_error(golden, tmp_path):
    (tmp_path / "earlier" / "checkpoints").mkdir(parents=True)
    (tmp_path / "earlier" / "config.yaml").write_text("")
    model = {"path": str(tmp_path / "earlier")}
    with pytest.raises(UserError, match="earlier is a run without an export; give one of its checkpoints"):
        run(golden_settings(golden, tmp_path / "run", model=model, data={"ir": [str(golden / IR)]}), tmp_path)
    assert not (tmp_path / "run").exists()


def test_run_folder_as_model_uses_its_export(both_tasks, golden, tmp_path):
    model = {"path": str(both_tasks[0])}
    settings = golden_settings(golden, tmp_path / "run", model=model, data={"ir": [str(golden / IR)]})
    settings["optimizer"] = {"learning_rate": 0, "max_steps": 1}
    run(settings, tmp_path)
    earlier, later = (
        (path / "export" / "model.safetensors").read_bytes() for path in (both_tasks[0], tmp_path / "run")
    )
    assert earlier == later


def test_too_long_model_path_raises_user_error(golden, tmp_path):
    settings = golden_settings(golden, tmp_path / "run", model={"path": "x" * 300}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match=r"x+\.\.\. is not a valid path: File name too long"):
        run(settings, tmp_path)


def test_damaged_weights_raise_user_error_before_output_dir_is_created(golden, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    hf_to_orbax(["--model", str(golden / "youtu_tiny"), "--output", str(checkpoint)])
    for path in (checkpoint / "params" / "d").iterdir():
        path.write_bytes(b"")
    settings = golden_settings(
        golden, tmp_path / "run", model={"path": str(checkpoint)}, data={"ir": [str(golden / IR)]}
    )
    with pytest.raises(UserError, match="checkpoint: the checkpoint cannot be read"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_nan_weights_in_the_model_raise_user_error(golden, tmp_path):
    folder = copy_model(golden, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"][3] = np.nan
    save_file(weights, folder / "model.safetensors")
    settings = golden_settings(golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="step 0 .*the model has not been trained yet: check its weights"):
        run(settings, tmp_path)


def test_suspicious_settings_and_data_are_logged(golden, tmp_path, capsys):
    checkpoint, sts = tmp_path / "checkpoint", tmp_path / "sts.jsonl"
    hf_to_orbax(["--model", str(golden / "youtu_tiny"), "--output", str(checkpoint)])
    examples = [json.loads(line) for line in (golden / STS).read_text().splitlines()]
    for example in examples:
        example["positive_scores"] = [5 * example["positive_scores"][0]]
    sts.write_text("".join(json.dumps(example) + "\n" for example in examples))
    low, high = (f"{limit(example['positive_scores'][0] for example in examples):g}" for limit in (min, max))
    settings = golden_settings(
        golden, tmp_path / "run", model={"path": str(checkpoint), "pooling": "last_token", "dropout": 0.1},
        data={"sts": [str(sts)]}, evaluation={"sts": [str(tmp_path / "." / "sts.jsonl")]}, export=False,
    )  # fmt: skip
    run(settings, tmp_path, "--optimizer.max_steps", "1")
    log = capsys.readouterr().err.splitlines()
    assert "attention backend: xla_cpu, xla in training steps because attention has dropout" in log
    assert [line for line in log if line.startswith("note: ")] == [
        f"note: model.pooling is last_token, but {checkpoint} has mean",
        f"note: {sts} is both training and held-out data",
        f"note: {sts} has scores from {low} to {high}; scale them to [0, 1]",
    ]


INVALID_DATA = {
    "missing file": (None, {}, "no such file"),
    "huge score": ({"task_type": "sts", "positive_scores": [1e39]}, {}, "finite number between -1e15 and 1e15"),
    "string score": ({"task_type": "sts", "positive_scores": ["high"]}, {}, r"data.jsonl:1: positive_scores\[0\]"),
    "empty text": ({"query": ["a", "", " : "]}, {}, "data.jsonl:1: query: empty text"),
    "wrong task": ({"task_type": "sts", "positive_scores": [1.0]}, {}, "move it from data.ir to data.sts"),
    "smaller than a batch": ({}, {}, "  data: 1 examples, data.ir_global_batch_size is 8"),
    "max_examples below a batch": ({}, {"max_examples": 1}, "  data: 1 examples, data.ir_global_batch_size is 8"),
    "no-break spaces": ({"query": ["a", "", "\u00a0\u00a0 \u202f"]}, {}, "data.jsonl:1: query: empty text"),
    "empty negative": ({"negatives": [["", "", "\u00a0"]]}, {}, r"data.jsonl:1: negatives\[0\]: empty text"),
    "uneven batches": ({}, {"ir_global_batch_size": 12}, "data.ir_global_batch_size 12 must be a multiple of 8"),
    "unknown setting": ({}, {"ir_batch": 12}, "settings.yaml:4: data.ir_batch: unknown setting"),
}


@pytest.mark.parametrize("name", INVALID_DATA)
def test_invalid_data_raise_user_error(name, golden, tmp_path):
    changes, data, message = INVALID_DATA[name]
    path = tmp_path / "data.jsonl"
    if changes is not None:
        path.write_text(first_line(golden / IR, **changes) + "\n", encoding="utf-8")
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(path)]} | data)
    with pytest.raises(UserError, match=message):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


DAMAGED = {
    "inputs.json: null": (
        "inputs.json",
        b"null",
        "config.yaml and inputs.json, which identify the run, cannot be read",
    ),
    "config.yaml: not YAML": (
        "config.yaml",
        b"a: [",
        "config.yaml and inputs.json, which identify the run, cannot be read",
    ),
    "config.yaml: no settings": ("config.yaml", b"1: 2", "contains a run with other settings"),
    "evaluation.json: truncated": ("evaluation.json", b"{", "evaluation.json: not valid JSON"),
    "evaluation.json: empty object": ("evaluation.json", b"{}", "evaluation.json: has no valid metrics under `before`"),
    "evaluation.json: list": ("evaluation.json", b"[]", "evaluation.json: expected a JSON object"),
    "evaluation.json: null": ("evaluation.json", b"null", "evaluation.json: expected a JSON object"),
    "evaluation.json: before null": ("evaluation.json", b'{"before": null}', "has no valid metrics under `before`"),
    "evaluation.json: string": ("evaluation.json", b'{"before": {"a": "0.5"}}', "has no valid metrics under `before`"),
    "evaluation.json: null metric": ("evaluation.json", b'{"before": {"a": null}}', "has no valid metrics under"),
    "evaluation.json: true": ("evaluation.json", b'{"before": {"a": true}}', "has no valid metrics under `before`"),
    "evaluation.json: NaN": ("evaluation.json", b'{"before": {"a": NaN}}', "has no valid metrics under `before`"),
    "metrics.jsonl: not UTF-8": (
        "metrics.jsonl",
        b"\xff",
        "metrics.jsonl: contains only 0 of the 4 lines before the checkpoint",
    ),
    "checkpoints: file": ("checkpoints", b"", "checkpoints: expected a folder, found a file or a link"),
    "tensorboard: file": ("tensorboard", b"", "tensorboard: expected a folder, found a file or a link"),
    "export: file": ("export", b"", "export: is not a folder"),
    "inputs.json: no version": ("inputs.json", b"{}", "inputs.json is not from a run of this version"),
    "inputs.json: no inputs": ("inputs.json", b'{"codiemb_jax": 1}', "config.yaml and inputs.json, which identify"),
    "inputs.json: other inputs": (
        "inputs.json",
        b'{"codiemb_jax": 1, "inputs": {}}',
        "contains a run with other settings",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_run_raises_user_error(damage, both_tasks, tmp_path):
    name, content, message = DAMAGED[damage]
    folder = tmp_path / "run"
    shutil.copytree(both_tasks[0], folder)
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
    (folder / name).write_bytes(content)
    before = snapshot(folder)
    with pytest.raises(UserError, match=message):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert snapshot(folder) == before
    assert (folder / name).read_bytes() == content


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_run_with_irregular_file_raises_user_error(name, kind, both_tasks, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(both_tasks[0], folder)
    (folder / name).rename(tmp_path / name)
    if kind == "folder":
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(tmp_path / name)
    before = snapshot(folder)
    with pytest.raises(UserError, match=f"{name}: is not a file"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert snapshot(folder) == before


def flip_weight_bit(export: Path) -> None:
    content = bytearray((export / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (export / "model.safetensors").write_bytes(content)


def remove_export_digests(output_dir: Path) -> None:
    path = output_dir / "inputs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exports": []}))


EXPORT_CHANGES = {
    "changed weights": lambda folder: flip_weight_bit(folder / "export"),
    "added file": lambda folder: (folder / "export" / "notes.txt").write_text("mine"),
    "removed file": lambda folder: (folder / "export" / "README.md").unlink(),
    "added folder": lambda folder: (folder / "export" / "notes").mkdir(),
    "export of another run": remove_export_digests,
}


@pytest.mark.parametrize("change", EXPORT_CHANGES)
def test_changed_export_is_not_replaced(change, both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    EXPORT_CHANGES[change](folder)
    before = snapshot(folder)
    with pytest.raises(UserError, match="run/export: already exists, and was not written by this run or was changed"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert snapshot(folder) == before


@pytest.mark.parametrize("target", ["export-elsewhere", "nowhere"])
def test_export_that_is_a_link_is_not_replaced(target, both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    (folder / "export").rename(tmp_path / "export-elsewhere")
    (folder / "export").symlink_to(tmp_path / target)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="run/export: is not a folder"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("files", [["config.yaml"], ["metrics.jsonl"], ["notes.txt"], [".hidden"], ["inputs.json"],
    ["config.yaml", "inputs.json", "notes.txt"], ["export/README.md"], ["checkpoints/2/notes.txt"], ["evaluation.json"],
    ["tensorboard/events"], ["a", "b", "c", "d", "e", "f", "g"]])  # fmt: skip
@pytest.mark.parametrize("content", ["", "{}", "seed: 1\n"])
def test_output_dir_with_other_files_raises_user_error(files, content, golden, tmp_path):
    folder = tmp_path / "run"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    before = snapshot(folder)
    with pytest.raises(UserError, match="run contains (other )?files"):
        run(golden_settings(golden, folder, data={"ir": [str(golden / IR)]}), tmp_path)
    assert snapshot(folder) == before


def test_run_with_other_settings_raises_user_error(both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    before = snapshot(folder)
    for flags in (["--seed", "50"], ["--data.sts", "[]"], ["--optimizer.epochs", "3"], ["--data.max_examples", "16"]):
        with pytest.raises(UserError, match=rf"contains a run with other settings.*\n  {flags[0][2:]}: was "):
            main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder), *flags])
        assert snapshot(folder) == before


def test_run_with_other_settings_and_no_checkpoint_raises_user_error(both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "export")
    before = snapshot(folder)
    with pytest.raises(UserError, match=r"contains a run with other settings.*\n  seed: was 49, now 50"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder), "--seed", "50"])
    assert snapshot(folder) == before


@pytest.mark.parametrize("exports", [None, 3, "x", {}, [3], [{}]])
def test_invalid_export_digests_raise_user_error(exports, both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    inputs = json.loads((folder / "inputs.json").read_text())
    (folder / "inputs.json").write_text(json.dumps(inputs | {"exports": exports}))
    before = snapshot(folder)
    with pytest.raises(UserError, match="run/(export: already exists, and was not written by this run|inputs.json)"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert snapshot(folder) == before


@pytest.mark.parametrize("kind", ["file", "below a file", "link to itself", "broken link", "pipe"])
def test_invalid_output_dir_raises_user_error(kind, golden, tmp_path):
    path = tmp_path / "run"
    if kind in ("file", "below a file"):
        path.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("run" if kind == "link to itself" else "nowhere"))
    before = snapshot(tmp_path)
    output_dir = path / "nested" / "folder" if kind == "below a file" else path
    settings = golden_settings(golden, output_dir, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="^output_dir: .*run"):
        run(settings, tmp_path)
    (tmp_path / "settings.yaml").unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 4000 + "b", "a/" + "x" * 256 + "/b"])
def test_too_long_path_raises_user_error(name, golden, tmp_path):
    settings = golden_settings(golden, tmp_path / "run" / name, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match=r"^output_dir: .* cannot be created: File name too long") as error:
        run(settings, tmp_path)
    assert len(str(error.value)) < 1000
    for section, key in (("data", "ir"), ("data", "sts"), ("evaluation", "ir"), ("evaluation", "sts")):
        settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]})
        settings[section] = settings.get(section, {}) | {key: [str(tmp_path / f"{name}.jsonl")]}
        problem = (
            "cannot be read: File name too long" if name[0] == "x" or len(name) > 4096 else "no such file or folder"
        )
        with pytest.raises(UserError, match=rf"^{section}\.{key}:\n  .*: {problem}"):
            run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_output_dir_may_be_an_empty_folder(golden, tmp_path):
    (tmp_path / "run").mkdir()
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]}, export=False)
    assert len(run(settings, tmp_path, "--optimizer.max_steps", "1")) == 1


def test_output_dir_that_overlaps_with_model_raises_user_error(golden, tmp_path):
    folder = copy_model(golden, tmp_path / "model")
    before = snapshot(folder)
    for output_dir in (folder, folder / "runs" / "mine", folder / ".." / "model", tmp_path):
        settings = golden_settings(golden, output_dir, model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
        with pytest.raises(UserError, match="output_dir: .* overlaps with model.path"):
            run(settings, tmp_path)
        assert snapshot(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "settings.yaml"}


@pytest.mark.parametrize("model", ["run/export", "run", "run/checkpoints/4", "link"])
def test_model_in_output_dir_raises_user_error(model, both_tasks, golden, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    (tmp_path / "link").symlink_to(folder / "export")
    before = snapshot(folder)
    path = tmp_path / model
    settings = golden_settings(golden, folder, model={"path": str(path)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="output_dir: .* overlaps with model.path"):
        run(settings, tmp_path)
    assert snapshot(folder) == before


FILES_IN_OUTPUT_DIR = ["run/news.jsonl", "run/export/news.jsonl", "linked.jsonl"]


@pytest.mark.parametrize("setting", ["data.ir", "evaluation.ir"])
@pytest.mark.parametrize(
    ("path", "finished_run"),
    [*((path, done) for path in FILES_IN_OUTPUT_DIR for done in (False, True)), *((f, False) for f in ("run", "."))],
)
def test_data_that_overlap_with_output_dir_raise_user_error(setting, path, finished_run, both_tasks, golden, tmp_path):
    folder = tmp_path / "run"
    if finished_run:
        shutil.copytree(both_tasks[0], folder)
    (folder / "export").mkdir(parents=True, exist_ok=True)
    for data in (folder, folder / "export"):
        shutil.copy(golden / IR, data / "news.jsonl")
    if path == "linked.jsonl":
        (tmp_path / path).symlink_to(folder / "news.jsonl")
    before = snapshot(folder)
    section, key = setting.split(".")
    settings = golden_settings(golden, folder, data={"ir": [str(golden / IR)]})
    settings[section] = settings.get(section, {}) | {key: [str(tmp_path / path)]}
    with pytest.raises(UserError, match=f"output_dir: .* overlaps with {setting} "):
        run(settings, tmp_path)
    assert snapshot(folder) == before


def test_user_error_exits_with_code_2_and_one_message(tmp_path):
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(tmp_path / "absent.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "absent.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_trajectory_in_chunks_matches_original(packing, golden, tmp_path):
    data = {"ir": [str(golden / IR)], "ir_global_batch_size": 8, "packing": packing}
    expected = json.loads((golden / "trajectory_ir.json").read_text())
    # With tensor parallelism, four row shards have two queries each, one per chunk.
    settings = golden_settings(golden, tmp_path / "run", data=data, mesh={"tensor": 2}, encode_chunks=2, export=False)
    settings["optimizer"]["max_steps"] = 3
    lines = run(settings, tmp_path, "--optimizer.schedule", "constant")
    np.testing.assert_allclose([line["loss"] for line in lines], [g["loss"] for g in expected[:3]], rtol=5e-4)


@pytest.mark.timeout(120)
def test_named_pipe_as_data_raises_user_error(golden, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for section, key in (("data", "ir"), ("evaluation", "sts")):
        settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]})
        settings[section] = settings.get(section, {}) | {key: [str(tmp_path / "pipe.jsonl")]}
        with pytest.raises(UserError, match=rf"{section}.{key}:\n  .*pipe.jsonl: not a file or folder"):
            run(settings, tmp_path)
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(tmp_path / "folder")]})
    (tmp_path / "folder").mkdir()
    (tmp_path / "pipe.jsonl").rename(tmp_path / "folder" / "pipe.jsonl")
    with pytest.raises(UserError, match=r"data.ir:\n  .*folder/pipe.jsonl: not a file"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_data_file_listed_twice_raises_user_error(golden, tmp_path):
    shutil.copy(golden / IR, tmp_path / "a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "a.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(tmp_path / "a.jsonl")
    for setting in ("data", "evaluation"):
        for other in ("a.jsonl", "hard.jsonl", "soft.jsonl", "../" + tmp_path.name + "/a.jsonl"):
            settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]})
            settings[setting] = settings.get(setting, {}) | {"ir": [str(tmp_path / "a.jsonl"), str(tmp_path / other)]}
            message = rf"{setting}.ir:\n  .*a.jsonl and .*{other}: the same file is listed 2 times"
            with pytest.raises(UserError, match=message):
                run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_datasets_with_the_same_stem_have_unique_names_and_meta_data_is_ignored(golden, tmp_path):
    texts = (golden / IR).read_text(encoding="utf-8").splitlines()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.json").write_text("\n".join(texts), encoding="utf-8")
    with_meta = [json.dumps(json.loads(text) | {"meta_data": {"source": [i, None]}}) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(with_meta), encoding="utf-8")
    evaluation = {"ir": [str(folder)]}
    settings = golden_settings(
        golden, tmp_path / "run", data={"ir": [str(folder)]}, evaluation=evaluation, export=False
    )
    settings["optimizer"] = {"learning_rate": 0, "epochs": 1}
    lines = run(settings, tmp_path)
    assert sorted(line["dataset"] for line in lines) == ["a.json", "a.jsonl"]
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())["before"]
    assert metrics.keys() == {f"{name} {metric}" for name in ("a.json", "a.jsonl") for metric in RETRIEVAL_METRICS}
    assert metrics["a.json nDCG@10"] == metrics["a.jsonl nDCG@10"]
    # Each dataset is one batch of the same eight queries, and the model does not change at learning rate 0.
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-5)


BASELINES = {("ir", "cosent"): ["cosent"], ("sts", "info_nce"): ["info_nce"], ("sts", "cosent"): ["cosent"]}


@pytest.mark.parametrize(("task", "objective"), BASELINES)
def test_baselines_of_the_paper_train(task, objective, golden, tmp_path):
    data = {task: [str(golden / {"ir": IR, "sts": STS}[task])]}
    settings = golden_settings(golden, tmp_path / "run", data=data, objective={task: objective}, export=False)
    settings["optimizer"] |= {"max_steps": 2, "warmup_steps": 0}
    lines = run(settings, tmp_path)
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert sorted(line) == sorted(METRICS + BASELINES[task, objective])
        assert line["loss"] == line[objective]
        assert all(math.isfinite(line[name]) for name in ("loss", "grad_norm", objective))
        assert line["grad_norm"] > 0
    assert lines[0]["loss"] != lines[1]["loss"]


def test_ir_cosent_without_negatives_raises_user_error(golden, tmp_path):
    path = tmp_path / "bare.jsonl"
    records = [json.loads(text) | {"negatives": []} for text in (golden / IR).read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    data = {"ir": [str(golden / IR), str(path)]}
    settings = golden_settings(golden, tmp_path / "run", data=data, objective={"ir": "cosent"})
    with pytest.raises(UserError, match="objective.ir: cosent compares positives with negatives, .* in:\n  bare$"):
        run(settings, tmp_path)
    settings["data"]["negatives_per_query"] = 0
    with pytest.raises(UserError, match="objective.ir: cosent .*; set data.negatives_per_query"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_max_examples_limits_each_dataset(golden, tmp_path):
    data = {"sts": [str(golden / STS)], "sts_global_batch_size": 8, "max_examples": 8}
    settings = golden_settings(golden, tmp_path / "run", data=data, export=False)
    settings["optimizer"] = {"learning_rate": 0, "epochs": 3}
    lines = run(settings, tmp_path)  # one batch of 8 pairs per epoch instead of two
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert len({line["tokens"] for line in lines}) == 1  # the same 8 pairs in every epoch


@pytest.fixture
def finished(both_tasks, tmp_path) -> tuple[Path, list[str]]:
    """A copy of the folder of a finished run, and the arguments that continue it."""
    shutil.copytree(both_tasks[0], tmp_path / "run")
    return tmp_path / "run", ["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(tmp_path / "run")]


@pytest.mark.parametrize("name", ["metrics.jsonl", "inputs.json", "evaluation.json", "config.yaml"])
def test_link_named_like_a_temporary_file_is_not_followed(name, finished, tmp_path):
    folder, arguments = finished
    (tmp_path / "mine").write_text("mine")
    (folder / f"{name}.tmp").symlink_to(tmp_path / "mine")
    main(arguments)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (folder / f"{name}.tmp").is_symlink()
    assert not (folder / name).is_symlink()


def test_folder_named_like_an_unfinished_export_is_kept(finished):
    folder, arguments = finished
    (folder / ".export.unfinished").mkdir()
    (folder / ".export.unfinished" / "mine").write_text("mine")
    main(arguments)
    assert (folder / ".export.unfinished" / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_link_to_a_folder_is_not_followed(name, finished, tmp_path):
    folder, arguments = finished
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    before = read_files(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: expected a folder, found a file or a link"):
        main(arguments)
    assert read_files(tmp_path / "elsewhere") == before


def test_other_folder_among_checkpoints_is_not_deleted(finished):
    folder, arguments = finished
    (folder / "checkpoints" / "1").mkdir()
    (folder / "checkpoints" / "1" / "mine").write_text("mine")
    with pytest.raises(UserError, match="checkpoints/1: is not a checkpoint of this run; move it away"):
        main([*arguments, "--checkpoint.keep", "1"])
    assert (folder / "checkpoints" / "1" / "mine").read_text() == "mine"


METRICS_DAMAGE = {
    "last bytes missing": lambda content: content[:-3],
    "second half missing": lambda content: content[: len(content) // 2],
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "two lines swapped": lambda content: b"".join(content.splitlines(keepends=True)[i] for i in (1, 0, 2, 3)),
}


@pytest.mark.parametrize("damage", METRICS_DAMAGE)
def test_damaged_metrics_raise_user_error(damage, finished):
    folder, arguments = finished
    path = folder / "metrics.jsonl"
    path.write_bytes(damaged := METRICS_DAMAGE[damage](path.read_bytes()))
    with pytest.raises(UserError, match=r"metrics.jsonl: contains only [0-3] of the 4 lines before the checkpoint"):
        main(arguments)
    assert path.read_bytes() == damaged


def test_nonfinite_weights_are_not_saved_or_exported(golden, tmp_path):
    folder = copy_model(golden, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"][-1] = 1e30  # embedding of a token that is in no text
    save_file(weights, folder / "model.safetensors")
    settings = golden_settings(golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
    settings["optimizer"] = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e15, "weight_decay": 1e15}
    with pytest.raises(UserError, match="step 0: the update made weights NaN or infinite; lower optimizer.learning"):
        run(settings, tmp_path)
    assert not (tmp_path / "run" / "export").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_resumed_run_uses_passthrough_weights_of_its_checkpoint(golden, tmp_path):
    """The weights in the model's folder have changed since."""
    folder = copy_model(golden, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    head = np.full((2000, 96), 2, np.float32)
    save_file(weights | {"lm_head.weight": head}, folder / "model.safetensors")
    settings = golden_settings(
        golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]},
        checkpoint={"every_steps": 1}, optimizer={"max_steps": 2},
    )  # fmt: skip
    run(settings, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    save_file(weights | {"lm_head.weight": head * 7}, folder / "model.safetensors")
    run(settings, tmp_path)
    exported = load_file(tmp_path / "run" / "export" / "model.safetensors")["lm_head.weight"]
    assert exported.tobytes() == head.tobytes()


@pytest.mark.parametrize("folder", ["data", "run"])
def test_cache_inside_data_or_output_dir_raises_user_error(folder, golden, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copy(golden / IR, tmp_path / "data")
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / folder / "cache"))
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(tmp_path / "data")]})
    with pytest.raises(UserError, match=f"the cache .* is inside {tmp_path / folder}; set CODIEMB_JAX_CACHE"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_damaged_cache_raises_user_error(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]}, export=False)
    settings["optimizer"] = {"max_steps": 1}
    run(settings, tmp_path)
    (prepared,) = (tmp_path / "cache").iterdir()
    for pattern in ("index/query_tokens.npy", "index/manifest.json", "**/*.array_record*", "**/dataset_info.json"):
        (path,) = prepared.glob(pattern)
        content = path.read_bytes()
        for damaged in (b"", content[: len(content) // 2]):
            path.write_bytes(damaged)
            settings["output_dir"] = str(tmp_path / f"run {pattern[-4:]} {len(damaged)}")
            with pytest.raises(UserError, match=f"{prepared}: the prepared dataset is damaged .*; delete the folder"):
                run(settings, tmp_path)
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["wandb", ".wandb", "tensorboard"])
def test_link_in_place_of_a_folder_of_a_tracker_is_refused(name, finished, tmp_path):
    folder, arguments = finished
    if (folder / name).exists():
        shutil.rmtree(folder / name)
    (folder / name).symlink_to(tmp_path)
    with pytest.raises(UserError, match=f"{name}: expected a folder, found a file or a link; move it away"):
        main(arguments)
