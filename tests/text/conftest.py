"""Small tokenizers, built without files or network."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Instruction: Given a search query, retrieve passages that answer the question Query: ",
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A committee will meet in about four weeks to work on the next step.",
    "为什么喜欢我的人都是我的同桌呢",
]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    # model_max_length is small, so that a warning of long texts or a truncation to it would show.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=8
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[int], PreTrainedTokenizerFast]:
    """Byte-level BPE with a vocabulary of the given size; <s> is 0, </s> 1, <pad> 2."""

    def make(vocab_size: int) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(SENTENCES * 3, trainer)
        return wrapped(tokenizer)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(400)


@pytest.fixture(scope="session")
def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Knows the letters a (3) and b (4), and makes no token of anything else."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "a", "b"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    return wrapped(tokenizer)
