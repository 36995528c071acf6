"""Tests of what the devices send each other in the compiled step."""

import re
from collections import defaultdict

import jax
import numpy as np

from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import Settings
from codiemb_jax.sharding import make_mesh
from codiemb_jax.training.ahead import trace_step
from codiemb_jax.training.run import batch_layout
from tests.helpers import golden_settings

COLLECTIVE = re.compile(r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter)\(")


def test_weights_and_gradients_travel_in_the_compute_dtype(golden, tmp_path):
    """Sending float32 weights and casting them on arrival would double the traffic of fsdp."""
    values = golden_settings(golden, tmp_path, mesh={"fsdp": 8}, data={"ir": ["data"], "ir_global_batch_size": 8})
    values["model"] |= {"compute_dtype": "bfloat16", "remat": "full"}
    settings = Settings.model_validate(values)
    mesh = make_mesh(settings.mesh, jax.devices()[:8])
    model = open_model(settings.model, settings.prompt, mesh)
    layout = batch_layout(settings, mesh)(np.full((8, 6), 32), 128, None)
    step = trace_step(settings, model.graph, model.abstract, "ir", layout, 5, dropout=False)
    # XLA:CPU computes bfloat16 in float32 and therefore also sends float32, so read the program right after it is split
    # over the devices, which is done alike on all platforms.
    options = {"xla_dump_to": str(tmp_path / "dump"), "xla_dump_hlo_pass_re": "spmd-partitioning"}
    compiled = step.lower().compile(compiler_options=options)
    assert "ynn_fusion" not in compiled.as_text()  # the options of the step are kept
    program = next((tmp_path / "dump").glob("*jit_step*after_spmd-partitioning*.txt")).read_text()

    # Gradients may be transposed, so shapes are sorted.
    dtypes: dict[tuple[tuple[int, ...], str], set[str]] = defaultdict(set)
    for dtype, shape, collective in COLLECTIVE.findall(program):
        dtypes[tuple(sorted(int(size) for size in shape.split(",") if size)), collective].add(dtype)
    matrices = [leaf for leaf in jax.tree.leaves(model.abstract["layers"]) if leaf.ndim == 3]
    weights = {tuple(sorted(leaf.shape[1:])) for leaf in matrices}
    assert len(weights) >= 2
    for shape in weights:
        assert dtypes[shape, "all-gather"] == {"bf16"}, shape
        assert dtypes[shape, "all-reduce"] | dtypes[shape, "reduce-scatter"] == {"bf16"}, shape
