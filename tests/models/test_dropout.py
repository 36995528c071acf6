"""Tests the rate, the keys and the placement of dropout, the latter against transformers in training mode."""

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
from tests.models.parity import as_rows, load_reference, open_folder

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
NUM_DRAWS = 8000


def test_dropout_has_its_rate_and_scales_up_the_rest():
    keys = jax.random.split(jax.random.key(0), (64, 50))
    dropped = np.asarray(dropout(jnp.ones((64, 50, 40)), 0.25, keys))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    # The tolerance is four standard deviations of the mean of 128000 draws.
    assert abs((dropped == 0).mean() - 0.25) < 0.005
    assert np.ptp((dropped == 0).mean(axis=(1, 2))) < 0.1  # similar rate in all rows


def test_dropout_depends_only_on_the_key_of_the_token():
    keys = jax.random.split(jax.random.key(0), (4, 3))
    x = jnp.ones((4, 3, 100))
    dropped = np.asarray(dropout(x, 0.5, keys))
    np.testing.assert_array_equal(np.asarray(dropout(x[2:3], 0.5, keys[2:3]))[0], dropped[2])
    np.testing.assert_array_equal(np.asarray(dropout(x[2:3, 1:2], 0.5, keys[2:3, 1:2]))[0, 0], dropped[2, 1])
    assert (dropped[0] != dropped[1]).any()
    assert (dropped[0, 0] != dropped[0, 1]).any()


@pytest.mark.parametrize("kind", MODELS)
def test_dropout_does_not_depend_on_the_position_of_a_text_in_the_rows(kind, tmp_path, tokenizer_files):
    torch.manual_seed(0)
    model_class, config_class, options = MODELS[kind]
    model_class(config_class(**TINY | options)).save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    pretrained = open_folder(tmp_path, dropout=0.3)
    model = nnx.merge(pretrained.graph, pretrained.load())
    lengths = np.array([3, 5, 2])
    mask = np.arange(6) < lengths[:, None]
    tokens = np.where(mask, np.random.default_rng(0).integers(3, 300, mask.shape), 0)
    padded = as_rows(tokens, mask)
    packed = TokenRows(*(np.concatenate([x[2, :2], x[0, :3], x[1, :5], [0]])[None] for x in padded))
    packed.segment_ids[0, 2:5], packed.segment_ids[0, 5:10] = 2, 3
    key = jax.random.key(4)
    keys, packed_keys = token_keys(key, padded, np.arange(3)[:, None]), token_keys(key, packed, np.array([[2, 0, 1]]))
    expected = embed(model, padded, dropout_keys=keys)
    assert np.abs(expected - embed(model, padded)).max() > 0.01
    actual = embed(model, packed, slots=3, dropout_keys=packed_keys)
    np.testing.assert_allclose(actual, expected[np.array([2, 0, 1])], atol=3e-5)


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
def test_mean_and_std_of_states_match_transformers(kind, rates, tmp_path: Path, tokenizer_files):
    """Compares statistics of final states over many draws, which depend on where dropout is applied."""
    torch.manual_seed(0)
    model_class, config_class, options = MODELS[kind]
    model_class(config_class(**TINY | options | rates)).save_pretrained(tmp_path)
    tokenizer_files(tmp_path)
    tokens = np.tile(TEXT, (NUM_DRAWS, 1))
    mask = np.ones_like(tokens, bool)
    reference = load_reference(tmp_path).train()
    reference.config.is_causal = False
    with torch.no_grad():
        output = reference(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), output_hidden_states=True)
    expected_embedded, expected = (state.numpy() for state in (output.hidden_states[0], output.last_hidden_state))
    pretrained = open_folder(tmp_path)
    rows = as_rows(tokens, mask)
    keys = token_keys(jax.random.key(0), rows, np.arange(NUM_DRAWS)[:, None])
    model = nnx.merge(pretrained.graph, pretrained.load())
    actual, embedded = map(np.asarray, model(rows, 0, lambda x: x, keys))
    # An embedding value is either 0 or scaled up, so there are only two values to compare.
    for reduce in (np.min, np.max):
        np.testing.assert_allclose(reduce(embedded, axis=0), reduce(expected_embedded, axis=0), atol=1e-5)
    std, expected_std = actual.std(axis=0), expected.std(axis=0)
    assert np.median(expected_std) > 0.1
    # The difference of two means has a standard error of std / 63, and an std has one of std / 126.
    assert np.abs((actual.mean(axis=0) - expected.mean(axis=0)) / expected_std).max() < 6 * (2 / NUM_DRAWS) ** 0.5
    assert np.sum(std**2) == pytest.approx(np.sum(expected_std**2), rel=0.03)
    np.testing.assert_allclose(std, expected_std, rtol=0.15)
