"""Tests the encoder against transformers with weights written by transformers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.stats import norm
from transformers import BertConfig, BertForPreTraining, BertModel, XLMRobertaConfig, XLMRobertaForMaskedLM

from codiemb_jax.batch import TokenRows
from codiemb_jax.models.embed import embed, embed_with_middle
from codiemb_jax.models.encoder import gelu
from tests.models.parity import as_rows, assert_same_hidden_states, load_reference, open_folder, random_tokens

TINY = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
PASSAGE = "The committee met in the spring to settle the budget and heard the reports of the working groups. "


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_gelu_and_its_gradient_against_scipy(dtype: jnp.dtype, tolerance: float) -> None:
    x = jnp.concatenate([jnp.linspace(-12, 12, 4001), jnp.array([-1e30, -0.0, 1e30])]).astype(dtype)
    exact = np.asarray(x, np.float64)
    value, gradient = jax.jit(lambda x: (gelu(x), jax.grad(lambda x: gelu(x).astype(jnp.float32).sum())(x)))(x)
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(np.asarray(value, np.float64), exact * norm.cdf(exact), rtol=tolerance, atol=1e-6)
    expected = norm.cdf(exact) + exact * norm.pdf(exact)
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=tolerance, atol=1e-6)


def write_model(folder: Path, kind: str, activation: str = "gelu") -> None:
    torch.manual_seed(0)
    if kind == "bert":
        model = BertModel(BertConfig(**TINY, hidden_act=activation))
    elif kind == "bert-pretraining":
        model = BertForPreTraining(BertConfig(**TINY, tie_word_embeddings=False))
    else:
        config = XLMRobertaConfig(
            **TINY | {"max_position_embeddings": 515},
            hidden_act=activation,
            layer_norm_eps=1e-5,
            type_vocab_size=1,
            pad_token_id=2,
        )
        model = XLMRobertaForMaskedLM(config)
    for name, weight in model.named_parameters():
        if "LayerNorm" in name or "bias" in name:  # ones and zeros by default
            torch.nn.init.normal_(weight, 1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3)
    model.save_pretrained(folder)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_hidden_states_match_transformers(kind, activation, tmp_path, tokenizer_files):
    write_model(tmp_path, kind, activation)
    tokenizer_files(tmp_path)
    model = open_folder(tmp_path)
    assert_same_hidden_states(model, load_reference(tmp_path), *random_tokens(model.config.vocab_size))


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_longest_text_matches_transformers(kind, tmp_path, tokenizer_files):
    write_model(tmp_path, kind)
    tokenizer_files(tmp_path)
    model = open_folder(tmp_path)
    assert model.config.max_positions == 512
    tokens = np.random.default_rng(1).integers(3, 300, (1, 512))
    assert_same_hidden_states(model, load_reference(tmp_path), tokens, np.ones((1, 512), bool))


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_texts_with_padding_tokens_match_transformers(kind, tmp_path, tokenizer_files):
    """XLM-RoBERTa does not count literal <pad> tokens in a text as positions."""
    write_model(tmp_path, kind)
    tokenizer_files(tmp_path)
    pretrained = open_folder(tmp_path)
    tokens, mask = random_tokens(300)
    is_pad = np.random.default_rng(2).random(tokens.shape) < 0.1
    tokens = np.where(mask & is_pad, 2, tokens)
    tokens[2, :2] = 2
    assert (tokens[mask] == 2).sum() > 40
    assert_same_hidden_states(pretrained, load_reference(tmp_path), np.where(mask, tokens, 2), mask)
    model = nnx.merge(pretrained.graph, pretrained.load())
    padded = as_rows(tokens[1:3, :140], mask[1:3, :140])
    packed = TokenRows(*(np.concatenate([x[0, :7], x[1, :131], [0, 0]])[None] for x in padded))
    packed.segment_ids[0, 7:138] = 2
    np.testing.assert_allclose(embed(model, packed, slots=2), embed(model, padded), atol=3e-5)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_left_and_right_padding_give_equal_embeddings(kind, tmp_path, tokenizer_files):
    write_model(tmp_path, kind)
    tokenizer_files(tmp_path)
    pretrained = open_folder(tmp_path, pooling="cls")
    model = nnx.merge(pretrained.graph, pretrained.load())
    tokens, mask = random_tokens(300)
    right = embed(model, as_rows(tokens, mask))
    shifted = np.zeros_like(tokens)
    for row, count in enumerate(mask.sum(axis=1)):
        shifted[row, mask.shape[1] - count :] = tokens[row, :count]
    left = embed(model, as_rows(shifted, mask[:, ::-1]))
    np.testing.assert_allclose(left, right, atol=2e-6)


def test_minilm_hidden_states_match_transformers(minilm):
    model = open_folder(minilm)
    tokenizer = model.blueprint.tokenizer().backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = ["[CLS]" + (PASSAGE * 40)[: 4 * n] + "[SEP]" for n in (500, 40, 130)]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:500] for text in texts]
    tokens, mask = np.zeros((3, 500), int), np.zeros((3, 500), bool)
    for row, row_ids in enumerate(ids):
        tokens[row, : len(row_ids)], mask[row, : len(row_ids)] = row_ids, True
    assert mask.sum(axis=1).max() > 350
    assert_same_hidden_states(model, load_reference(minilm), tokens, mask)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token", "weighted_mean"])
def test_packed_and_padded_texts_have_equal_embeddings(kind, pooling, tmp_path, tokenizer_files):
    write_model(tmp_path, kind)
    tokenizer_files(tmp_path)
    pretrained = open_folder(tmp_path, pooling=pooling)
    model = nnx.merge(pretrained.graph, pretrained.load())
    tokens, mask = random_tokens(300)
    tokens, mask = tokens[1:3, :140], mask[1:3, :140]  # 7 and 131 tokens
    padded = as_rows(tokens, mask)
    packed = TokenRows(*(np.concatenate([x[0, :7], x[1, :131], [0, 0]])[None] for x in padded))
    packed.segment_ids[0, 7:138] = 2
    for actual, expected in zip(
        embed_with_middle(model, padded), embed_with_middle(model, packed, slots=2), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=3e-5)


def test_unused_weights_are_passed_through(tmp_path, tokenizer_files):
    write_model(tmp_path, "bert-pretraining")
    tokenizer_files(tmp_path)
    model = open_folder(tmp_path)
    assert model.blueprint.prefix == "bert."
    names = {"bert.pooler.dense.weight", "cls.predictions.transform.dense.weight", "cls.seq_relationship.bias"}
    assert names <= set(model.stream_passthrough())


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_dropout_comes_from_the_config_unless_overridden(kind, tmp_path, tokenizer_files):
    write_model(tmp_path, kind)
    tokenizer_files(tmp_path)
    rates = {
        value: (config.hidden_dropout, config.attention_dropout, config.has_dropout)
        for value in (None, 0.0, 0.3)
        for config in [open_folder(tmp_path, dropout=value).config]
    }
    assert rates == {None: (0.1, 0.1, True), 0.0: (0.0, 0.0, False), 0.3: (0.3, 0.3, True)}
    tokens, mask = random_tokens(300)
    rows = as_rows(tokens[1:], mask[1:])
    keys = jax.random.split(jax.random.key(3), rows.tokens.shape)
    pretrained = open_folder(tmp_path)
    model = nnx.merge(pretrained.graph, pretrained.load())
    plain, dropped = embed(model, rows), embed(model, rows, dropout_keys=keys)
    assert np.abs(plain - dropped).max() > 0.01
    np.testing.assert_array_equal(dropped, embed(model, rows, dropout_keys=keys))
    no_dropout = nnx.merge(open_folder(tmp_path, dropout=0.0).graph, pretrained.load())
    np.testing.assert_array_equal(embed(no_dropout, rows, dropout_keys=keys), embed(no_dropout, rows))
