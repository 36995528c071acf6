"""Compares an export loaded in sentence-transformers with this project's model: token ids and embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from codiemb_jax.checkpoints.export import PROBE_TEXTS, sentence_prompts
from codiemb_jax.checkpoints.model import PretrainedModel
from codiemb_jax.checkpoints.safetensors import round_to_stored_dtypes
from codiemb_jax.models.build import Params
from codiemb_jax.sharding import replicated
from codiemb_jax.text.prompts import Tokens

MIN_COSINE = 0.99999
MAX_NORM_DIFFERENCE = 1e-4
"""Maximum relative difference of the norms of two embeddings."""


class TokenEmbedder(Protocol):
    """The part of `Embedder` that `verify` uses."""

    @property
    def tokenizer(self) -> Any: ...

    def embed_tokens(self, texts: Sequence[Tokens]) -> np.ndarray: ...


def verify(folder: Path, model: PretrainedModel, embedder: TokenEmbedder) -> bool:
    """Encodes the probe texts as queries and as documents on both sides, and prints a table of differences.

    sentence-transformers excludes a fixed number of prompt tokens from the mean: that of the prompt alone. If the
    tokenizer merges the space at the end of the prompt with the first word of some texts but not of others, no fixed
    number is right for all texts. Texts for which it is off by that one token are reported separately; their
    embeddings must be equal when both sides exclude the same tokens.

    Args:
      folder: The exported folder.
      model: The model that was exported.
      embedder: Encodes with the exported parameters (see `exported_params`).

    Returns:
      Whether token ids and embeddings match.
    """
    limit, sentence = model.blueprint.max_tokens, sentence_prompts(model.blueprint)
    prompts = {kind: sentence.prompts.get(kind, "") for kind in ("query", "document")}
    query_tokens, document_tokens = (
        embedder.tokenizer.tokenize(PROBE_TEXTS, prompt, limit) for prompt in prompts.values()
    )
    reference = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    kinds = {
        "query": (query_tokens, reference.encode_query(list(PROBE_TEXTS))),
        "document": (document_tokens, reference.encode_document(list(PROBE_TEXTS))),
    }
    table = Table("kind", "text", "token ids", "excluded (JAX)", "excluded (ST)", "cosine")
    cosines: list[float] = []
    off_by_one: list[float] = []
    mismatches: list[str] = []
    for kind, (tokens, vectors) in kinds.items():
        features = [reference.preprocess([text], prompt=prompts[kind] or None) for text in PROBE_TEXTS]
        excluded = [int(feature.get("prompt_length", 0)) for feature in features]
        if sentence.include_prompt:
            excluded = [text.content_start for text in tokens]  # neither side excludes anything
        tokens_as_reference = [text._replace(content_start=count) for text, count in zip(tokens, excluded, strict=True)]
        cosine = _cosine(embedder.embed_tokens(tokens), vectors)
        same_tokens = embedder.embed_tokens(tokens_as_reference)
        same_tokens_cosine = _cosine(same_tokens, vectors)
        norm_difference = np.linalg.norm(vectors, axis=1) / np.linalg.norm(same_tokens, axis=1) - 1
        for i, text in enumerate(PROBE_TEXTS):
            same_ids = features[i]["input_ids"][0].tolist() == tokens[i].ids.tolist()
            offset = tokens[i].content_start - excluded[i]
            (off_by_one if offset else cosines).append(float(cosine[i]))
            same_embedding = same_tokens_cosine[i] >= MIN_COSINE and abs(norm_difference[i]) <= MAX_NORM_DIFFERENCE
            if not same_ids or abs(offset) > 1 or not same_embedding:
                mismatches.append(f"{kind}: {text[:40]}")
            row = (kind, text[:20], "equal" if same_ids else "DIFFER", str(tokens[i].content_start), str(excluded[i]))
            table.add_row(*row, f"{cosine[i]:.7f}")
    console = Console()
    console.print(table)
    if cosines:
        console.print(f"smallest cosine {min(cosines):.7f} over {len(cosines)} texts (required: {MIN_COSINE})")
    if off_by_one:
        console.print(
            f"texts before which the space at the end of the prompt is tokenized differently, which "
            f"sentence-transformers cannot represent: {len(off_by_one)}, smallest cosine {min(off_by_one):.7f} "
            "(see the export guide)"
        )
    if mismatches:
        console.print("token ids or embeddings differ:", *mismatches, sep="\n  ")
    if len(off_by_one) > len(PROBE_TEXTS) / 2:
        console.print("the number of excluded tokens is wrong for more than half of the queries")
    return not mismatches and len(off_by_one) <= len(PROBE_TEXTS) / 2


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.sum(one * other, axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def exported_params(model: PretrainedModel) -> Params:
    """Returns the parameters of a checkpoint, rounded to the dtypes in which they are exported."""
    params, blueprint = model.stream(), model.blueprint
    params |= round_to_stored_dtypes(params, model.family.weights, blueprint.prefix, blueprint.dtypes)
    return jax.device_put(jax.tree.map(np.asarray, params), replicated(model.mesh))
