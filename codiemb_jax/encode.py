"""Texts -> vectors."""

from collections.abc import Sequence
from copy import copy
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from codiemb_jax.batch import Rows
from codiemb_jax.data.loader import padded_rows
from codiemb_jax.data.prompts import PromptEncoder, Tokens
from codiemb_jax.data.records import Triple
from codiemb_jax.data.sampler import row_length
from codiemb_jax.models.embed import embed
from codiemb_jax.models.pooling import unit
from codiemb_jax.training.mesh import by_row, replicated, row_shards

ROWS = 32
"""Texts encoded at once, rounded up to a multiple of the devices."""


class Embedder:
    """Encodes texts with a model in memory, exactly as training does.

    Its names are those of sentence-transformers: `encode_query`, `encode_document`.  Vectors have length 1 unless
    `normalize` is False.
    """

    def __init__(
        self,
        graph: Any,
        encoder: PromptEncoder,
        mesh: jax.sharding.Mesh,
        max_tokens: int,
        default_instruction: str,
        normalize: bool = True,
    ):
        self._encoder, self._mesh, self._max_tokens = encoder, mesh, max_tokens
        self._default_instruction = default_instruction
        shards = row_shards(mesh)
        self._rows = -(-ROWS // shards) * shards

        def vectors(params: Any, rows: Rows) -> jax.Array:
            found = embed(nnx.merge(graph, params), rows)
            return unit(found) if normalize else found

        self._embed = jax.jit(vectors, out_shardings=replicated(mesh))
        self._params: Any = None

    def with_params(self, params: Any) -> "Embedder":
        """The same model with these parameters; nothing is compiled again."""
        other = copy(self)
        other._params = params
        return other

    def encode_query(self, texts: Sequence[str], instruction: str | None = None) -> np.ndarray:
        """Vectors of queries, float32 [texts, dim]; `instruction` defaults to the settings' own."""
        instruction = self._default_instruction if instruction is None else instruction
        triples = [Triple.of(instruction, "", text) for text in texts]
        return self.encode(self._encoder.encode_queries(triples, self._max_tokens))

    def encode_document(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages, float32 [texts, dim]."""
        triples = [Triple.of("", "", text) for text in texts]
        return self.encode(self._encoder.encode_passages(triples, self._max_tokens))

    def encode(self, texts: Sequence[Tokens]) -> np.ndarray:
        """Vectors of tokenised texts, float32 [texts, dim]."""
        order = sorted(range(len(texts)), key=lambda i: texts[i].ids.size)  # neighbours share a row length
        vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            length = row_length(texts[chosen[-1]].ids.size, self._max_tokens)
            # The last batch is filled up with empty rows, so that it has the shape of the others.
            padded = [texts[i] for i in chosen] + [None] * (self._rows - len(chosen))
            with jax.set_mesh(self._mesh):
                place = partial(jax.device_put, device=by_row(self._mesh))
                batch = np.asarray(self._embed(self._params, jax.tree.map(place, padded_rows(padded, length))))
            for i, vector in zip(chosen, batch, strict=False):
                vectors[i] = vector
        return np.stack(vectors)
