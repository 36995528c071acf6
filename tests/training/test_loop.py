"""Tests that the loop keeps devices busy: transfers are explicit and early, and it waits only for the previous step."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from codiemb_jax.training import loop
from codiemb_jax.training.log import MetricsLog
from tests.helpers import golden_settings, run

STEPS = 6


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def settings(golden, tmp_path) -> dict[str, Any]:
    """Settings of a run with a checkpoint in the middle."""
    return golden_settings(
        golden, tmp_path / "run", export=False, checkpoint={"every_steps": 4, "every_epochs": None},
        data={"ir": [str(golden / "data" / "news.jsonl")], "query_max_tokens": 64, "passage_max_tokens": 64},
        optimizer={"max_steps": STEPS},
    )  # fmt: skip


@pytest.fixture
def guarded(monkeypatch):
    """Forbids implicit transfers from the first step on, in all threads (`jax.transfer_guard` is for one thread)."""
    one_ahead = loop.one_ahead

    def guarded_items(items: Iterator[Any]) -> Iterator[Any]:
        jax.config.update("jax_transfer_guard", "disallow")
        yield from one_ahead(items)

    monkeypatch.setattr(loop, "one_ahead", guarded_items)
    yield
    jax.config.update("jax_transfer_guard", None)


def wrap_steps(monkeypatch, wrapper: Callable[[Callable], Callable]) -> None:
    """Replaces each jitted step by wrapper(step)."""
    make_step = loop.make_step
    monkeypatch.setattr(loop, "make_step", lambda *args: wrapper(make_step(*args)))


def test_steps_transfer_nothing_implicitly(golden, tmp_path, guarded):
    assert len(run(settings(golden, tmp_path), tmp_path)) == STEPS


def test_guard_detects_an_implicit_transfer(golden, tmp_path, guarded, monkeypatch):
    def with_host_number(step: Callable) -> Callable:
        return lambda state, number, batch: step(state, np.int32(0), batch)

    wrap_steps(monkeypatch, with_host_number)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer: .*int32"):
        run(settings(golden, tmp_path), tmp_path)


def test_metrics_are_fetched_while_the_next_step_runs(golden, tmp_path, monkeypatch):
    events: list[tuple[str, int]] = []
    write = MetricsLog.write

    def record_write(log: MetricsLog, plan: Any, *args: Any) -> None:
        events.append(("write", plan.number))
        write(log, plan, *args)

    def record_step(step: Callable) -> Callable:
        def run_step(state: Any, number: jax.Array, batch: Any) -> Any:
            events.append(("step", int(number)))
            return step(state, number, batch)

        return run_step

    monkeypatch.setattr(MetricsLog, "write", record_write)
    wrap_steps(monkeypatch, record_step)
    run(settings(golden, tmp_path), tmp_path)
    assert events == [
        ("step", 0), ("step", 1), ("write", 0), ("step", 2), ("write", 1), ("step", 3), ("write", 2),
        ("write", 3),  # a checkpoint, whose lines are on disk before it
        ("step", 4), ("step", 5), ("write", 4), ("write", 5),
    ]  # fmt: skip


def test_next_item_is_fetched_while_one_is_in_use():
    fetched = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for item in range(4):
            fetched[item].set()
            yield item

    used = []
    for item in loop.one_ahead(items()):
        assert fetched[min(item + 1, 3)].wait(timeout=30)
        used.append(item)
    assert used == [0, 1, 2, 3]


def test_error_of_an_item_is_raised_in_the_loop():
    def items() -> Iterator[int]:
        yield 0
        raise ValueError("damaged")

    iterator = loop.one_ahead(items())
    assert next(iterator) == 0
    with pytest.raises(ValueError, match="damaged"):
        next(iterator)
