"""Tests that models with float32 computation use float32 products on every platform, forward and backward."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.models.embed import embed_with_middle
from codiemb_jax.sharding import make_mesh
from codiemb_jax.training.step import embed_in_chunks
from scripts.make_random_checkpoint import write_random_checkpoint
from tests.checkpoints.test_hostile import TINY

HIGHEST = jax.lax.Precision.HIGHEST


def product_precisions(jaxpr: core.Jaxpr) -> list[Any]:
    """Returns the precisions of all matrix products in a jaxpr and in those that it calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                    found += product_precisions(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("shape", ["bge_large_zh", "youtu_embedding"])
def test_every_product_is_float32(shape, chunks, tmp_path):
    write_random_checkpoint(shape, tmp_path / "model", **TINY, num_key_value_heads=2, head_dim=8)
    mesh = make_mesh(MeshSettings(), jax.devices()[:1])
    model = open_model(ModelSettings(path=str(tmp_path / "model"), compute_dtype="float32"), PromptSettings(), mesh)
    ones = jnp.ones((4, 8), jnp.int32)
    rows = TokenRows(ones, jnp.asarray(np.tile(np.arange(8, dtype=np.int32), (4, 1))), ones, ones)

    def loss(params):
        vectors = embed_in_chunks(
            model.graph, params, rows, jnp.zeros((4, 1), jnp.int32), None,
            mesh=mesh, max_chunks=chunks, function=embed_with_middle,
        )  # fmt: skip
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(vectors))

    with jax.set_mesh(mesh):
        found = product_precisions(jax.make_jaxpr(jax.grad(loss))(model.abstract).jaxpr)
    assert len(found) > 20
    assert set(found) <= {HIGHEST, (HIGHEST, HIGHEST)}
