"""Tests `PromptTokenizer`."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from codiemb_jax.config import PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import EmptyContentError, PromptTokenizer
from codiemb_jax.text.records import Triple

PROMPT = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
FEW_EXAMPLES = settings(derandomize=True, deadline=None, max_examples=60)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def decode(tokenizer, tokens) -> tuple[str, str]:
    """Decodes the prompt and the content."""
    prompt, content = tokens.ids[: tokens.content_start], tokens.ids[tokens.content_start :]
    return tokenizer.decode(prompt.tolist()), tokenizer.decode(content.tolist())


def test_query_has_prompt_and_end(tokenizer):
    prompt_tokenizer = PromptTokenizer(tokenizer, PROMPT)
    (tokens,) = prompt_tokenizer.tokenize_queries([Triple("find {it}", "now", "brown fox")], 99)
    # A token that crosses the boundary belongs to the content, like "Ġnow" with its space.
    assert decode(tokenizer, tokens) == ("<s>Instruction: find {it} Query:", " nowbrown fox</s>")
    assert tokens.ids.dtype == np.int32


def test_query_without_instruction_has_no_prompt(tokenizer):
    (tokens,) = PromptTokenizer(tokenizer, PROMPT).tokenize_queries([Triple("", "", "brown fox")], 99)
    assert decode(tokenizer, tokens) == ("<s>", "brown fox</s>")


def test_passage_has_its_own_prompt_and_no_instruction(tokenizer):
    (tokens,) = PromptTokenizer(tokenizer, PROMPT).tokenize_passages([Triple("find", "", "brown fox")], 99)
    assert decode(tokenizer, tokens) == ("<s>Passage:", " brown fox</s>")


def test_include_in_pooling(tokenizer):
    triples = [Triple("find", "", "brown fox")]
    without = PromptTokenizer(tokenizer, PROMPT)
    including = PromptTokenizer(tokenizer, PROMPT.model_copy(update={"include_in_pooling": True}))
    for name in ("tokenize_queries", "tokenize_passages"):
        (excluded,) = getattr(without, name)(triples, 99)
        (included,) = getattr(including, name)(triples, 99)
        assert excluded.content_start > included.content_start == 0
        assert np.array_equal(excluded.ids, included.ids)


def test_tokenize_matches_training(tokenizer):
    prompt_tokenizer = PromptTokenizer(tokenizer, PROMPT)
    texts = [" brown fox:\n", "我", "a b c " * 30]
    triples = [Triple.stripped(PROMPT.default_instruction, "", text) for text in texts]
    assert set(prompt_tokenizer.prompts) == {"query", "document"}
    assert prompt_tokenizer.query_prompt(PROMPT.default_instruction) == prompt_tokenizer.prompts["query"]
    assert prompt_tokenizer.query_prompt("find") == "<s>Instruction: find Query: "
    assert prompt_tokenizer.query_prompt("") == "<s>"
    for name, expected in (
        ("query", prompt_tokenizer.tokenize_queries(triples, 60)),
        ("document", prompt_tokenizer.tokenize_passages(triples, 60)),
    ):
        tokenized = prompt_tokenizer.tokenize(texts, prompt_tokenizer.prompts[name], 60)
        for actual, tokens in zip(tokenized, expected, strict=True):
            assert np.array_equal(actual.ids, tokens.ids) and actual.content_start == tokens.content_start


def test_no_special_tokens_by_default(tokenizer):
    prompt_tokenizer = PromptTokenizer(tokenizer, PromptSettings())
    (tokens,) = prompt_tokenizer.tokenize_passages([Triple("", "", "brown fox")], 99)
    assert tokens.content_start == 0
    assert tokens.ids.tolist() == tokenizer.encode("brown fox", add_special_tokens=False)


def test_instance_instruction_is_truncated_to_512_characters(tokenizer):
    prompt_tokenizer = PromptTokenizer(tokenizer, PromptSettings())
    long, truncated = prompt_tokenizer.tokenize_queries(
        [Triple("", "我" * 600, "x"), Triple("", "我" * 512, "x")], 9999
    )
    assert np.array_equal(long.ids, truncated.ids)
    assert tokenizer.decode(long.ids.tolist()) == "我" * 512 + "x"


@FEW_EXAMPLES
@given(task=UNICODE | st.just(""), instance=UNICODE | st.just(""), text=UNICODE, wrap=st.booleans())
def test_content_starts_with_the_first_token_that_ends_after_the_prompt(tokenizer, task, instance, text, wrap):
    prompt = PROMPT if wrap else PromptSettings()
    query_prompt = prompt.begin + (f"Instruction: {task} Query: " if task else "")
    (tokens,) = PromptTokenizer(tokenizer, prompt).tokenize_queries([Triple(task, instance, text)], 10**6)
    expected = tokenizer(
        query_prompt + instance + text + prompt.end,
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=False,
    )
    assert tokens.ids.tolist() == expected["input_ids"]
    content = [i for i, (_, end) in enumerate(expected["offset_mapping"]) if end > len(query_prompt)]
    assert list(range(tokens.content_start, tokens.ids.size)) == content


@FEW_EXAMPLES
@given(task=UNICODE | st.just(""), text=UNICODE, limit=st.integers(1, 60))
def test_truncation_shortens_the_content_and_keeps_the_end(tokenizer, task, text, limit):
    prompt_tokenizer = PromptTokenizer(tokenizer, PromptSettings(begin="<s><s>", end="</s></s>"))
    triple = Triple(task, "", text)
    (whole,) = prompt_tokenizer.tokenize_queries([triple], 10**6)
    try:
        (tokens,) = prompt_tokenizer.tokenize_queries([triple], limit)
    except EmptyContentError as error:
        assert error.min_limits == {0: whole.content_start + 3}
        assert limit < whole.content_start + 3
        return
    assert tokens.content_start == whole.content_start < tokens.ids.size - 2
    assert tokens.ids.size == min(limit, whole.ids.size)
    assert tokens.ids[-2:].tolist() == [1, 1]
    assert np.array_equal(tokens.ids[:-2], whole.ids[: tokens.ids.size - 2])


def test_truncation_and_padding_state_of_the_tokenizer_is_ignored(tokenizer, caplog):
    prompt_tokenizer = PromptTokenizer(tokenizer, PromptSettings())
    text = "The quick brown fox " * 20
    (before,) = prompt_tokenizer.tokenize_passages([Triple("", "", text)], 9999)
    tokenizer([text, "x"], truncation=True, padding=True)  # sets the state of both
    (after,) = prompt_tokenizer.tokenize_passages([Triple("", "", text)], 9999)
    assert tokenizer.decode(before.ids.tolist()) == text
    assert np.array_equal(before.ids, after.ids)
    assert not caplog.records


def test_tokens_do_not_depend_on_the_batch(tokenizer):
    prompt_tokenizer, rng = PromptTokenizer(tokenizer, PROMPT), random.Random(0)
    triples = [Triple("", "", "x" + "".join(rng.choices("ab 我", k=k))) for k in range(30)]
    batch = prompt_tokenizer.tokenize_passages(triples, 20)
    for triple, tokens in zip(triples, batch, strict=True):
        (alone,) = prompt_tokenizer.tokenize_passages([triple], 20)
        assert np.array_equal(alone.ids, tokens.ids) and alone.content_start == tokens.content_start
    assert prompt_tokenizer.tokenize_passages([], 20) == []


def test_texts_without_content_raise_empty_content_error(letter_tokenizer):
    prompt = PromptSettings(begin="<s>", query="a{instruction}a", end="</s>")
    triples = [Triple("b", "", text) for text in ("b", "?", "bbb")] + [Triple("bbb", "", "bb")]
    prompt_tokenizer = PromptTokenizer(letter_tokenizer, prompt)
    with pytest.raises(EmptyContentError) as caught:
        prompt_tokenizer.tokenize_queries(triples, 6)
    assert caught.value.min_limits == {3: 8}
    assert caught.value.no_tokens == [1]
    with pytest.raises(EmptyContentError) as caught:
        prompt_tokenizer.tokenize_queries(triples, 3)  # shorter than the prompt
    assert caught.value.min_limits == {0: 6, 2: 6, 3: 8}
    whole, truncated = prompt_tokenizer.tokenize_queries([triples[0], triples[2]], 6)
    assert whole.ids.tolist() == truncated.ids.tolist() == [0, 3, 4, 3, 4, 1]


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        ({"begin": "<s> "}, "prompt.begin: '<s> ' does not consist of special tokens of the tokenizer"),
        ({"begin": "[CLS]"}, "expected tokens among </s>, <pad>, <s>"),
        ({"end": "x"}, "prompt.end: 'x'"),
    ],
)
def test_begin_or_end_with_other_tokens_raises_user_error(tokenizer, strings, message):
    with pytest.raises(UserError) as caught:
        PromptTokenizer(tokenizer, PromptSettings(**strings))
    assert message in str(caught.value)


def test_begin_outside_the_vocabulary_raises_user_error():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "<pad>": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="<pad>")
    with pytest.raises(UserError, match="prompt.begin"):
        PromptTokenizer(tokenizer, PromptSettings(begin="<s>"))


def test_tokenizer_without_pad_token_raises_user_error():
    backend = Tokenizer(models.WordLevel({"a": 0}))
    with pytest.raises(UserError, match="set pad_token in its tokenizer_config.json"):
        PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), PromptSettings())


def test_slow_tokenizer_raises_user_error():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="needs a tokenizer.json"):
        PromptTokenizer(Slow(), PromptSettings())


def test_fingerprint_changes_with_tokenizer_and_prompt(make_tokenizer, tokenizer):
    def fingerprint(tokenizer, **prompt):
        return PromptTokenizer(tokenizer, PromptSettings(**prompt)).fingerprint

    base = fingerprint(tokenizer)
    tokenizer(["a", "b c"], truncation=True, padding=True)
    assert fingerprint(tokenizer) == fingerprint(make_tokenizer(400)) == base
    assert fingerprint(tokenizer, default_instruction="other") == base
    changed = [
        fingerprint(make_tokenizer(390)),
        fingerprint(tokenizer, begin="<s>"),
        fingerprint(tokenizer, end="<s>"),
        fingerprint(tokenizer, query="{instruction} "),
        fingerprint(tokenizer, passage="<s>"),
        fingerprint(tokenizer, include_in_pooling=True),
    ]
    assert len({base, *changed}) == 7
