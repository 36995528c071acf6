"""Compares an exported folder in sentence-transformers with our own computation: token ids and vectors."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from codiemb_jax.checkpoints.export import PROBES, sentence_prompts
from codiemb_jax.checkpoints.model import PretrainedModel
from codiemb_jax.checkpoints.safetensors import as_stored
from codiemb_jax.models.build import Params
from codiemb_jax.sharding import replicated
from codiemb_jax.text.prompts import Tokens

REQUIRED_COSINE = 0.99999
ALLOWED_LENGTH = 1e-4
"""Relative difference of two vectors' lengths."""


class TokenEmbedder(Protocol):
    """What `verify` needs of an `Embedder`."""

    @property
    def tokenizer(self) -> Any: ...

    def embed_tokens(self, texts: Sequence[Tokens]) -> np.ndarray: ...


def verify(folder: Path, model: PretrainedModel, ours: TokenEmbedder) -> bool:
    """Prints ids, prompt tokens and cosine of each probe text as query and as document; whether all are right.

    ours: encodes with the model's parameters as the folder holds them (`as_written`).

    sentence-transformers leaves a fixed number of tokens out of a query's mean, those of the prompt alone.  Where
    the tokenizer joins the prompt's last space with some texts' first word but not with others', no number fits all
    texts.  The vector of a text that it misses by that one token is reported, and must equal ours with the same tokens
    left out.
    """
    limit, sentence = model.blueprint.max_tokens, sentence_prompts(model.blueprint)
    prompts = {kind: sentence.prompts.get(kind, "") for kind in ("query", "document")}
    query_tokens, document_tokens = (ours.tokenizer.tokenize(PROBES, prompt, limit) for prompt in prompts.values())
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    kinds = {
        "query": (query_tokens, theirs.encode_query(list(PROBES))),
        "document": (document_tokens, theirs.encode_document(list(PROBES))),
    }
    table = Table("kind", "text", "ids", "prompt tokens", "theirs", "cosine")
    cosines: list[float] = []
    off_by_one: list[float] = []
    wrong: list[str] = []
    for kind, (tokens, vectors) in kinds.items():
        # What sentence-transformers pools: our ids, the number of tokens that it leaves out.
        features = [theirs.preprocess([text], prompt=prompts[kind] or None) for text in PROBES]
        left_out = [int(feature.get("prompt_length", 0)) for feature in features]
        if sentence.include_prompt:
            left_out = [text.content for text in tokens]  # it leaves nothing out, and neither do we
        as_theirs = [text._replace(content=count) for text, count in zip(tokens, left_out, strict=True)]
        cosine = _cosine(ours.embed_tokens(tokens), vectors)
        same_tokens = ours.embed_tokens(as_theirs)
        same_tokens_cosine = _cosine(same_tokens, vectors)
        longer = np.linalg.norm(vectors, axis=1) / np.linalg.norm(same_tokens, axis=1) - 1
        for i, text in enumerate(PROBES):
            same_ids = features[i]["input_ids"][0].tolist() == tokens[i].ids.tolist()
            beside = tokens[i].content - left_out[i]
            (off_by_one if beside else cosines).append(float(cosine[i]))
            same_vector = same_tokens_cosine[i] >= REQUIRED_COSINE and abs(longer[i]) <= ALLOWED_LENGTH
            if not same_ids or abs(beside) > 1 or not same_vector:
                wrong.append(f"{kind}: {text[:40]}")
            row = (kind, text[:40], "equal" if same_ids else "DIFFER", str(tokens[i].content), str(left_out[i]))
            table.add_row(*row, f"{cosine[i]:.7f}")
    console = Console()
    console.print(table)
    if cosines:
        console.print(f"worst cosine {min(cosines):.7f} over {len(cosines)} texts, required {REQUIRED_COSINE}")
    if off_by_one:
        console.print(
            f"{len(off_by_one)} more texts do not join the prompt's last space as the others do, and "
            f"sentence-transformers cannot tell: worst cosine {min(off_by_one):.7f} (docs/guides/export.md)"
        )
    if wrong:
        console.print("ids or vectors differ:", *wrong, sep="\n  ")
    if len(off_by_one) > len(PROBES) / 2:
        console.print("the number of prompt tokens fits fewer than half of the queries")
    return not wrong and len(off_by_one) <= len(PROBES) / 2


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.sum(one * other, axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def as_written(model: PretrainedModel) -> Params:
    """The checkpoint's parameters in the types in which the exported folder holds them."""
    params, blueprint = model.stream(), model.blueprint
    params |= as_stored(params, model.family.weights, blueprint.prefix, blueprint.dtypes)
    return jax.device_put(jax.tree.map(np.asarray, params), replicated(model.mesh))
