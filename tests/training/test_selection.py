"""Tests of evaluation during training: the best checkpoint is kept and exported, and runs stop early.

The runs get figures from a script instead of a model's quality, so that the best checkpoint is known.
"""

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from codiemb_jax.checkpoints.run_checkpoints import RunCheckpoints, restore_params, saved_steps
from codiemb_jax.config import EvaluationSettings, Settings
from codiemb_jax.errors import UserError
from codiemb_jax.models.build import Params
from codiemb_jax.training import loop
from codiemb_jax.training.log import MetricsLog
from codiemb_jax.training.loop import Preempted, train
from codiemb_jax.training.run import open_run, open_training_model
from codiemb_jax.training.selection import Evaluation, Selection, score
from convert.orbax_to_hf import main as orbax_to_hf
from tests.helpers import assert_bitwise, golden_settings, load_weights, run

METRICS = {
    "faq nDCG@10": 0.5, "faq MRR@10": 0.25, "my wiki nDCG@10": 0.75, "my wiki MRR@10": 1.0, "pairs Spearman": -0.125,
    "pairs Pearson": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (None, (0.5 + 0.75 - 0.125) / 3),
        ("my wiki nDCG@10", 0.75),
        ("MRR@10", (0.25 + 1) / 2),
        ("Spearman", -0.125),
        ("pairs Pearson", 0.5),
    ],
)
def test_score(metric, expected):
    assert score(METRICS, metric) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("metric", ["MAP", "faq", "wiki nDCG@10", "faq Spearman", ""])
def test_unknown_score(metric):
    with pytest.raises(KeyError):
        score(METRICS, metric)


@given(st.lists(st.integers(0, 5), max_size=12), st.integers(1, 4), st.booleans())
def test_selection_is_that_of_a_plain_loop(figures, patience, keep_best):
    """Scans the figures as one would by hand, and also takes some of them over from an earlier start."""
    settings = EvaluationSettings(sts=["pairs.jsonl"], every_steps=10, patience=patience, keep_best=keep_best)
    evaluations = [Evaluation(10 * i, {"pairs Spearman": float(value)}, "") for i, value in enumerate(figures, 1)]
    saved = range(0, 10_000, 10)
    selection = Selection(settings, 10_000, [], "", [])
    best, best_step, without = -1, None, 0
    for i, evaluation in enumerate(evaluations):
        without += 1
        if figures[i] > best:
            best, best_step, without = figures[i], evaluation.step, 0
        selection.add(evaluation)
        for seen in (selection, Selection(settings, 10_000, evaluations[: i + 1], "", saved)):
            assert seen.best == Evaluation(best_step, {"pairs Spearman": float(best)}, "")
            assert seen.kept == (best_step if keep_best else None)
            assert seen.should_stop == (without >= patience)


def test_evaluations_are_due_every_so_many_steps_and_after_the_last_one():
    selection = Selection(EvaluationSettings(sts=["pairs.jsonl"], every_steps=4), 10, [], "", [])
    assert [done for done in range(11) if selection.is_due(done)] == [4, 8, 10]
    selection.add(Evaluation(4, {"pairs Spearman": 0.0}, ""))
    assert [done for done in range(11) if selection.is_due(done)] == [8, 10]
    assert not any(Selection(EvaluationSettings(), 10, [], "", []).is_due(done) for done in range(11))


class Script:
    """Evaluates to the given figures, in order, and to the same figure again for the same parameters."""

    def __init__(self, figures: Sequence[float]):
        self._figures = [0.0, *figures]  # the first is that of the initial model
        self._known: dict[str, int] = {}
        self.calls = 0

    def __call__(self, params: Params) -> dict[str, float]:
        self.calls += 1
        digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()
        return {"pairs Spearman": self._figures[self._known.setdefault(digest, len(self._known))]}


STEPS = 12
FIGURES = [0.1, 0.5, 0.3, 0.5, 0.4, 0.2]
"""The best is the second, after 4 steps; an equally good one comes later."""


@pytest.fixture
def settings(golden, tmp_path, tmp_path_factory, monkeypatch) -> Callable[..., dict[str, Any]]:
    """Returns a function that makes the settings of a run with evaluations after 2, 4, 6 … 12 steps."""
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    return partial(make_settings, golden, tmp_path / "run")


def make_settings(golden: Path, output_dir: Path, **evaluation: Any) -> dict[str, Any]:
    data = golden / "data"
    return golden_settings(
            golden, output_dir, checkpoint={"keep": 1, "every_epochs": None},
            data={"ir": [str(data / "news.jsonl")], "query_max_tokens": 64, "passage_max_tokens": 64,
                  "negatives_per_query": 1},
            evaluation={"sts": [str(data / "small_questions.jsonl")], "every_steps": 2} | evaluation,
            optimizer={"max_steps": STEPS},
        )  # fmt: skip


class Whole(NamedTuple):
    """A run without interruption, and what evaluated it."""

    folder: Path
    lines: list[dict[str, Any]]
    script: Script


@pytest.fixture(scope="module")
def whole(golden, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        script = Script(FIGURES)
        return Whole(folder, start(make_settings(golden, folder), script), script)


@pytest.fixture
def script(whole) -> Script:
    """Gives a run that is trained like the whole one the same figures."""
    return whole.script


def start(
    settings: dict[str, Any], evaluate: Callable[[Params], dict[str, float]], data: str = "held out"
) -> list[dict[str, Any]]:
    """Runs training and returns the lines of metrics.jsonl, without times."""
    train(open_run(open_training_model(Settings.model_validate(settings))), evaluate, data)
    return lines(Path(settings["output_dir"]))


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


def evaluations(found: list[dict[str, Any]]) -> dict[int, float]:
    """Returns the figures in lines of metrics.jsonl by step."""
    return {line["step"]: line["evaluation"]["pairs Spearman"] for line in found if "evaluation" in line}


def steps(found: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in found if "loss" in line]


def assert_exported(folder: Path, step: int) -> None:
    """Asserts that the export of a run is the checkpoint after a step."""
    output = folder.parent / f"converted-{len(list(folder.parent.iterdir()))}"
    orbax_to_hf(["--checkpoint", str(folder / "checkpoints" / str(step)), "--output", str(output)])
    assert_bitwise(load_weights(folder / "export"), load_weights(output))
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["step"] == step
    assert result["after"] == {"pairs Spearman": evaluations(lines(folder))[step]}


def test_best_checkpoint_is_kept_and_exported(whole):
    folder, found, _ = whole
    assert steps(found) == list(range(STEPS))
    assert evaluations(found) == dict(zip(range(2, 13, 2), FIGURES, strict=True))
    order = [("evaluation" in line, line["step"]) for line in found]
    assert order == sorted(order, key=lambda entry: (entry[1], not entry[0]))  # after N steps, before step N
    assert saved_steps(folder / "checkpoints") == [4, 12]
    assert_exported(folder, 4)
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = {event.step: event.value for event in board.Scalars("evaluation/pairs Spearman")}
    assert logged == pytest.approx(evaluations(found), abs=1e-7)


def test_state_is_freed_before_the_best_checkpoint_is_restored(settings, script, monkeypatch):
    """Otherwise, a model that only just fits would not fit at the end."""
    evaluated: list[weakref.ref[jax.Array]] = []

    def evaluate(params: Params) -> dict[str, float]:
        evaluated[:] = map(weakref.ref, jax.tree.leaves(params))
        return script(params)

    freed = []

    def restore(*arguments: Any) -> Params:
        freed.extend(leaf() is None for leaf in evaluated)
        return restore_params(*arguments)

    monkeypatch.setattr(loop, "restore_params", restore)
    start(settings(), evaluate)
    assert freed
    assert all(freed)


def test_last_checkpoint_is_exported_without_keep_best(settings, script, tmp_path, capsys):
    start(settings(keep_best=False), script)
    assert saved_steps(tmp_path / "run" / "checkpoints") == [12]
    assert_exported(tmp_path / "run", 12)
    # The best is gone, so keeping the best from now on chooses among those that are left.
    start(settings(), script)
    assert "the best checkpoint so far, that after 4 steps, is missing" in capsys.readouterr().err
    assert_exported(tmp_path / "run", 12)


def test_last_checkpoint_may_be_the_best(settings, tmp_path):
    start(settings(), Script([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    assert saved_steps(tmp_path / "run" / "checkpoints") == [12]
    assert_exported(tmp_path / "run", 12)


def test_run_stops_early_and_more_patience_continues_it(settings, whole, script, tmp_path, capsys):
    found = start(settings(patience=2), script)
    assert "stopped after 8 steps: no improvement in 2 evaluations" in capsys.readouterr().err
    assert found == whole.lines[: 8 + 4]
    assert saved_steps(tmp_path / "run" / "checkpoints") == [4, 8]
    assert_exported(tmp_path / "run", 4)
    calls = script.calls
    assert start(settings(patience=2), script) == found
    assert script.calls == calls
    with pytest.raises(UserError, match="the held-out data has changed since the evaluation after 2 steps"):
        start(settings(patience=2), script, "changed")
    assert start(settings(patience=5), script) == whole.lines
    assert_exported(tmp_path / "run", 4)


def test_evaluation_without_the_metric_raises_user_error():
    evaluations = [Evaluation(2, {"pairs Foo": 0.5}, "")]
    settings = EvaluationSettings(sts=["pairs.jsonl"], every_steps=2)
    with pytest.raises(UserError, match=r"metrics\.jsonl: the evaluation after 2 steps has no nDCG@10 or Spearman"):
        Selection(settings, 10, evaluations, "", [2])


class Crash(BaseException):
    """Ends a run at a chosen moment. Unlike a kill, it lets a checkpoint be completed that is being saved."""


@contextmanager
def crash(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, *, before: bool) -> Iterator[None]:
    """Crashes at the given call of a method, before or after it has done its work."""
    original = getattr(owner, name)
    counter = iter(range(1, 1000))

    def method(self: Any, *args: Any) -> Any:
        crashes = next(counter) == call
        if crashes and before:
            raise Crash
        result = original(self, *args)
        if crashes:
            raise Crash
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, method)
        with pytest.raises(Crash):
            yield


POINTS = [
    (owner, name, call, before)
    for owner, name in ((MetricsLog, "write_evaluation"), (RunCheckpoints, "save"))
    for call in (2, 3)  # of the three evaluations and checkpoints, the second is the best
    for before in (True, False)
]


@pytest.mark.parametrize(("owner", "name", "call", "before"), POINTS)
def test_killed_run_ends_with_the_same_choice(
    owner, name, call, before, settings, whole, script, tmp_path, monkeypatch
):
    with crash(monkeypatch, owner, name, call, before=before):
        start(settings(patience=1), script)
    assert start(settings(patience=1), script) == whole.lines[: 6 + 3]
    assert saved_steps(tmp_path / "run" / "checkpoints") == [4, 6]
    assert_exported(tmp_path / "run", 4)
    assert_bitwise(load_weights(tmp_path / "run" / "export"), load_weights(whole.folder / "export"))


@pytest.mark.parametrize("step", [3, 11])
def test_evaluation_that_sigterm_prevents_is_done_at_the_next_start(
    step, settings, whole, script, tmp_path, monkeypatch
):
    @contextmanager
    def preemption() -> Iterator[Callable[[int], bool]]:
        yield lambda number: number == step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "preemption", preemption)
        with pytest.raises(Preempted):
            start(settings(), script)
    interrupted = lines(tmp_path / "run")
    assert steps(interrupted) == list(range(step + 1))
    assert step + 1 not in evaluations(interrupted)
    assert start(settings(), script) == whole.lines
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), purge_orphaned_data=True).Reload()
    logged = {event.step: event.value for event in board.Scalars("evaluation/pairs Spearman")}
    assert logged == pytest.approx(evaluations(whole.lines), abs=1e-7)
    assert_exported(tmp_path / "run", 4)


INVALID = {
    "every_steps requires held-out data": {"sts": [], "every_steps": 2},
    "metric, patience, keep_best: false: has no effect without every_steps": {
        "every_steps": None, "metric": "Pearson", "patience": 1, "keep_best": False,
    },
    "evaluation.patience": {"patience": 0},
    "evaluation.every_steps": {"every_steps": 0},
    "evaluation.metric: there is no 'nDCG'; the metrics are Spearman, Pearson, alone or after the name of a file, such "
    "as 'small_questions Spearman'": {"metric": "nDCG"},
}  # fmt: skip


@pytest.mark.parametrize("message", INVALID)
def test_invalid_settings_raise_user_error(message, settings, tmp_path):
    with pytest.raises(UserError) as error:
        run(settings(**INVALID[message]), tmp_path)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()
