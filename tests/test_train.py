"""The training program as a user meets it: figures of the original, what it leaves, what it refuses."""

import json
import logging
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
from tensorboardX.proto.event_pb2 import Event

from codiemb_jax.errors import UserError, run_program
from codiemb_jax.train import main
from convert.hf_to_orbax import main as hf_to_orbax

IR = "data/news.jsonl"
STS = "data/questions.jsonl"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def settings_of(golden: Path, output_dir: Path, **sections: Any) -> dict[str, Any]:
    """Settings under which the golden trajectories were made, `sections` on top."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {"path": str(golden / "youtu_tiny")},
        "data": {
            "ir_global_batch_size": 8, "sts_global_batch_size": 16, "positives_per_query": 1,
            "negatives_per_query": 4, "query_max_tokens": 128, "passage_max_tokens": 128,
        },
        "objective": {"sts_list_size": None},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "max_steps": 8},
    }  # fmt: skip
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section if isinstance(section, dict) else section
    return settings


def run(settings: dict[str, Any], folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Runs the program; returns the lines of metrics.jsonl."""
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    main(["--config", str(config), *flags])
    return [json.loads(line) for line in (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()]


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
    lines = run(settings_of(golden, tmp_path / "run", data=data), tmp_path)
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
    settings = settings_of(
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
    settings = settings_of(
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
    "text for a length": (long_as_text, "model_max_length: expected a number, found '512'"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "another rope": (lambda f: change_config(f, rope_scaling={"type": "yarn"}), "default, linear, llama3"),
    "few positions": (lambda f: change_config(f, max_position_embeddings=64), "may be at most 64"),
}


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_model_that_cannot_be_used_is_told(mistake, golden, tmp_path):
    spoil, message = MODEL_MISTAKES[mistake]
    folder = copy_model(golden, tmp_path / "model")
    spoil(folder)
    settings = settings_of(golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_the_folder_of_a_run_is_not_taken_for_a_model(golden, tmp_path):
    (tmp_path / "earlier" / "checkpoints").mkdir(parents=True)
    (tmp_path / "earlier" / "config.yaml").write_text("")
    model = {"path": str(tmp_path / "earlier")}
    with pytest.raises(UserError, match="earlier is the folder of a run; give .*earlier/export or one of its checkpoi"):
        run(settings_of(golden, tmp_path / "run", model=model, data={"ir": [str(golden / IR)]}), tmp_path)


def test_a_model_folder_may_be_its_own_output_dir(golden, tmp_path):
    folder = copy_model(golden, tmp_path / "model")
    settings = settings_of(golden, folder, model={"path": str(folder)}, data={"ir": [str(golden / IR)]}, export=False)
    run(settings, tmp_path, "--optimizer.max_steps", "1")
    assert len(run(settings, tmp_path, "--optimizer.max_steps", "1")) == 1


def test_an_overlong_model_path_is_told(golden, tmp_path):
    settings = settings_of(golden, tmp_path / "run", model={"path": "x" * 300}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="model.path: x+ cannot be a folder: File name too long"):
        run(settings, tmp_path)


def test_weights_that_cannot_be_read_leave_no_run(golden, tmp_path):
    """A checkpoint whose params are damaged: found when they are read, before output_dir is made."""
    checkpoint = tmp_path / "checkpoint"
    hf_to_orbax(["--model", str(golden / "youtu_tiny"), "--output", str(checkpoint)])
    for path in (checkpoint / "params" / "d").iterdir():
        path.write_bytes(b"")
    settings = settings_of(golden, tmp_path / "run", model={"path": str(checkpoint)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="checkpoint: the checkpoint cannot be read"):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_finite_is_blamed_and_not_the_rate(golden, tmp_path):
    folder = copy_model(golden, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["norm.weight"][3] = np.nan
    save_file(weights, folder / "model.safetensors")
    settings = settings_of(golden, tmp_path / "run", model={"path": str(folder)}, data={"ir": [str(golden / IR)]})
    with pytest.raises(UserError, match="step 0 .*nothing has been trained yet: look for weights in the model"):
        run(settings, tmp_path)


def test_it_is_told_if_a_folder_pooled_otherwise(golden, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    hf_to_orbax(["--model", str(golden / "youtu_tiny"), "--output", str(checkpoint)])
    model = {"path": str(checkpoint), "pooling": "last_token"}
    settings = settings_of(golden, tmp_path / "run", model=model, data={"ir": [str(golden / IR)]}, export=False)
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
    "too small": ({}, {}, "data.jsonl: 1 examples, data.ir_global_batch_size is 8"),
    "odd batch": ({}, {"ir_global_batch_size": 12}, "data.ir_global_batch_size 12 must be a multiple of 8"),
    "unknown setting": ({}, {"ir_batch": 12}, "settings.yaml:4: data.ir_batch: there is no such setting"),
}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_data_that_cannot_be_used_is_told(mistake, golden, tmp_path):
    changes, data, message = DATA_MISTAKES[mistake]
    path = tmp_path / "data.jsonl"
    if changes is not None:
        path.write_text(first_line(golden / IR, **changes) + "\n", encoding="utf-8")
    settings = settings_of(golden, tmp_path / "run", data={"ir": [str(path)]} | data)
    with pytest.raises(UserError, match=message):
        run(settings, tmp_path)
    assert not (tmp_path / "run").exists()


DAMAGED = {
    "inputs.json: null": ("inputs.json", b"null", "config.yaml or inputs.json, which tell of what run, cannot be read"),
    "config.yaml: no settings": ("config.yaml", b"1: 2", "config.yaml or inputs.json, which tell of what run, cannot"),
    "evaluation.json: cut off": ("evaluation.json", b"{", "evaluation.json: not valid JSON"),
    "evaluation.json: another": ("evaluation.json", b"{}", "evaluation.json: holds no figures of `before`"),
    "metrics.jsonl: not text": (
        "metrics.jsonl",
        b"\xff",
        "metrics.jsonl: holds 1 lines, the checkpoint to continue fro",
    ),
    "checkpoints: a file": ("checkpoints", b"", "checkpoints: is a file, and should be a folder"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_run_is_not_continued(damage, both_tasks, tmp_path):
    name, content, message = DAMAGED[damage]
    folder = tmp_path / "run"
    shutil.copytree(both_tasks[0], folder)
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        main(["--config", str(both_tasks[0] / "config.yaml"), "--output_dir", str(folder)])
    assert (folder / name).read_bytes() == content


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
    settings = settings_of(golden, tmp_path / "run", data=data, mesh={"tensor": 2}, encode_chunks=2, export=False)
    settings["optimizer"]["max_steps"] = 3
    lines = run(settings, tmp_path, "--optimizer.schedule", "constant")
    np.testing.assert_allclose([line["loss"] for line in lines], [g["loss"] for g in expected[:3]], rtol=5e-4)
