"""Tests `PromptTokenizer` with real WordPiece, byte-level BPE and SentencePiece tokenizers."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from codiemb_jax.config import PromptSettings
from codiemb_jax.text.prompts import EmptyContentError, PromptTokenizer
from codiemb_jax.text.records import Triple
from scripts.fetch_wheel import extract

UNICODE = st.text(min_size=1, max_size=40)
SPECIAL_TOKENS = {
    "wordpiece": ("[CLS]", "[SEP]"),
    "bytes": ("<|im_start|>", "<|im_end|>"),
    "sentencepiece": ("<s>", "</s>"),
}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """Mistral's SentencePiece model as a tokenizer folder."""
    folder = tmp_path_factory.mktemp("mistral")
    extract("mistral", folder).rename(folder / "tokenizer.model")
    special = {"pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | special))
    return folder


@pytest.fixture(scope="module")
def tokenizers(minilm, smollm2, mistral) -> dict[str, tuple[PromptTokenizer, PreTrainedTokenizerFast]]:
    """The tokenizers of all-MiniLM-L6-v2, SmolLM2 and Mistral, with begin and end tokens."""
    tokenizers = {}
    for (kind, (begin, end)), folder in zip(SPECIAL_TOKENS.items(), (minilm, smollm2, mistral), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = PromptSettings(begin=begin, passage="Passage: ", end=end)
        tokenizers[kind] = PromptTokenizer(tokenizer, prompt), tokenizer
    return tokenizers


def test_tokenizers_are_of_three_kinds(tokenizers):
    models = [type(tokenizer.backend_tokenizer.model).__name__ for _, tokenizer in tokenizers.values()]
    assert models == ["WordPiece", "BPE", "BPE"]
    last_tokens = {kind: tokenizer.tokenize("the end")[-1] for kind, (_, tokenizer) in tokenizers.items()}
    assert last_tokens == {"wordpiece": "end", "bytes": "Ġend", "sentencepiece": "▁end"}


@pytest.mark.parametrize("kind", SPECIAL_TOKENS)
@settings(max_examples=150)
@given(
    task=UNICODE | st.just(""),
    instance=UNICODE | st.just(""),
    text=UNICODE,
    is_query=st.booleans(),
    limit=st.integers(3, 80),
)
def test_content_starts_after_the_prompt_and_truncation_keeps_the_end(
    kind, tokenizers, task, instance, text, is_query, limit
):
    prompt_tokenizer, tokenizer = tokenizers[kind]
    begin, end = SPECIAL_TOKENS[kind]
    triple = Triple.stripped(task, instance, text)
    tokenize = prompt_tokenizer.tokenize_queries if is_query else prompt_tokenizer.tokenize_passages
    prompt = "Passage: " if not is_query else f"Instruction: {triple.task} Query: " if triple.task else ""
    prompt = begin + prompt
    whole = prompt + triple.instance[:512] + triple.text + end
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # The expected tokens come from a single text instead of a batch.
    expected = backend.encode(whole, add_special_tokens=False)
    content = [i for i, (_, stop) in enumerate(expected.offsets) if stop > len(prompt)]
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert expected.ids[-1] == end_id
    try:
        (tokens,) = tokenize([triple], limit)
    except EmptyContentError as error:
        assert (content[0] >= limit - 1) if error.min_limits else content == [len(expected.ids) - 1]
        return
    assert tokens.ids.size == min(len(expected.ids), limit)
    assert tokens.ids[-1] == end_id
    assert tokens.ids[:-1].tolist() == expected.ids[: tokens.ids.size - 1]
    assert list(range(tokens.content_start, len(expected.ids))) == content
    pooled = np.arange(tokens.ids.size)[tokens.content_start :]
    assert pooled.size >= 2  # at least one token of the text, and the end token


@pytest.mark.parametrize("kind", SPECIAL_TOKENS)
def test_empty_text_raises_empty_content_error(kind, tokenizers):
    prompt_tokenizer, _ = tokenizers[kind]
    with pytest.raises(EmptyContentError):
        prompt_tokenizer.tokenize_queries([Triple("Find it", "", "")], 64)
