"""The training program as a user meets it: figures of the original, what it leaves, what it refuses."""

import json
import logging
import math
import os
import shutil
import struct
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
from codiemb_jax.program import run_program
from codiemb_jax.train import main
from convert.hf_to_orbax import main as hf_to_orbax
from tests.helpers import content_of, golden_settings, run

IR = "data/news.jsonl"
STS = "data/questions.jsonl"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's figures by tag and step: records of length, checksum, event, checksum."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                found[value.tag][event.step] = value.simple_value
            content = content[16 + size :]
    return found


@pytest.mark.parametrize("task", ["ir", "sts"])
def test_trajectory_is_that_of_the_original(task, golden, tmp_path):
    data = {"ir": [str(golden / IR)]} if task == "ir" else {"sts": [str(golden / STS)]}
    lines = run(golden_settings(golden, tmp_path / "run", data=data), tmp_path)
    expected = json.loads((golden / f"trajectory_{task}.json").read_text())
    assert len(lines) == len(expected) == 8
    for line, golden_line in zip(lines, expected, strict=True):
        assert line["step"] == golden_line["step"]
        assert line["learning_rate"] == pytest.approx(golden_line["lr"], rel=1e-6)
        assert line["loss"] == pytest.approx(golden_line["loss"], rel=5e-4)
        assert line["grad_norm"] == pytest.approx(golden_line["grad_norm"], rel=1e-3)
        # Of a pair with no negatives the original counts four texts "nothing" more, three tokens each.
        missing = 16 * 4 * 3 if task == "sts" else 0
        assert line["tokens"] == golden_line["q_tokens"] + golden_line["p_tokens"] - missing


@pytest.mark.parametrize("task", ["ir", "sts"])
def test_trajectory_of_a_real_encoder_is_that_of_the_original(task, golden, minilm, tmp_path):
    name = {"ir": "small_news", "sts": "small_questions"}[task]
    settings = golden_settings(
        golden, tmp_path / "run",
        model={"path": str(minilm), "pooling": "cls", "dropout": 0.0},
        prompt={"begin": "[CLS]", "passage": "Passage: ", "end": "[SEP]"},
        data={
            task: [str(golden / "data" / f"{name}.jsonl")], "ir_global_batch_size": 4, "sts_global_batch_size": 8,
            "negatives_per_query": 2, "query_max_tokens": 400, "passage_max_tokens": 400,
        },
        optimizer={"learning_rate": 1e-5, "warmup_steps": 1, "max_steps": 4},
        mesh={"tensor": 2}, export=False,
    )  # fmt: skip
    lines = run(settings, tmp_path)
    expected = json.loads((golden / f"bge_minilm_trajectory_{task}.json").read_text())
    assert len(lines) == len(expected) == 4
    for line, golden_line in zip(lines, expected, strict=True):
        assert line["learning_rate"] == pytest.approx(golden_line["lr"], rel=1e-6)
        assert line["loss"] == pytest.approx(golden_line["loss"], rel=5e-4)
        assert line["grad_norm"] == pytest.approx(golden_line["grad_norm"], rel=1e-3)


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture(scope="module")
def both_tasks(golden, tmp_path_factory):
    """Settings and lines of a run of both tasks over two epochs, at learning rate 0, and what it logged."""
    folder = tmp_path_factory.mktemp("both")
    data = {"ir": [str(golden / IR)], "sts": [str(golden / STS)], "ir_global_batch_size": 8}
    evaluation = {"ir": [str(golden / IR)], "sts": [str(golden / STS)]}
    settings = golden_settings(
        golden, folder / "run", data=data, evaluation=evaluation, optimizer={"max_steps": None, "epochs": 2}
    )
    handler = Messages()
    logger = logging.getLogger("jax._src.dispatch")
    logger.addHandler(handler)
    with jax.log_compiles():
        lines = run(settings, folder, "--optimizer.learning_rate", "0")
    logger.removeHandler(handler)
    return folder / "run", lines, handler.texts


def test_it_compiles_once_a_task_and_shape(both_tasks):
    _, lines, messages = both_tasks
    met = {(line["task"], line["computed_tokens"]) for line in lines}
    first_epoch = {(line["task"], line["computed_tokens"]) for line in lines if line["epoch"] == 0}
    assert met == first_epoch  # so that the second epoch has nothing to compile
    compiled = [message for message in messages if message.startswith("Finished XLA compilation of jit(step)")]
    assert len(compiled) == len(met) == 2


def test_learning_rate_0_exports_the_weights_that_went_in(both_tasks, golden):
    folder, _, _ = both_tasks
    came, went = (load_file(path / "model.safetensors") for path in (golden / "youtu_tiny", folder / "export"))
    assert came.keys() == went.keys()
    for name, weight in came.items():
        assert weight.dtype == went[name].dtype
        assert weight.tobytes() == went[name].tobytes(), name


def test_a_run_leaves_what_it_promises(both_tasks):
    folder, lines, _ = both_tasks
    names = {"config.yaml", "inputs.json", "metrics.jsonl", "evaluation.json", "checkpoints", "tensorboard", "export"}
    assert {path.name for path in folder.iterdir()} == names
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["optimizer"]["learning_rate"] == 0
    assert resolved["seed"] == 49
    assert resolved["model"]["compute_dtype"] == "float32"  # the default on a CPU
    common = ["step", "epoch", "task", "dataset", "loss"]
    parts = {"ir": ["info_nce"], "sts": ["mid_info_nce", "pearson", "pro", "rank_kl"]}
    rest = ["grad_norm", "learning_rate", "tokens", "computed_tokens", "seconds"]
    for line in lines:
        assert sorted(line) == sorted(common + parts[line["task"]] + rest)
        assert line["dataset"] == {"ir": "news", "sts": "questions"}[line["task"]]
    board = scalars(folder / "tensorboard")
    for line in lines:
        assert board[f"{line['task']}/loss"][line["step"]] == pytest.approx(line["loss"], rel=1e-6)
    assert sum(map(len, (board["ir/loss"], board["sts/loss"]))) == len(lines)


def test_sts_loss_is_the_weighted_sum_of_its_parts(both_tasks):
    for line in both_tasks[1]:
        if line["task"] == "sts":
            total = line["mid_info_nce"] + 2 * line["pearson"] + 5 * line["rank_kl"] + 0.5 * line["pro"]
            assert line["loss"] == pytest.approx(total, rel=1e-6)


def test_held_out_figures_are_those_of_an_unchanged_model(both_tasks):
    figures = json.loads((both_tasks[0] / "evaluation.json").read_text())
    assert figures["before"] == figures["after"]
    assert figures["before"].keys() == {"news nDCG@10", "questions Spearman"}


def contents(folder: Path) -> dict[str, Any]:
    """All that is in a folder: the bytes of files, the targets of links."""

    def content(path: Path) -> Any:
        if path.is_symlink():
            return "link", str(path.readlink())
        if path.is_file():
            return path.read_bytes()
        return "folder" if path.is_dir() else "neither file nor folder"

    return {str(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def first_line(path: Path, **changes: Any) -> str:
    return json.dumps(json.loads(path.read_text(encoding="utf-8").splitlines()[0]) | changes, ensure_ascii=False)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy_model(golden: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in (golden / "youtu_tiny").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def no_pad_token(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))


def long_as_text(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "512"}))


MODEL_MISTAKES = {
    "another architecture": (lambda f: change_config(f, model_type="t5"), "model_type 't5' is not supported"),
    "too few layers": (lambda f: change_config(f, num_hidden_layers=5), "missing: layers.4.mlp.up_proj.weight"),
    "too many layers": (lambda f: change_config(f, num_hidden_layers=3), "left over: layers.3.mlp.up_proj.weight"),
    "another width": (lambda f: change_config(f, intermediate_size=64), "shape: layers.0.mlp.up_proj.weight"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors not found"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no pad token": (no_pad_token, "no pad token"),
    "text for a length": (long_as_text, "model_max_length: expected a number of at least 1, found '512'"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "another rope": (lambda f: change_config(f, rope_scaling={"type": "yarn"}), "default, linear, llama3"),
    "few positions": (lambda f: change_config(f, max_position_embeddings=64), "may be at most 64"),
}


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_model_that_cannot_be_used_is_told(mistake, golden, tmp_path):
    spoil, message = MODEL_MISTAKES[mistake]
    folder = copy_model(golden, tmp_path / "model")
    spoil(folder)
    settings = golden_settings(golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_folder_of_a_run_without_an_export_is_not_taken_for_a_model(golden, tmp_path):
    (tmp_path / "earlier" / "checkpoints").mkdir(parents=True)
    (tmp_path / "earlier" / "config.yaml").write_text("")
    model = {"path": str(tmp_path / "earlier")}
    with pytest.raises(UserError, match="earlier is the folder of a run that has no export; give one of its checkpoi"):
        run(golden_settings(golden, tmp_path / "run", model=model, data={"ir": [str(golden / IR)]}), tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_folder_of_a_run_stands_for_its_export(both_tasks, golden, tmp_path):
    model = {"path": str(both_tasks[0])}
    settings = golden_settings(golden, tmp_path / "run", model=model, data={"ir": [str(golden / IR)]})
    settings["optimizer"] = {"learning_rate": 0, "max_steps": 1}
    run(settings, tmp_path)
    earlier, later = (
        (path / "export" / "model.safetensors").read_bytes() for path in (both_tasks[0], tmp_path / "run")
    )
    assert earlier == later


def test_an_overlong_model_path_is_told(golden, tmp_path):
    settings = golden_settings(golden, tmp_path / "run", model={"path": "x" * 300}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match=r"x+\.\.\. cannot be a folder: File name too long"):
        run(settings, tmp_path)


def test_weights_that_cannot_be_read_leave_no_run(golden, tmp_path):
    """A checkpoint whose params are damaged: found when they are read, before output_dir is made."""
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


def test_a_model_that_is_not_finite_is_blamed_and_not_the_rate(golden, tmp_path):
    folder = copy_model(golden, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"][3] = np.nan
    save_file(weights, folder / "model.safetensors")
    settings = golden_settings(golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="step 0 .*nothing has been trained yet: look for weights in the model"):
        run(settings, tmp_path)


def test_it_is_told_if_a_folder_pooled_otherwise(golden, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    hf_to_orbax(["--model", str(golden / "youtu_tiny"), "--output", str(checkpoint)])
    model = {"path": str(checkpoint), "pooling": "last_token"}
    settings = golden_settings(golden, tmp_path / "run", model=model, data={"ir": [str(golden / IR)]}, export=False)
    run(settings, tmp_path, "--optimizer.max_steps", "1")
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")] == [
        f"note: model.pooling is last_token, {checkpoint} has mean"
    ]


DATA_MISTAKES = {
    "missing file": (None, {}, "no such file"),
    "huge score": ({"task_type": "sts", "positive_scores": [1e39]}, {}, "finite number, at most 1e15"),
    "wrong score": ({"task_type": "sts", "positive_scores": ["high"]}, {}, r"data.jsonl:1: positive_scores\[0\]"),
    "empty text": ({"query": ["a", "", " : "]}, {}, "data.jsonl:1: query: the text is empty"),
    "wrong task": ({"task_type": "sts", "positive_scores": [1.0]}, {}, "move it from data.ir to data.sts"),
    "too small": ({}, {}, "  data: 1 examples, data.ir_global_batch_size is 8"),
    "fewer than a batch used": ({}, {"max_examples": 1}, "  data: 1 examples, data.ir_global_batch_size is 8"),
    "no-break spaces": ({"query": ["a", "", "\u00a0\u00a0 \u202f"]}, {}, "data.jsonl:1: query: the text is empty"),
    "empty negative": ({"negatives": [["", "", "\u00a0"]]}, {}, r"data.jsonl:1: negatives\[0\]: the text is empty"),
    "odd batch": ({}, {"ir_global_batch_size": 12}, "data.ir_global_batch_size 12 must be a multiple of 8"),
    "unknown setting": ({}, {"ir_batch": 12}, "settings.yaml:4: data.ir_batch: unknown setting"),
}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_data_that_cannot_be_used_is_told(mistake, golden, tmp_path):
    changes, data, message = DATA_MISTAKES[mistake]
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
        "config.yaml and inputs.json, which say what run they are of, cannot be read",
    ),
    "config.yaml: not YAML": (
        "config.yaml",
        b"a: [",
        "config.yaml and inputs.json, which say what run .* cannot be read",
    ),
    "config.yaml: no settings": ("config.yaml", b"1: 2", "holds a run with other settings"),
    "evaluation.json: cut off": ("evaluation.json", b"{", "evaluation.json: not valid JSON"),
    "evaluation.json: another": ("evaluation.json", b"{}", "evaluation.json: holds no metrics under `before`"),
    "evaluation.json: a list": ("evaluation.json", b"[]", "evaluation.json: expected a JSON object"),
    "evaluation.json: null": ("evaluation.json", b"null", "evaluation.json: expected a JSON object"),
    "evaluation.json: before null": ("evaluation.json", b'{"before": null}', "holds no metrics under `before`"),
    "evaluation.json: a text": ("evaluation.json", b'{"before": {"a": "0.5"}}', "holds no metrics under `before`"),
    "evaluation.json: null for a number": ("evaluation.json", b'{"before": {"a": null}}', "holds no metrics under"),
    "evaluation.json: true": ("evaluation.json", b'{"before": {"a": true}}', "holds no metrics under `before`"),
    "evaluation.json: NaN": ("evaluation.json", b'{"before": {"a": NaN}}', "holds no metrics under `before`"),
    "metrics.jsonl: not text": (
        "metrics.jsonl",
        b"\xff",
        "metrics.jsonl: holds 0 of the 4 lines before the checkpoint",
    ),
    "checkpoints: a file": ("checkpoints", b"", "checkpoints: is a file or a link, and should be a folder"),
    "tensorboard: a file": ("tensorboard", b"", "tensorboard: is a file or a link, and should be a folder"),
    "export: a file": ("export", b"", "export: is not a folder"),
    "inputs.json: a foreign one": ("inputs.json", b"{}", "inputs.json is not that of a run"),
    "inputs.json: no inputs": ("inputs.json", b'{"codiemb_jax": 1}', "config.yaml and inputs.json, which say"),
    "inputs.json: other inputs": (
        "inputs.json",
        b'{"codiemb_jax": 1, "inputs": {}}',
        "holds a run with other settings",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_run_is_not_continued(damage, both_tasks, tmp_path):
    name, content, message = DAMAGED[damage]
    folder = tmp_path / "run"
    shutil.copytree(both_tasks[0], folder)
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
    (folder / name).write_bytes(content)
    before = contents(folder)
    with pytest.raises(UserError, match=message):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert contents(folder) == before
    assert (folder / name).read_bytes() == content


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_a_run_whose_files_are_none_is_not_continued(name, kind, both_tasks, tmp_path):
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
    before = contents(folder)
    with pytest.raises(UserError, match=f"{name}: is not a file"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert contents(folder) == before


def change_weights(export: Path) -> None:
    content = bytearray((export / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (export / "model.safetensors").write_bytes(content)


def forget_exports(output_dir: Path) -> None:
    path = output_dir / "inputs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exports": []}))


FOREIGN_EXPORTS = {
    "changed weights": lambda folder: change_weights(folder / "export"),
    "a file added": lambda folder: (folder / "export" / "notes.txt").write_text("mine"),
    "a file removed": lambda folder: (folder / "export" / "README.md").unlink(),
    "a folder added": lambda folder: (folder / "export" / "notes").mkdir(),
    "of another run": forget_exports,
}


@pytest.mark.parametrize("change", FOREIGN_EXPORTS)
def test_an_export_that_the_run_has_not_written_stays(change, both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    FOREIGN_EXPORTS[change](folder)
    before = contents(folder)
    with pytest.raises(UserError, match="run/export: exists, and this run has not written it, or it has been changed"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert contents(folder) == before


@pytest.mark.parametrize("target", ["export-elsewhere", "nowhere"])
def test_an_export_that_is_a_link_stays(target, both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    (folder / "export").rename(tmp_path / "export-elsewhere")
    (folder / "export").symlink_to(tmp_path / target)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="run/export: is not a folder"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("files", [["config.yaml"], ["metrics.jsonl"], ["notes.txt"], [".hidden"], ["inputs.json"],
    ["config.yaml", "inputs.json", "notes.txt"], ["export/README.md"], ["checkpoints/2/notes.txt"], ["evaluation.json"],
    ["tensorboard/events"], ["a", "b", "c", "d", "e", "f", "g"]])  # fmt: skip
@pytest.mark.parametrize("content", ["", "{}", "seed: 1\n"])
def test_a_folder_of_other_files_is_no_output_dir(files, content, golden, tmp_path):
    folder = tmp_path / "run"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    before = contents(folder)
    with pytest.raises(UserError, match="run holds (other )?files"):
        run(golden_settings(golden, folder, data={"ir": [str(golden / IR)]}), tmp_path)
    assert contents(folder) == before


def test_a_run_with_other_settings_stays(both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    before = contents(folder)
    for flags in (["--seed", "50"], ["--data.sts", "[]"], ["--optimizer.epochs", "3"], ["--data.max_examples", "16"]):
        with pytest.raises(UserError, match=rf"holds a run with other settings.*\n  {flags[0][2:]}: was "):
            main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder), *flags])
        assert contents(folder) == before


def test_a_run_with_other_settings_stays_even_without_a_checkpoint(both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "export")
    before = contents(folder)
    with pytest.raises(UserError, match=r"holds a run with other settings.*\n  seed: was 49, now 50"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder), "--seed", "50"])
    assert contents(folder) == before


@pytest.mark.parametrize("exports", [None, 3, "x", {}, [3]])
def test_a_run_that_does_not_say_what_it_has_exported(exports, both_tasks, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    inputs = json.loads((folder / "inputs.json").read_text())
    (folder / "inputs.json").write_text(json.dumps(inputs | {"exports": exports}))
    before = contents(folder)
    with pytest.raises(UserError, match="run/(export: exists, and this run has not written it|inputs.json)"):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert contents(folder) == before


@pytest.mark.parametrize("kind", ["a file", "below a file", "a link to itself", "a link to nowhere", "a pipe"])
def test_an_output_dir_that_cannot_be_one(kind, golden, tmp_path):
    path = tmp_path / "run"
    if kind in ("a file", "below a file"):
        path.write_text("mine")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("run" if kind == "a link to itself" else "nowhere"))
    before = contents(tmp_path)
    output_dir = path / "below" / "it" if kind == "below a file" else path
    settings = golden_settings(golden, output_dir, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="^output_dir: .*run"):
        run(settings, tmp_path)
    (tmp_path / "settings.yaml").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 256, "a/" * 4000 + "b", "a/" + "x" * 256 + "/b"])
def test_a_path_that_is_too_long(name, golden, tmp_path):
    settings = golden_settings(golden, tmp_path / "run" / name, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match=r"^output_dir: .* cannot be created: File name too long") as caught:
        run(settings, tmp_path)
    assert len(str(caught.value)) < 1000
    for section, key in (("data", "ir"), ("data", "sts"), ("evaluation", "ir"), ("evaluation", "sts")):
        settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]})
        settings[section] = settings.get(section, {}) | {key: [str(tmp_path / f"{name}.jsonl")]}
        problem = (
            "cannot be read: File name too long" if name[0] == "x" or len(name) > 4096 else "no such file or folder"
        )
        with pytest.raises(UserError, match=rf"^{section}\.{key}:\n  .*: {problem}"):
            run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_an_output_dir(golden, tmp_path):
    (tmp_path / "run").mkdir()
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]}, export=False)
    assert len(run(settings, tmp_path, "--optimizer.max_steps", "1")) == 1


def test_a_model_folder_is_not_its_own_output_dir(golden, tmp_path):
    folder = copy_model(golden, tmp_path / "model")
    before = contents(folder)
    for output_dir in (folder, folder / "runs" / "mine", folder / ".." / "model", tmp_path):
        settings = golden_settings(golden, output_dir, model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
        with pytest.raises(UserError, match="output_dir: .* contains, or lies in, model.path"):
            run(settings, tmp_path)
        assert contents(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "settings.yaml"}


@pytest.mark.parametrize("model", ["run/export", "run", "run/checkpoints/4", "link"])
def test_a_run_does_not_train_what_it_has_written(model, both_tasks, golden, tmp_path):
    folder = shutil.copytree(both_tasks[0], tmp_path / "run")
    (tmp_path / "link").symlink_to(folder / "export")
    before = contents(folder)
    path = tmp_path / model
    settings = golden_settings(golden, folder, model={"path": str(path)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="output_dir: .* contains, or lies in, model.path"):
        run(settings, tmp_path)
    assert contents(folder) == before


FILES_IN_OUTPUT_DIR = ["run/news.jsonl", "run/export/news.jsonl", "linked.jsonl"]


@pytest.mark.parametrize("setting", ["data.ir", "evaluation.ir"])
@pytest.mark.parametrize(
    ("place", "finished_run"),
    [*((place, done) for place in FILES_IN_OUTPUT_DIR for done in (False, True)), *((f, False) for f in ("run", "."))],
)
def test_data_do_not_lie_in_output_dir(setting, place, finished_run, both_tasks, golden, tmp_path):
    folder = tmp_path / "run"
    if finished_run:
        shutil.copytree(both_tasks[0], folder)
    (folder / "export").mkdir(parents=True, exist_ok=True)
    for data in (folder, folder / "export"):
        shutil.copy(golden / IR, data / "news.jsonl")
    if place == "linked.jsonl":
        (tmp_path / place).symlink_to(folder / "news.jsonl")
    before = contents(folder)
    section, key = setting.split(".")
    settings = golden_settings(golden, folder, data={"ir": [str(golden / IR)]})
    settings[section] = settings.get(section, {}) | {key: [str(tmp_path / place)]}
    with pytest.raises(UserError, match=f"output_dir: .* contains, or lies in, {setting} "):
        run(settings, tmp_path)
    assert contents(folder) == before


def test_a_mistake_ends_the_program_with_2_and_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_program(lambda: main(["--config", str(tmp_path / "absent.yaml")]))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "absent.yaml" in error
    assert "Traceback" not in error


def test_chunks_take_the_same_steps(golden, tmp_path):
    data = {"ir": [str(golden / IR)], "ir_global_batch_size": 8}
    expected = json.loads((golden / "trajectory_ir.json").read_text())
    # Eight devices hold a query each, so chunks need a mesh that puts more on one.
    settings = golden_settings(golden, tmp_path / "run", data=data, mesh={"tensor": 2}, encode_chunks=2, export=False)
    settings["optimizer"]["max_steps"] = 3
    lines = run(settings, tmp_path, "--optimizer.schedule", "constant")
    np.testing.assert_allclose([line["loss"] for line in lines], [g["loss"] for g in expected[:3]], rtol=5e-4)


@pytest.mark.timeout(120)
def test_a_named_pipe_is_no_data_file(golden, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for section, key in (("data", "ir"), ("evaluation", "sts")):
        settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]})
        settings[section] = settings.get(section, {}) | {key: [str(tmp_path / "pipe.jsonl")]}
        with pytest.raises(UserError, match=rf"{section}.{key}:\n  .*pipe.jsonl: is neither a file nor a folder"):
            run(settings, tmp_path)
    # In a folder it is no file, like all that is not called .json or .jsonl.
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(tmp_path / "folder")]})
    (tmp_path / "folder").mkdir()
    (tmp_path / "pipe.jsonl").rename(tmp_path / "folder" / "pipe.jsonl")
    with pytest.raises(UserError, match="folder: the folder holds no .json or .jsonl file"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_same_data_file_under_two_names(golden, tmp_path):
    shutil.copy(golden / IR, tmp_path / "a.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(tmp_path / "a.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(tmp_path / "a.jsonl")
    for setting in ("data", "evaluation"):
        for other in ("a.jsonl", "hard.jsonl", "soft.jsonl", "../" + tmp_path.name + "/a.jsonl"):
            settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]})
            settings[setting] = settings.get(setting, {}) | {"ir": [str(tmp_path / "a.jsonl"), str(tmp_path / other)]}
            with pytest.raises(UserError, match=rf"{setting}.ir:\n  .*a.jsonl and .*{other}: the same file 2 times"):
                run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_data_sets_with_one_stem_are_told_apart_and_meta_data_is_not_read(golden, tmp_path):
    texts = (golden / IR).read_text(encoding="utf-8").splitlines()
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.json").write_text("\n".join(texts), encoding="utf-8")
    described = [json.dumps(json.loads(text) | {"meta_data": {"source": [i, None]}}) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(described), encoding="utf-8")
    evaluation = {"ir": [str(folder)]}
    settings = golden_settings(
        golden, tmp_path / "run", data={"ir": [str(folder)]}, evaluation=evaluation, export=False
    )
    settings["optimizer"] = {"learning_rate": 0, "epochs": 1}
    lines = run(settings, tmp_path)
    assert sorted(line["dataset"] for line in lines) == ["a.json", "a.jsonl"]
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())["before"]
    assert metrics.keys() == {"a.json nDCG@10", "a.jsonl nDCG@10"}
    assert metrics["a.json nDCG@10"] == metrics["a.jsonl nDCG@10"]
    # Each is one batch of the same eight queries, and at learning rate 0 the model is the same.
    assert lines[0]["loss"] == pytest.approx(lines[1]["loss"], rel=1e-5)


BASELINES = {("ir", "cosent"): ["cosent"], ("sts", "info_nce"): ["info_nce"], ("sts", "cosent"): ["cosent"]}


@pytest.mark.parametrize(("task", "objective"), BASELINES)
def test_the_baselines_of_the_paper_train(task, objective, golden, tmp_path):
    data = {task: [str(golden / {"ir": IR, "sts": STS}[task])]}
    settings = golden_settings(golden, tmp_path / "run", data=data, objective={task: objective}, export=False)
    settings["optimizer"] |= {"max_steps": 2, "warmup_steps": 0}
    lines = run(settings, tmp_path)
    assert [line["step"] for line in lines] == [0, 1]
    common = ["step", "epoch", "task", "dataset", "loss"]
    rest = ["grad_norm", "learning_rate", "tokens", "computed_tokens", "seconds"]
    for line in lines:
        assert sorted(line) == sorted(common + BASELINES[task, objective] + rest)
        assert line["loss"] == line[objective]
        assert all(math.isfinite(line[name]) for name in ("loss", "grad_norm", objective))
        assert line["grad_norm"] > 0
    assert lines[0]["loss"] != lines[1]["loss"]


def test_cosent_of_retrieval_needs_negatives_in_the_data(golden, tmp_path):
    path = tmp_path / "bare.jsonl"
    records = [json.loads(text) | {"negatives": []} for text in (golden / IR).read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    data = {"ir": [str(golden / IR), str(path)]}
    settings = golden_settings(golden, tmp_path / "run", data=data, objective={"ir": "cosent"})
    with pytest.raises(UserError, match="objective.ir: cosent compares positives with negatives, .* in:\n  bare$"):
        run(settings, tmp_path)
    settings["data"]["negatives_per_query"] = 0
    with pytest.raises(UserError, match="objective.ir: cosent .*: set data.negatives_per_query"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_max_examples_caps_each_data_set(golden, tmp_path):
    data = {"sts": [str(golden / STS)], "sts_global_batch_size": 8, "max_examples": 8}
    settings = golden_settings(golden, tmp_path / "run", data=data, export=False)
    settings["optimizer"] = {"learning_rate": 0, "epochs": 3}
    lines = run(settings, tmp_path)  # of 16 pairs, which make two batches, one is left
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert len({line["tokens"] for line in lines}) == 1  # always the same eight


@pytest.fixture
def finished(both_tasks, tmp_path) -> tuple[Path, list[str]]:
    """A copy of a finished run's folder, and the arguments that continue it."""
    shutil.copytree(both_tasks[0], tmp_path / "run")
    return tmp_path / "run", ["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(tmp_path / "run")]


@pytest.mark.parametrize("name", ["metrics.jsonl", "inputs.json", "evaluation.json", "config.yaml"])
def test_a_link_with_the_name_of_a_temporary_file_is_left_alone(name, finished, tmp_path):
    folder, arguments = finished
    (tmp_path / "mine").write_text("mine")
    (folder / f"{name}.tmp").symlink_to(tmp_path / "mine")
    main(arguments)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (folder / f"{name}.tmp").is_symlink()
    assert not (folder / name).is_symlink()


def test_what_looks_like_an_unfinished_export_is_left_alone(finished):
    folder, arguments = finished
    (folder / ".export.unfinished").mkdir()
    (folder / ".export.unfinished" / "mine").write_text("mine")
    main(arguments)
    assert (folder / ".export.unfinished" / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_folder_that_is_a_link_is_not_written_through(name, finished, tmp_path):
    folder, arguments = finished
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    before = content_of(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: is a file or a link, and should be a folder"):
        main(arguments)
    assert content_of(tmp_path / "elsewhere") == before


def test_a_folder_among_the_checkpoints_that_is_none_is_not_deleted(finished):
    folder, arguments = finished
    (folder / "checkpoints" / "0").mkdir()
    (folder / "checkpoints" / "0" / "mine").write_text("mine")
    with pytest.raises(UserError, match="checkpoints/0: is not a checkpoint of this run; move it away"):
        main([*arguments, "--checkpoint.keep", "1"])
    assert (folder / "checkpoints" / "0" / "mine").read_text() == "mine"


SPOILT = {
    "cut off": lambda content: content[:-3],
    "cut in half": lambda content: content[: len(content) // 2],
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "two lines exchanged": lambda content: b"".join(content.splitlines(keepends=True)[i] for i in (1, 0, 2, 3)),
}


@pytest.mark.parametrize("how", SPOILT)
def test_damaged_lines_of_metrics_are_not_kept(how, finished):
    folder, arguments = finished
    path = folder / "metrics.jsonl"
    path.write_bytes(spoilt := SPOILT[how](path.read_bytes()))
    with pytest.raises(UserError, match=r"metrics.jsonl: holds [0-3] of the 4 lines before the checkpoint"):
        main(arguments)
    assert path.read_bytes() == spoilt


def test_weights_that_the_last_update_made_nan_are_neither_saved_nor_exported(golden, tmp_path):
    folder = copy_model(golden, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"][-1] = 1e30  # of a token that no text has
    save_file(weights, folder / "model.safetensors")
    settings = golden_settings(golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
    settings["optimizer"] = {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e15, "weight_decay": 1e15}
    with pytest.raises(UserError, match="step 0: its update made weights NaN or infinite; lower optimizer.learning"):
        run(settings, tmp_path)
    assert not (tmp_path / "run" / "export").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_continued_run_takes_all_weights_from_its_checkpoint(golden, tmp_path):
    """Also those that training passes through, although the model's folder has others by then."""
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
    found = load_file(tmp_path / "run" / "export" / "model.safetensors")["lm_head.weight"]
    assert found.tobytes() == head.tobytes()


@pytest.mark.parametrize("where", ["data", "run"])
def test_a_cache_where_the_run_reads_or_writes_raises_user_error(where, golden, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.copy(golden / IR, tmp_path / "data")
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / where / "cache"))
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(tmp_path / "data")]})
    with pytest.raises(UserError, match=f"the cache .* lies in {tmp_path / where}; set CODIEMB_JAX_CACHE"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_damaged_cache_raises_user_error(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    settings = golden_settings(golden, tmp_path / "run", data={"ir": [str(golden / IR)]}, export=False)
    settings["optimizer"] = {"max_steps": 1}
    run(settings, tmp_path)
    (prepared,) = (tmp_path / "cache").iterdir()
    for pattern in ("index.npz", "**/*.array_record*", "**/dataset_info.json"):
        (path,) = prepared.glob(pattern)
        content = path.read_bytes()
        for spoilt in (b"", content[: len(content) // 2]):
            path.write_bytes(spoilt)
            settings["output_dir"] = str(tmp_path / f"run {pattern[-4:]} {len(spoilt)}")
            with pytest.raises(UserError, match=f"{prepared}: the prepared data set is damaged .*; delete the folder"):
                run(settings, tmp_path)
        path.write_bytes(content)
