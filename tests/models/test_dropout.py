"""Dropout: its rate, its keys, and where it sits, against transformers in training."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, XLMRobertaConfig, XLMRobertaModel

from codiemb_jax.batch import TokenRows
from codiemb_jax.models.embed import embed, token_keys
from codiemb_jax.models.layers import dropout
from tests.models.parity import as_rows, open_folder, read_theirs

TINY = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.5,
}  # fmt: skip
MODELS = {
    "bert": (BertModel, BertConfig, {}),
    "xlm-roberta": (XLMRobertaModel, XLMRobertaConfig, {"pad_token_id": 2, "type_vocab_size": 1}),
    "llama": (LlamaModel, LlamaConfig, {"num_key_value_heads": 1}),
}
TEXT = (17, 200, 33, 140, 9)
DRAWS = 8000


def test_dropout_keeps_the_mean_and_drops_at_its_rate():
    keys = jax.random.split(jax.random.key(0), (64, 50))
    found = np.asarray(dropout(jnp.ones((64, 50, 40)), 0.25, keys))
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    # 128000 draws: four standard deviations of their mean are 0.005.
    assert abs((found == 0).mean() - 0.25) < 0.005
    assert np.ptp((found == 0).mean(axis=(1, 2))) < 0.1  # in every row


def test_dropout_of_a_token_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(0), (4, 3))
    x = jnp.ones((4, 3, 100))
    found = np.asarray(dropout(x, 0.5, keys))
    np.testing.assert_array_equal(np.asarray(dropout(x[2:3], 0.5, keys[2:3]))[0], found[2])
    np.testing.assert_array_equal(np.asarray(dropout(x[2:3, 1:2], 0.5, keys[2:3, 1:2]))[0, 0], found[2, 1])
    assert (found[0] != found[1]).any()
    assert (found[0, 0] != found[0, 1]).any()


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_is_dropped_of_a_text_wherever_it_lies(kind, tmp_path, tokenizer_files):
    torch.manual_seed(0)
    make, config, own = MODELS[kind]
    make(config(**TINY | own)).save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    ours = open_folder(tmp_path, dropout=0.3)
    model = nnx.merge(ours.graph, ours.load())
    lengths = np.array([3, 5, 2])
    mask = np.arange(6) < lengths[:, None]
    tokens = np.where(mask, np.random.default_rng(0).integers(3, 300, mask.shape), 0)
    padded = as_rows(tokens, mask)
    packed = TokenRows(*(np.concatenate([x[2, :2], x[0, :3], x[1, :5], [0]])[None] for x in padded))
    packed.segment_ids[0, 2:5], packed.segment_ids[0, 5:10] = 2, 3
    key = jax.random.key(4)
    keys, packed_keys = token_keys(key, padded, np.arange(3)[:, None]), token_keys(key, packed, np.array([[2, 0, 1]]))
    found = embed(model, padded, dropout_keys=keys)
    assert np.abs(found - embed(model, padded)).max() > 0.01
    in_one_row = embed(model, packed, slots=3, dropout_keys=packed_keys)
    np.testing.assert_allclose(in_one_row, found[np.array([2, 0, 1])], atol=3e-5)


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("bert", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0}),
        ("bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.2}),
        ("xlm-roberta", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}),
        ("llama", {"attention_dropout": 0.2}),
    ],
    ids=str,
)
def test_states_scatter_as_those_of_transformers_do(kind, rates, tmp_path: Path, tokenizer_files):
    """Mean and scatter of each final state, over many draws: they would be others if dropout sat elsewhere."""
    torch.manual_seed(0)
    make, config, own = MODELS[kind]
    make(config(**TINY | own | rates)).save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    tokens = np.tile(TEXT, (DRAWS, 1))
    mask = np.ones_like(tokens, bool)
    theirs = read_theirs(tmp_path).train()
    theirs.config.is_causal = False
    with torch.no_grad():
        output = theirs(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), output_hidden_states=True)
    embedded, expected = (state.numpy() for state in (output.hidden_states[0], output.last_hidden_state))
    ours = open_folder(tmp_path)
    rows = as_rows(tokens, mask)
    keys = token_keys(jax.random.key(0), rows, np.arange(DRAWS)[:, None])
    model = nnx.merge(ours.graph, ours.load())
    found, ours_embedded = map(np.asarray, model(rows, 0, lambda x: x, keys))
    # A state of the embeddings is either dropped or what it is scaled up: the same two values on both sides.
    for reduce in (np.min, np.max):
        np.testing.assert_allclose(reduce(ours_embedded, axis=0), reduce(embedded, axis=0), atol=1e-5)
    scatter, expected_scatter = found.std(axis=0), expected.std(axis=0)
    assert np.median(expected_scatter) > 0.1
    # A mean of so many draws is off by scatter / 63 or so, a scatter by a part in 126.
    assert np.abs((found.mean(axis=0) - expected.mean(axis=0)) / expected_scatter).max() < 6 * (2 / DRAWS) ** 0.5
    assert np.sum(scatter**2) == pytest.approx(np.sum(expected_scatter**2), rel=0.03)
    np.testing.assert_allclose(scatter, expected_scatter, rtol=0.15)
