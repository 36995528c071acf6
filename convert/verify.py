"""Compares an exported folder in sentence-transformers with our own computation: token ids and vectors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from codiemb_jax.config import PromptSettings
from codiemb_jax.data.prompts import PromptEncoder
from codiemb_jax.data.records import Triple
from codiemb_jax.encode import Embedder
from codiemb_jax.errors import UserError
from codiemb_jax.export import PROBES, export_prompts
from codiemb_jax.models.weights import NUMPY_TYPES, Params
from codiemb_jax.training.model import ModelFolder

REQUIRED_COSINE = 0.99999


def verify(folder: Path, model: ModelFolder) -> None:
    """Prints ids, prompt tokens and cosine of each probe text as query and as document, and the worst cosine.

    sentence-transformers leaves a fixed number of tokens out of a query's mean, those of the prompt alone.  Where
    the tokenizer joins the prompt's last blank with some texts' first word but not with others', no number fits all
    texts; those that it does not fit are counted apart.  UserError if ids differ, or vectors of the rest.
    """
    prompt = PromptSettings(**model.blueprint.prompt)
    encoder = PromptEncoder(model.blueprint.tokenizer(), prompt)
    limit = model.blueprint.max_tokens
    mesh = jax.tree.leaves(model.abstract)[0].sharding.mesh
    embedder = Embedder(model.graph, encoder, mesh, limit, prompt.default_instruction).with_params(as_written(model))
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": "float32"})
    kinds = {
        "query": (encoder.encode_queries, prompt.default_instruction, embedder.encode_query, theirs.encode_query),
        "document": (encoder.encode_passages, "", embedder.encode_document, theirs.encode_document),
    }
    table = Table("kind", "text", "ids", "prompt tokens", "theirs", "cosine")
    worst = {True: 1.0, False: 1.0}  # by whether sentence-transformers leaves out the same tokens
    count = {True: 0, False: 0}
    different_ids = []
    for kind, (tokenize, instruction, encode_ours, encode_theirs) in kinds.items():
        texts = tokenize([Triple(instruction, "", text) for text in PROBES], limit)
        cosines = np.sum(encode_ours(PROBES) * encode_theirs(list(PROBES)), axis=1)
        for text, ours, cosine in zip(PROBES, texts, map(float, cosines), strict=True):
            features = theirs.preprocess([text], prompt=export_prompts(prompt)[kind] or None)
            same_ids = features["input_ids"][0].tolist() == ours.ids.tolist()
            left_out = int(features.get("prompt_length", 0))
            same_mask = left_out == ours.content
            worst[same_mask] = min(worst[same_mask], cosine)
            count[same_mask] += 1
            if not same_ids:
                different_ids.append(f"{kind}: {text}")
            table.add_row(
                kind, text[:40], "equal" if same_ids else "DIFFER", str(ours.content), str(left_out), f"{cosine:.7f}"
            )
    console = Console()
    console.print(table)
    console.print(f"worst cosine {worst[True]:.7f} over {count[True]} texts")
    if count[False]:
        console.print(
            f"{count[False]} more texts join the prompt's last blank differently, and sentence-transformers cannot "
            f"tell: worst cosine {worst[False]:.7f} (docs/export.md)"
        )
    if different_ids:
        raise UserError("token ids differ:\n  " + "\n  ".join(different_ids))
    if worst[True] < REQUIRED_COSINE:
        raise UserError(f"vectors differ: worst cosine {worst[True]:.7f}, required is {REQUIRED_COSINE}")


def as_written(model: ModelFolder) -> Params:
    """The checkpoint's parameters, rounded to the types in which the exported folder holds them."""
    params = model.load()
    for weight in model.family.weights:
        *parents, last = weight.ours.split(".")
        place = params
        for key in parents:
            place = place[key]
        written = NUMPY_TYPES[model.blueprint.dtypes[model.blueprint.prefix + weight.theirs.format(layer=0)]]
        place[last] = place[last].astype(written).astype(jnp.float32)
    return params
