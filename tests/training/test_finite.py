"""Tests of steps whose loss or gradient is NaN or infinite."""

import numpy as np
import pytest

from codiemb_jax.errors import UserError
from codiemb_jax.training import loop
from codiemb_jax.training.finite import count_skipped
from tests.helpers import assert_bitwise, golden_settings, load_weights, run

STEPS = 4


@pytest.fixture
def settings(golden, tmp_path, monkeypatch):
    """Returns a function that makes settings of a run in `tmp_path / name`."""
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))

    def make(name, **more):
        optimizer = {"max_steps": STEPS, "schedule": "constant", "warmup_steps": 0}
        sections = {"data": {"sts": [str(golden / "data" / "questions.jsonl")]}, "optimizer": optimizer} | more
        return golden_settings(golden, tmp_path / name, **sections)

    return make


@pytest.fixture
def break_steps(monkeypatch):
    """Returns a function that makes the scores of all pairs of some steps NaN."""
    batches = loop.batches

    def set_steps(*broken):
        def with_broken_steps(*args, **options):
            for plan, batch in batches(*args, **options):
                if plan.number in broken:
                    batch = batch._replace(scores=batch.scores * np.float32("nan"))
                yield plan, batch

        monkeypatch.setattr(loop, "batches", with_broken_steps)

    return set_steps


def test_non_finite_step_stops_the_run_and_names_its_examples(settings, break_steps, tmp_path):
    break_steps(2)
    message = (
        r"^step 2 \(sts\): the loss is nan and the gradient norm is nan, with examples of questions: "
        r"1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16; lower optimizer\.learning_rate"
    )
    with pytest.raises(UserError, match=message):
        run(settings("run"), tmp_path)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_skipped_step_changes_no_weight(settings, break_steps, tmp_path):
    expected = run(settings("three", optimizer={"max_steps": 3, "schedule": "constant", "warmup_steps": 0}), tmp_path)
    break_steps(3)
    lines = run(settings("skipped", non_finite="skip"), tmp_path)
    assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in expected]
    assert lines[3]["skipped"] is True
    assert not {"loss", "grad_norm"} & lines[3].keys()
    assert count_skipped(tmp_path / "skipped" / "metrics.jsonl") == 1
    assert_bitwise(*(load_weights(tmp_path / name / "export") for name in ("skipped", "three")))


def test_training_goes_on_after_a_skipped_step(settings, break_steps, tmp_path):
    whole = run(settings("whole", optimizer={"max_steps": STEPS}), tmp_path)
    break_steps(1)
    lines = run(settings("skipped", non_finite="skip", optimizer={"max_steps": STEPS}), tmp_path)
    assert [line["learning_rate"] for line in lines] == [line["learning_rate"] for line in whole]
    assert lines[0]["loss"] == whole[0]["loss"]
    assert lines[2]["loss"] != whole[2]["loss"]  # one update less
    assert all(np.isfinite(line["loss"]) for line in lines[2:])


def test_too_many_skipped_steps_stop_the_run(settings, break_steps, tmp_path):
    break_steps(0, 2)
    with pytest.raises(UserError, match="step 2 .* 2 steps would be skipped, more than non_finite_skips allows"):
        run(settings("run", non_finite="skip", non_finite_skips=1), tmp_path)
