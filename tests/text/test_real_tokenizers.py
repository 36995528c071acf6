"""Prompt masks of real tokenizers, of three kinds: WordPiece, byte-level BPE and SentencePiece."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from codiemb_jax.config import PromptSettings
from codiemb_jax.text.prompts import EmptyContent, PromptTokenizer
from codiemb_jax.text.records import Triple
from scripts.fetch_wheel import extract

UNICODE = st.text(min_size=1, max_size=40)
ENDS = {"wordpiece": ("[CLS]", "[SEP]"), "bytes": ("<|im_start|>", "<|im_end|>"), "sentencepiece": ("<s>", "</s>")}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    """Mistral's SentencePiece model as a tokenizer folder."""
    folder = tmp_path_factory.mktemp("mistral")
    extract("mistral", folder).rename(folder / "tokenizer.model")
    special = {"pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | special))
    return folder


@pytest.fixture(scope="module")
def encoders(minilm, smollm2, mistral) -> dict[str, tuple[PromptTokenizer, PreTrainedTokenizerFast]]:
    """The tokenizers of all-MiniLM-L6-v2, SmolLM2 and Mistral, with special tokens at both ends."""
    found = {}
    for (kind, (begin, end)), folder in zip(ENDS.items(), (minilm, smollm2, mistral), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = PromptSettings(begin=begin, passage="Passage: ", end=end)
        found[kind] = PromptTokenizer(tokenizer, prompt), tokenizer
    return found


def test_they_are_of_three_kinds(encoders):
    kinds = [type(tokenizer.backend_tokenizer.model).__name__ for _, tokenizer in encoders.values()]
    assert kinds == ["WordPiece", "BPE", "BPE"]
    blank = {kind: tokenizer.tokenize("the end")[-1] for kind, (_, tokenizer) in encoders.items()}
    assert blank == {"wordpiece": "end", "bytes": "Ġend", "sentencepiece": "▁end"}


@pytest.mark.parametrize("kind", ENDS)
@settings(max_examples=150)
@given(
    task=UNICODE | st.just(""),
    instance=UNICODE | st.just(""),
    text=UNICODE,
    is_query=st.booleans(),
    limit=st.integers(3, 80),
)
def test_what_ends_beyond_the_prompt_is_pooled_and_the_end_survives(
    kind, encoders, task, instance, text, is_query, limit
):
    encoder, tokenizer = encoders[kind]
    begin, end = ENDS[kind]
    triple = Triple.of(task, instance, text)
    encode = encoder.tokenize_queries if is_query else encoder.tokenize_passages
    prompt = "Passage: " if not is_query else f"Instruction: {triple.task} Query: " if triple.task else ""
    head = begin + prompt
    whole = head + triple.instance[:512] + triple.text + end
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # Not in a batch, and by characters: what the encoder must find in batches and by index.
    expected = backend.encode(whole, add_special_tokens=False)
    content = [i for i, (_, stop) in enumerate(expected.offsets) if stop > len(head)]
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert expected.ids[-1] == end_id
    try:
        (found,) = encode([triple], limit)
    except EmptyContent as error:
        assert (content[0] >= limit - 1) if error.no_room else content == [len(expected.ids) - 1]
        return
    assert found.ids.size == min(len(expected.ids), limit)
    assert found.ids[-1] == end_id
    assert found.ids[:-1].tolist() == expected.ids[: found.ids.size - 1]
    assert list(range(found.content, len(expected.ids))) == content
    pooled = np.arange(found.ids.size)[found.content :]
    assert pooled.size >= 2  # at least one token of the text, and the end


@pytest.mark.parametrize("kind", ENDS)
def test_an_empty_text_is_an_error(kind, encoders):
    encoder, _ = encoders[kind]
    with pytest.raises(EmptyContent):
        encoder.tokenize_queries([Triple("Find it", "", "")], 64)
