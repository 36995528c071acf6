"""Inputs of benchmarks: a model with random weights, and texts with lengths like those of retrieval data."""

import json
from pathlib import Path

import numpy as np

import codiemb_jax

QUICKSTART = Path(codiemb_jax.__file__).parent / "quickstart"


def write_model(folder: Path) -> None:
    """Writes a decoder with 45 M parameters, random weights and the tokenizer of the quickstart."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=10,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quickstart_words() -> np.ndarray:
    """Returns the words of the encyclopedia passages of the quickstart."""
    lines = (QUICKSTART / "data" / "train" / "ir" / "encyclopedia.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array(" ".join(positive[2] for line in lines for positive in json.loads(line)["positives"]).split())


def random_texts(random: np.random.Generator, model: Path, lengths: np.ndarray) -> list[str]:
    """Returns texts of about `lengths` tokens, whose words come from the texts of the quickstart."""
    from transformers import AutoTokenizer

    words = quickstart_words()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens_per_word = len(tokenizer(" ".join(words), verbose=False)["input_ids"]) / len(words)
    return [" ".join(random.choice(words, max(2, round(length / tokens_per_word)))) for length in lengths.tolist()]


def query_lengths(random: np.random.Generator, shape: tuple[int, ...], max_tokens: int) -> np.ndarray:
    """Returns random lengths of queries, about 40 tokens."""
    return _lengths(random, shape, 40, 0.5, max_tokens)


def passage_lengths(random: np.random.Generator, shape: tuple[int, ...], max_tokens: int) -> np.ndarray:
    """Returns random lengths of passages such as news stories: 250 tokens on average, and at most 1,000."""
    return _lengths(random, shape, 250, 0.8, max_tokens)


def _lengths(
    random: np.random.Generator, shape: tuple[int, ...], mean: float, sigma: float, max_tokens: int
) -> np.ndarray:
    from codiemb_jax.training.preflight import text_lengths  # imports JAX

    return text_lengths(random, shape, mean, sigma, min(max_tokens, 1000))
