"""Compares hidden states of models with those of transformers for the same model folder."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from transformers import AutoModel

from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.model import PretrainedModel, open_model
from codiemb_jax.config import ModelSettings, PromptSettings
from codiemb_jax.sharding import cpu_mesh

LENGTHS = (500, 7, 131, 1)


def random_tokens(vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids and a mask, [texts, tokens], of texts with LENGTHS tokens, padded at the end."""
    random = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(mask, random.integers(3, vocab_size, mask.shape), 0), mask


def as_rows(tokens: np.ndarray, mask: np.ndarray) -> TokenRows:
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    return TokenRows(*(x.astype(np.int32) for x in (tokens, positions, mask, mask)))


def open_folder(path: Path, attention: str = "bidirectional", **settings: Any) -> PretrainedModel:
    settings = ModelSettings(path=str(path), attention=attention, compute_dtype="float32", **settings)
    return open_model(settings, PromptSettings(), cpu_mesh())


def assert_same_hidden_states(
    model: PretrainedModel,
    reference: torch.nn.Module,
    tokens: np.ndarray,
    mask: np.ndarray,
    *,
    relative: bool = False,
) -> None:
    """Asserts that hidden states of all layers (of four, for deep models) are within 1e-4 of the reference.

    Args:
      model: The model to test.
      reference: The model in transformers.
      tokens: Token ids, [texts, tokens].
      mask: Which tokens are not padding, [texts, tokens].
      relative: Whether to divide errors by the largest absolute state of the token if it is greater than 1.
    """
    with torch.no_grad():
        output = reference(
            torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(int)), output_hidden_states=True
        )
    params = model.load()
    rows = as_rows(tokens, mask)
    hidden_states = jax.jit(lambda params, layer: nnx.merge(model.graph, params)(rows, layer, lambda x: x))
    *expected, expected_final = (
        state.numpy()[mask] for state in (*output.hidden_states[:-1], output.last_hidden_state)
    )

    def assert_same(actual: np.ndarray, expected: np.ndarray, name: str) -> None:
        scale = np.maximum(1, np.abs(expected).max(axis=-1, keepdims=True)) if relative else 1
        assert np.abs((actual[mask] - expected) / scale).max() < 1e-4, name

    count = len(expected)
    for number in range(count) if count <= 8 else (0, count // 2, count - 1):
        final, tapped = hidden_states(params, number)
        assert_same(np.asarray(tapped), expected[number], f"state {number}")
    # The last hidden state of a decoder in transformers includes the final norm.
    assert_same(np.asarray(final), expected_final, "final state")


def load_reference(folder: Path) -> torch.nn.Module:
    return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
