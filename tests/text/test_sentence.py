"""Tests `SentenceTokenizer`. Embeddings are compared with sentence-transformers in tests/checkpoints."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from codiemb_jax.text.sentence import SentencePrompts, SentenceTokenizer


@pytest.fixture
def bos_eos_tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer that adds <s> (0) and </s> (1) around each text."""
    tokenizer = make_tokenizer(400)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def test_prompt_is_inserted_after_the_first_special_token(bos_eos_tokenizer):
    tokenizer = SentenceTokenizer(bos_eos_tokenizer, SentencePrompts(include_prompt=False))
    (tokens,) = tokenizer.tokenize(["brown fox"], "query: ", 99)
    assert tokens.ids.tolist() == [0, *bos_eos_tokenizer.encode("query: brown fox", add_special_tokens=False), 1]
    # The prompt is tokenized alone, without the end token that this adds.
    assert tokens.content_start == 1 + len(bos_eos_tokenizer.encode("query: ", add_special_tokens=False))


@pytest.mark.parametrize(("prompt", "include_prompt"), [("", False), ("", True), ("query: ", True)])
def test_all_tokens_are_pooled_without_an_excluded_prompt(prompt, include_prompt, bos_eos_tokenizer):
    tokenizer = SentenceTokenizer(bos_eos_tokenizer, SentencePrompts(include_prompt=include_prompt))
    assert [tokens.content_start for tokens in tokenizer.tokenize(["a", "brown fox"], prompt, 99)] == [0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_special_tokens(side, bos_eos_tokenizer):
    bos_eos_tokenizer.truncation_side = side
    tokenizer = SentenceTokenizer(bos_eos_tokenizer, SentencePrompts())
    text = "The quick brown fox jumps over the lazy dog " * 9
    ids = bos_eos_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    (tokens,) = tokenizer.tokenize([text], "", 20)
    assert tokens.ids.tolist() == [0, *(ids[-18:] if side == "left" else ids[:18]), 1]
    (tokens,) = tokenizer.tokenize([text], "", 999)
    assert tokens.ids.tolist() == [0, *ids, 1]
    bos_eos_tokenizer([text, "x"], truncation=True, padding=True)  # sets the state of both
    assert [len(tokens.ids) for tokens in tokenizer.tokenize([text, "x"], "", 999)] == [len(ids) + 2, 3]


def test_do_lower_case(bos_eos_tokenizer, make_tokenizer):
    (lower,) = SentenceTokenizer(bos_eos_tokenizer, SentencePrompts()).tokenize(["brown fox"], "find: ", 99)
    tokenizer = SentenceTokenizer(bos_eos_tokenizer, SentencePrompts(do_lower_case=True))
    (tokens,) = tokenizer.tokenize(["BROWN Fox"], "Find: ", 99)
    assert tokens.ids.tolist() == lower.ids.tolist()


def test_query_and_document_prompts_exist_by_default(bos_eos_tokenizer):
    """sentence-transformers defines both even for folders without prompts."""
    assert SentenceTokenizer(bos_eos_tokenizer, SentencePrompts()).prompts == {"query": "", "document": ""}
    prompts = SentencePrompts(prompts={"query": "q: ", "passage": "p: "}, default_prompt_name="passage")
    tokenizer = SentenceTokenizer(bos_eos_tokenizer, prompts)
    assert tokenizer.prompts == {"query": "q: ", "document": "", "passage": "p: "}
    assert tokenizer.default_prompt_name == "passage"
