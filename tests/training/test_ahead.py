"""Tests that a step traced without data and weights is the one that training runs."""

from functools import partial

import jax
import numpy as np
import pytest

from codiemb_jax.config import Settings
from codiemb_jax.data.loader import batches
from codiemb_jax.sharding import row_sharding
from codiemb_jax.training.ahead import abstract_batch, trace_step
from codiemb_jax.training.flops import count_flops
from codiemb_jax.training.optimizer import make_optimizer
from codiemb_jax.training.run import open_run, open_training_model
from codiemb_jax.training.schedule import make_schedule
from codiemb_jax.training.state import abstract_state, initial_state
from codiemb_jax.training.step import make_step, needs_texts
from tests.helpers import golden_settings


@pytest.mark.parametrize("task", ["ir", "sts"])
def test_traced_step_is_that_of_a_planned_batch(task, golden, tmp_path, monkeypatch):
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    data = {task: [str(golden / "data" / ("news.jsonl" if task == "ir" else "questions.jsonl"))]}
    settings = Settings.model_validate(
        golden_settings(golden, tmp_path / "run", data=data, mesh={"fsdp": 2, "data": 4})
    )
    setup = open_training_model(settings)
    run = open_run(setup)
    [(plan, batch)] = batches(run.plan, run.datasets, row_sharding(setup.mesh), start=0, stop=1)
    passages = plan.passages.shape[1]
    abstract = abstract_batch(plan.layout, passages, setup.mesh, needs_texts(settings, task))
    describe = partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding))
    assert describe(abstract) == describe(batch)

    traced = trace_step(setup.settings, setup.model.graph, setup.model.abstract, task, plan.layout, passages, False)
    schedule = make_schedule(settings.optimizer, 1000)
    optimizer = make_optimizer(settings.optimizer, schedule)
    layout = abstract_state(optimizer, setup.model.abstract, settings.optimizer.offload)
    with jax.set_mesh(setup.mesh):
        state = initial_state(optimizer, setup.model.load(), layout)
        step = make_step(setup.model.graph, optimizer, schedule, setup.settings, setup.mesh, layout, task)
        assert count_flops(step.trace(state, np.int32(0), batch).jaxpr) == count_flops(traced.jaxpr) > 0
