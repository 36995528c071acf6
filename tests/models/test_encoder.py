"""The encoder against transformers, on weights written by transformers; dropout against its formula."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import BertConfig, BertForPreTraining, BertModel, XLMRobertaConfig, XLMRobertaForMaskedLM

from codiemb_jax.batch import TokenRows
from codiemb_jax.models.embed import embed, embed_with_middle
from tests.models.parity import as_rows, assert_same_hidden_states, open_folder, random_tokens, read_theirs

TINY = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
PASSAGE = "The committee met in the spring to settle the budget and heard the reports of the working groups. "


def write(folder: Path, kind: str, activation: str = "gelu") -> None:
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
        if "LayerNorm" in name or "bias" in name:  # ones and zeros otherwise
            torch.nn.init.normal_(weight, 1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.3)
    model.save_pretrained(folder)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_hidden_states_are_those_of_transformers(kind, activation, tmp_path, tokenizer_files):
    write(tmp_path, kind, activation)
    tokenizer_files(tmp_path)
    ours = open_folder(tmp_path)
    assert_same_hidden_states(ours, read_theirs(tmp_path), *random_tokens(ours.config.vocab_size))


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_all_positions_are_those_of_transformers(kind, tmp_path, tokenizer_files):
    write(tmp_path, kind)
    tokenizer_files(tmp_path)
    ours = open_folder(tmp_path)
    assert ours.config.max_positions == 512
    tokens = np.random.default_rng(1).integers(3, 300, (1, 512))
    assert_same_hidden_states(ours, read_theirs(tmp_path), tokens, np.ones((1, 512), bool))


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_padding_tokens_inside_a_text_have_the_positions_of_transformers(kind, tmp_path, tokenizer_files):
    """An XLM-RoBERTa does not count a literal <pad> that a text holds."""
    write(tmp_path, kind)
    tokenizer_files(tmp_path)
    ours = open_folder(tmp_path)
    tokens, mask = random_tokens(300)
    inside = np.random.default_rng(2).random(tokens.shape) < 0.1
    tokens = np.where(mask & inside, 2, tokens)
    tokens[2, :2] = 2
    assert (tokens[mask] == 2).sum() > 40
    assert_same_hidden_states(ours, read_theirs(tmp_path), np.where(mask, tokens, 2), mask)
    model = nnx.merge(ours.graph, ours.load())
    padded = as_rows(tokens[1:3, :140], mask[1:3, :140])
    packed = TokenRows(*(np.concatenate([x[0, :7], x[1, :131], [0, 0]])[None] for x in padded))
    packed.segment_ids[0, 7:138] = 2
    np.testing.assert_allclose(embed(model, packed, slots=2), embed(model, padded), atol=3e-5)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_padding_on_the_left_is_no_different(kind, tmp_path, tokenizer_files):
    write(tmp_path, kind)
    tokenizer_files(tmp_path)
    model = nnx.merge((folder := open_folder(tmp_path, pooling="cls")).graph, folder.load())
    tokens, mask = random_tokens(300)
    right = embed(model, as_rows(tokens, mask))
    shifted = np.zeros_like(tokens)
    for row, count in enumerate(mask.sum(axis=1)):
        shifted[row, mask.shape[1] - count :] = tokens[row, :count]
    left = embed(model, as_rows(shifted, mask[:, ::-1]))
    np.testing.assert_allclose(left, right, atol=2e-6)


def test_minilm_on_real_text(minilm):
    ours = open_folder(minilm)
    tokenizer = ours.blueprint.tokenizer().backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = ["[CLS]" + (PASSAGE * 40)[: 4 * n] + "[SEP]" for n in (500, 40, 130)]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:500] for text in texts]
    tokens, mask = np.zeros((3, 500), int), np.zeros((3, 500), bool)
    for row, found in enumerate(ids):
        tokens[row, : len(found)], mask[row, : len(found)] = found, True
    assert mask.sum(axis=1).max() > 350
    assert_same_hidden_states(ours, read_theirs(minilm), tokens, mask)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token", "weighted_mean"])
def test_packed_texts_have_the_vectors_of_padded_ones(kind, pooling, tmp_path, tokenizer_files):
    write(tmp_path, kind)
    tokenizer_files(tmp_path)
    folder = open_folder(tmp_path, pooling=pooling)
    model = nnx.merge(folder.graph, folder.load())
    tokens, mask = random_tokens(300)
    tokens, mask = tokens[1:3, :140], mask[1:3, :140]  # 7 and 131 tokens
    padded = as_rows(tokens, mask)
    packed = TokenRows(*(np.concatenate([x[0, :7], x[1, :131], [0, 0]])[None] for x in padded))
    packed.segment_ids[0, 7:138] = 2
    for one, many in zip(embed_with_middle(model, padded), embed_with_middle(model, packed, slots=2), strict=True):
        np.testing.assert_allclose(one, many, atol=3e-5)


def test_what_training_does_not_use_is_told_and_kept(tmp_path, tokenizer_files):
    write(tmp_path, "bert-pretraining")
    tokenizer_files(tmp_path)
    model = open_folder(tmp_path)
    assert model.blueprint.prefix == "bert."
    kept = model.stream_passthrough()
    assert {"bert.pooler.dense.weight", "cls.predictions.transform.dense.weight", "cls.seq_relationship.bias"} <= set(
        kept
    )


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta"])
def test_dropout_is_that_of_the_config_unless_overridden(kind, tmp_path, tokenizer_files):
    write(tmp_path, kind)
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
    folder = open_folder(tmp_path)
    model = nnx.merge(folder.graph, folder.load())
    plain, dropped = embed(model, rows), embed(model, rows, dropout_keys=keys)
    assert np.abs(plain - dropped).max() > 0.01
    np.testing.assert_array_equal(dropped, embed(model, rows, dropout_keys=keys))
    without = nnx.merge(open_folder(tmp_path, dropout=0.0).graph, folder.load())
    np.testing.assert_array_equal(embed(without, rows, dropout_keys=keys), embed(without, rows))
