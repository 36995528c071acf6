"""Our models against transformers' on the same folder: hidden states after every layer."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from transformers import AutoModel

from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.model import PretrainedModel, open_model
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.sharding import make_mesh

LENGTHS = (500, 7, 131, 1)


def random_tokens(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask [texts, longest] of texts of LENGTHS tokens, padded at the end."""
    random = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(mask, random.integers(3, vocab_size, mask.shape), 0), mask


def as_rows(tokens: np.ndarray, mask: np.ndarray) -> TokenRows:
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    return TokenRows(*(x.astype(np.int32) for x in (tokens, positions, mask, mask)))


def open_folder(path: Path, attention: str = "bidirectional", **settings: Any) -> PretrainedModel:
    settings = ModelSettings(path=str(path), attention=attention, compute_dtype="float32", **settings)
    return open_model(settings, PromptSettings(), make_mesh(MeshSettings()))


def assert_same_hidden_states(
    ours: PretrainedModel,
    theirs: torch.nn.Module,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    relative: bool = False,
) -> None:
    """The hidden states of every layer (of a deep model: of four) within 1e-4 of those of transformers.

    tokens, mask: [texts, longest].  relative: in units of the token's largest state where that is over 1.
    """
    with torch.no_grad():
        output = theirs(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(int)), output_hidden_states=True
        )
    params = ours.load()
    states = jax.jit(lambda params, layer: nnx.merge(ours.graph, params)(as_rows(tokens, mask), layer, lambda x: x))
    *expected, expected_final = (
        state.numpy()[mask] for state in (*output.hidden_states[:-1], output.last_hidden_state)
    )

    def assert_same(found: np.ndarray, expected: np.ndarray, what: str) -> None:
        scale = np.maximum(1, np.abs(expected).max(axis=-1, keepdims=True)) if relative else 1
        assert np.abs((found[mask] - expected) / scale).max() < 1e-4, what

    last = len(expected)
    for number in range(last) if last <= 8 else (0, last // 2, last - 1):
        final, tapped = states(params, number)
        assert_same(np.asarray(tapped), expected[number], f"state {number}")
    # transformers' last hidden state is the final-normed one of a decoder.
    assert_same(np.asarray(final), expected_final, "final state")


def read_theirs(folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
