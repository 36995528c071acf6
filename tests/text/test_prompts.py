import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from codiemb_jax.config import PromptSettings
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import EmptyContent, PromptTokenizer
from codiemb_jax.text.records import Triple

WRAPPED = PromptSettings(begin="<s>", passage="Passage: ", end="</s>")
SLOWLY = settings(derandomize=True, deadline=None, max_examples=60)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def decoded(tokenizer, tokens) -> tuple[str, str]:
    """What stands before the content, and the content."""
    before, content = tokens.ids[: tokens.content], tokens.ids[tokens.content :]
    return tokenizer.decode(before.tolist()), tokenizer.decode(content.tolist())


def test_the_parts_of_a_query(tokenizer):
    encoder = PromptTokenizer(tokenizer, WRAPPED)
    (tokens,) = encoder.tokenize_queries([Triple("find {it}", "now", "brown fox")], 99)
    # A token may straddle the border; then it belongs to the content, as does the blank of "Ġnow".
    assert decoded(tokenizer, tokens) == ("<s>Instruction: find {it} Query:", " nowbrown fox</s>")
    assert tokens.ids.dtype == np.int32


def test_without_instruction_there_is_no_query_prompt(tokenizer):
    (tokens,) = PromptTokenizer(tokenizer, WRAPPED).tokenize_queries([Triple("", "", "brown fox")], 99)
    assert decoded(tokenizer, tokens) == ("<s>", "brown fox</s>")


def test_a_passage_has_its_own_prompt_and_no_instruction(tokenizer):
    (tokens,) = PromptTokenizer(tokenizer, WRAPPED).tokenize_passages([Triple("find", "", "brown fox")], 99)
    assert decoded(tokenizer, tokens) == ("<s>Passage:", " brown fox</s>")


def test_pooling_may_cover_the_prompt(tokenizer):
    triples = [Triple("find", "", "brown fox")]
    left_out = PromptTokenizer(tokenizer, WRAPPED)
    covered = PromptTokenizer(tokenizer, WRAPPED.model_copy(update={"include_in_pooling": True}))
    for name in ("tokenize_queries", "tokenize_passages"):
        (one,), (other,) = (getattr(encoder, name)(triples, 99) for encoder in (left_out, covered))
        assert one.content > other.content == 0
        assert np.array_equal(one.ids, other.ids)


def test_texts_after_a_prompt_are_those_of_training(tokenizer):
    encoder = PromptTokenizer(tokenizer, WRAPPED)
    texts = [" brown fox:\n", "我", "a b c " * 30]
    triples = [Triple.of(WRAPPED.default_instruction, "", text) for text in texts]
    assert set(encoder.prompts) == {"query", "document"}
    assert encoder.query_prompt(WRAPPED.default_instruction) == encoder.prompts["query"]
    assert encoder.query_prompt("find") == "<s>Instruction: find Query: "
    assert encoder.query_prompt("") == "<s>"
    for name, expected in (
        ("query", encoder.tokenize_queries(triples, 60)),
        ("document", encoder.tokenize_passages(triples, 60)),
    ):
        for found, tokens in zip(encoder.tokenize(texts, encoder.prompts[name], 60), expected, strict=True):
            assert np.array_equal(found.ids, tokens.ids) and found.content == tokens.content


def test_no_special_tokens_unless_asked_for(tokenizer):
    encoder = PromptTokenizer(tokenizer, PromptSettings())
    (tokens,) = encoder.tokenize_passages([Triple("", "", "brown fox")], 99)
    assert tokens.content == 0
    assert tokens.ids.tolist() == tokenizer.encode("brown fox", add_special_tokens=False)


def test_512_characters_of_the_instance_instruction_are_read(tokenizer):
    encoder = PromptTokenizer(tokenizer, PromptSettings())
    long, cut = encoder.tokenize_queries([Triple("", "我" * 600, "x"), Triple("", "我" * 512, "x")], 9999)
    assert np.array_equal(long.ids, cut.ids)
    assert tokenizer.decode(long.ids.tolist()) == "我" * 512 + "x"


@SLOWLY
@given(task=UNICODE | st.just(""), instance=UNICODE | st.just(""), text=UNICODE, wrap=st.booleans())
def test_content_is_what_ends_beyond_the_prompt(tokenizer, task, instance, text, wrap):
    prompt = WRAPPED if wrap else PromptSettings()
    head = prompt.begin + (f"Instruction: {task} Query: " if task else "")
    (tokens,) = PromptTokenizer(tokenizer, prompt).tokenize_queries([Triple(task, instance, text)], 10**6)
    expected = tokenizer(
        head + instance + text + prompt.end,
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=False,
    )
    assert tokens.ids.tolist() == expected["input_ids"]
    content = [i for i, (_, end) in enumerate(expected["offset_mapping"]) if end > len(head)]
    assert list(range(tokens.content, tokens.ids.size)) == content


@SLOWLY
@given(task=UNICODE | st.just(""), text=UNICODE, limit=st.integers(1, 60))
def test_truncation_takes_from_the_content_and_keeps_the_end(tokenizer, task, text, limit):
    encoder = PromptTokenizer(tokenizer, PromptSettings(begin="<s><s>", end="</s></s>"))
    triple = Triple(task, "", text)
    (whole,) = encoder.tokenize_queries([triple], 10**6)
    try:
        (tokens,) = encoder.tokenize_queries([triple], limit)
    except EmptyContent as empty:
        assert empty.no_room == {0: whole.content + 3}
        assert limit < whole.content + 3
        return
    assert tokens.content == whole.content < tokens.ids.size - 2
    assert tokens.ids.size == min(limit, whole.ids.size)
    assert tokens.ids[-2:].tolist() == [1, 1]
    assert np.array_equal(tokens.ids[:-2], whole.ids[: tokens.ids.size - 2])


def test_the_tokenizers_own_limit_and_state_do_not_matter(tokenizer, caplog):
    encoder = PromptTokenizer(tokenizer, PromptSettings())
    text = "The quick brown fox " * 20
    (before,) = encoder.tokenize_passages([Triple("", "", text)], 9999)
    tokenizer([text, "x"], truncation=True, padding=True)  # leaves both set
    (after,) = encoder.tokenize_passages([Triple("", "", text)], 9999)
    assert tokenizer.decode(before.ids.tolist()) == text
    assert np.array_equal(before.ids, after.ids)
    assert not caplog.records


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    encoder, letters = PromptTokenizer(tokenizer, WRAPPED), random.Random(0)
    triples = [Triple("", "", "x" + "".join(letters.choices("ab 我", k=k))) for k in range(30)]
    together = encoder.tokenize_passages(triples, 20)
    for triple, tokens in zip(triples, together, strict=True):
        (alone,) = encoder.tokenize_passages([triple], 20)
        assert np.array_equal(alone.ids, tokens.ids) and alone.content == tokens.content
    assert encoder.tokenize_passages([], 20) == []


def test_texts_without_content_are_told_apart(letter_tokenizer):
    prompt = PromptSettings(begin="<s>", query="a{instruction}a", end="</s>")
    triples = [Triple("b", "", text) for text in ("b", "?", "bbb")] + [Triple("bbb", "", "bb")]
    encoder = PromptTokenizer(letter_tokenizer, prompt)
    with pytest.raises(EmptyContent) as caught:
        encoder.tokenize_queries(triples, 6)
    assert caught.value.no_room == {3: 8}
    assert caught.value.no_tokens == [1]
    with pytest.raises(EmptyContent) as caught:
        encoder.tokenize_queries(triples, 3)  # shorter than the prompt
    assert caught.value.no_room == {0: 6, 2: 6, 3: 8}
    whole, cut = encoder.tokenize_queries([triples[0], triples[2]], 6)
    assert whole.ids.tolist() == cut.ids.tolist() == [0, 3, 4, 3, 4, 1]


@pytest.mark.parametrize(
    ("strings", "message"),
    [
        ({"begin": "<s> "}, "prompt.begin: '<s> ' is not made of the tokenizer's special tokens alone"),
        ({"begin": "[CLS]"}, "expected some of </s>, <pad>, <s>"),
        ({"end": "x"}, "prompt.end: 'x'"),
    ],
)
def test_begin_and_end_must_be_special_tokens(tokenizer, strings, message):
    with pytest.raises(UserError) as caught:
        PromptTokenizer(tokenizer, PromptSettings(**strings))
    assert message in str(caught.value)


def test_an_unknown_token_is_not_what_was_asked_for():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "<pad>": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="<pad>")
    with pytest.raises(UserError, match="prompt.begin"):
        PromptTokenizer(tokenizer, PromptSettings(begin="<s>"))


def test_the_tokenizer_needs_a_pad_token():
    backend = Tokenizer(models.WordLevel({"a": 0}))
    with pytest.raises(UserError, match="set pad_token in its tokenizer_config.json"):
        PromptTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend), PromptSettings())


def test_the_tokenizer_must_be_fast():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="needs a tokenizer.json"):
        PromptTokenizer(Slow(), PromptSettings())


def test_the_fingerprint_follows_what_the_ids_depend_on(make_tokenizer, tokenizer):
    def fingerprint(tokenizer, **prompt):
        return PromptTokenizer(tokenizer, PromptSettings(**prompt)).fingerprint

    base = fingerprint(tokenizer)
    tokenizer(["a", "b c"], truncation=True, padding=True)
    assert fingerprint(tokenizer) == fingerprint(make_tokenizer(400)) == base
    assert fingerprint(tokenizer, default_instruction="other") == base
    others = [
        fingerprint(make_tokenizer(390)),
        fingerprint(tokenizer, begin="<s>"),
        fingerprint(tokenizer, end="<s>"),
        fingerprint(tokenizer, query="{instruction} "),
        fingerprint(tokenizer, passage="<s>"),
        fingerprint(tokenizer, include_in_pooling=True),
    ]
    assert len({base, *others}) == 7
