"""Texts as sentence-transformers tokenizes them: its vectors are compared in tests/checkpoints."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from codiemb_jax.text.sentence import SentencePrompts, SentenceTokenizer


@pytest.fixture
def with_ends(make_tokenizer) -> PreTrainedTokenizerFast:
    """Puts <s> (0) and </s> (1) around a text."""
    tokenizer = make_tokenizer(400)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def test_a_prompt_stands_before_the_text_and_special_tokens_around_both(with_ends):
    encoder = SentenceTokenizer(with_ends, SentencePrompts(include_prompt=False))
    (tokens,) = encoder.tokenize(["brown fox"], "query: ", 99)
    assert tokens.ids.tolist() == [0, *with_ends.encode("query: brown fox", add_special_tokens=False), 1]
    # The number of tokens of the prompt alone, with what stands before it; its last token is special and not one of it.
    assert tokens.content == 1 + len(with_ends.encode("query: ", add_special_tokens=False))


@pytest.mark.parametrize(("prompt", "include_prompt"), [("", False), ("", True), ("query: ", True)])
def test_all_is_pooled_where_no_prompt_is_left_out(prompt, include_prompt, with_ends):
    encoder = SentenceTokenizer(with_ends, SentencePrompts(include_prompt=include_prompt))
    assert [tokens.content for tokens in encoder.tokenize(["a", "brown fox"], prompt, 99)] == [0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_long_text_is_cut_off_and_special_tokens_stay(side, with_ends):
    with_ends.truncation_side = side
    encoder = SentenceTokenizer(with_ends, SentencePrompts())
    text = "The quick brown fox jumps over the lazy dog " * 9
    ids = with_ends.backend_tokenizer.encode(text, add_special_tokens=False).ids
    (tokens,) = encoder.tokenize([text], "", 20)
    assert tokens.ids.tolist() == [0, *(ids[-18:] if side == "left" else ids[:18]), 1]
    (tokens,) = encoder.tokenize([text], "", 999)
    assert tokens.ids.tolist() == [0, *ids, 1]
    with_ends([text, "x"], truncation=True, padding=True)  # leaves both set
    assert [len(tokens.ids) for tokens in encoder.tokenize([text, "x"], "", 999)] == [len(ids) + 2, 3]


def test_lower_case(with_ends, make_tokenizer):
    (lower,) = SentenceTokenizer(with_ends, SentencePrompts()).tokenize(["brown fox"], "find: ", 99)
    encoder = SentenceTokenizer(with_ends, SentencePrompts(do_lower_case=True))
    (tokens,) = encoder.tokenize(["BROWN Fox"], "Find: ", 99)
    assert tokens.ids.tolist() == lower.ids.tolist()


def test_prompts_have_the_names_that_sentence_transformers_gives_them(with_ends):
    """It knows a prompt of queries and one of documents even where a folder names none."""
    assert SentenceTokenizer(with_ends, SentencePrompts()).prompts == {"query": "", "document": ""}
    prompts = SentencePrompts(prompts={"query": "q: ", "passage": "p: "}, default_prompt_name="passage")
    encoder = SentenceTokenizer(with_ends, prompts)
    assert encoder.prompts == {"query": "q: ", "document": "", "passage": "p: "}
    assert encoder.default_prompt_name == "passage"
