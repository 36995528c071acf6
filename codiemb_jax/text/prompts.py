"""Tokenizes texts with their instructions and finds where the content starts."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from codiemb_jax.config import PromptSettings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.text.records import Triple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_INSTANCE_CHARACTERS = 512
"""Instance instructions are truncated to this length."""


TEXTS_PER_CALL = 1000
"""The tokenizers library needs about 100 bytes per token of all texts of a call."""


def split_list(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yields consecutive parts of a list for calls of the tokenizers library."""
    for start in range(0, len(texts), TEXTS_PER_CALL):
        yield texts[start : start + TEXTS_PER_CALL]


class Tokens(NamedTuple):
    """A tokenized text: begin, prompt, content, end."""

    ids: np.ndarray
    """int32 [tokens]"""
    content_start: int
    """Index of the first pooled token. Mean pooling covers `ids[content_start:]`, including the end tokens."""


@contextmanager
def tokenizer_errors(files: str = "tokenizer.json") -> Iterator[None]:
    """Raises `UserError` if the tokenizers library fails in this block, which means that `files` are invalid."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise UserError(f"invalid {files}: {shorten(str(error), 200)}") from error


class EmptyContentError(UserError):
    """Texts without any content token, whose pooled vector would be 0/0.

    Texts are identified by their index in the call.
    """

    def __init__(self, min_limits: dict[int, int], no_tokens: list[int]):
        self.min_limits = min_limits
        """For each text whose prompt alone fills the limit, the smallest limit that leaves one content token."""
        self.no_tokens = no_tokens
        """Texts for which the tokenizer produces no tokens."""
        problems = [f"text {i}: the prompt leaves no room for the text below {n} tokens" for i, n in min_limits.items()]
        problems += [f"text {i}: the tokenizer produces no tokens" for i in no_tokens]
        super().__init__(f"texts without a content token:\n{format_problems(problems)}")

    def problems_at(self, locations: Sequence[str], setting: str) -> list[str]:
        """Returns one message per text.

        Args:
          locations: The location (file, line and field) of each text in the call.
          setting: Name of the setting of the limit.
        """
        return [
            f"{locations[i]}: the prompt leaves no room for the text, expected {setting} >= {limit}"
            for i, limit in self.min_limits.items()
        ] + [
            f"{locations[i]}: the tokenizer produces no tokens, expected a text in its vocabulary"
            for i in self.no_tokens
        ]


class PromptTokenizer:
    """Tokenizes triples with the given tokenizer and prompt settings."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt: PromptSettings):
        """Checks the tokenizer and the prompt settings.

        Raises:
          UserError: If the tokenizer is slow or has no pad token, or if `prompt.begin` or `prompt.end` contains
            anything but its special tokens.
        """
        if not tokenizer.is_fast:
            raise UserError("the tokenizer does not provide character offsets; the model needs a tokenizer.json")
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no pad token; set pad_token in its tokenizer_config.json")
        self._prompt = prompt
        # The backend tokenizer is three times as fast and never warns about long texts.
        self._tokenizer = tokenizer.backend_tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._begin = self._special_ids("begin", prompt.begin, special)
        self._end = self._special_ids("end", prompt.end, special)
        # The default instruction is left out because texts get their instruction only from their triple.
        strings = [prompt.begin, prompt.query, prompt.passage, prompt.end]
        content = self._tokenizer.to_str() + json.dumps([*strings, prompt.include_in_pooling])
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hex digest of the tokenizer and the prompt settings, on which all token ids depend."""
        return self._fingerprint

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts under their sentence-transformers names."""
        return prompt_texts(self._prompt)

    default_prompt_name: str | None = None
    takes_instructions = True

    def query_prompt(self, instruction: str) -> str:
        """Returns the prompt of queries with this task instruction; without an instruction, only `begin`."""
        return query_prompt(self._prompt, instruction)

    def tokenize(self, texts: Sequence[str], prompt: str, max_tokens: int) -> list[Tokens]:
        """Tokenizes each text after `prompt`, which includes `begin`.

        Texts are truncated to `max_tokens`, including prompt and end tokens. The end tokens are always kept.

        Raises:
          EmptyContentError: If texts would have no content token.
        """
        contents = [Triple.stripped("", "", text).text for text in texts]
        return self._tokenize_after([prompt] * len(texts), contents, max_tokens)

    def tokenize_queries(self, triples: Sequence[Triple], max_tokens: int) -> list[Tokens]:
        """Tokenizes queries, or either text of STS pairs. See `tokenize` for truncation.

        Raises:
          EmptyContentError: If texts would have no content token.
        """
        prompts = [self.query_prompt(triple.task) for triple in triples]
        return self._tokenize_after(prompts, _contents(triples), max_tokens)

    def tokenize_passages(self, triples: Sequence[Triple], max_tokens: int) -> list[Tokens]:
        """Tokenizes IR passages, whose task instructions are ignored. See `tokenize` for truncation.

        Raises:
          EmptyContentError: If texts would have no content token.
        """
        prompts = [self._prompt.begin + self._prompt.passage] * len(triples)
        return self._tokenize_after(prompts, _contents(triples), max_tokens)

    def _tokenize_after(self, prompts: Sequence[str], contents: Sequence[str], max_tokens: int) -> list[Tokens]:
        texts = [prompt + content + self._prompt.end for prompt, content in zip(prompts, contents, strict=True)]
        tokenized, min_limits, no_tokens = [], {}, []
        # Special tokens never merge with other text, so the first and last tokens are exactly those of begin and end.
        num_end = len(self._end)
        if all(prompt == self._prompt.begin for prompt in prompts):
            tokens = ((ids, len(self._begin)) for ids in self._tokenize_ids(texts))
        else:
            tokens = (
                (ids, _content_start(offsets, len(prompt)))
                for prompt, (ids, offsets) in zip(prompts, self._tokenize(texts), strict=True)
            )
        for i, (ids, start) in enumerate(tokens):
            if start >= len(ids) - num_end:
                no_tokens.append(i)
            elif len(ids) > max_tokens and start >= max_tokens - num_end:
                min_limits[i] = start + 1 + num_end
            if len(ids) > max_tokens:
                ids = ids[: max_tokens - num_end] + self._end
            tokenized.append(Tokens(np.array(ids, np.int32), 0 if self._prompt.include_in_pooling else start))
        if min_limits or no_tokens:
            raise EmptyContentError(min_limits, no_tokens)
        return tokenized

    def _tokenize(self, texts: list[str]) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
        """Yields the token ids and character offsets of each text."""
        with self._untruncated() as tokenizer:
            for part in split_list(texts):
                for encoding in tokenizer.encode_batch(part, add_special_tokens=False):
                    yield encoding.ids, encoding.offsets

    def _tokenize_ids(self, texts: list[str]) -> Iterator[list[int]]:
        """Yields only the token ids of each text, which is one and a half times as fast."""
        with self._untruncated() as tokenizer:
            for part in split_list(texts):
                for encoding in tokenizer.encode_batch_fast(part, add_special_tokens=False):
                    yield encoding.ids

    @contextmanager
    def _untruncated(self) -> Iterator[Tokenizer]:
        # Truncation and padding are state of the tokenizer, set by tokenizer.json or by its last caller.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        with tokenizer_errors():
            yield self._tokenizer

    def _special_ids(self, field: str, literal: str, special: set[str]) -> list[int]:
        (ids,) = self._tokenize_ids([literal])
        tokens = [self._tokenizer.id_to_token(i) or "" for i in ids]
        # Comparing the strings rules out the unknown token, which is special but replaces other characters.
        if not special.issuperset(tokens) or "".join(tokens) != literal:
            raise UserError(
                f"prompt.{field}: {literal!r} does not consist of special tokens of the tokenizer, "
                f"expected tokens among {', '.join(sorted(special)[:20])}"
            )
        return ids


def tokenize_groups(
    tokenize: Callable[[str, Sequence[str]], list[Tokens]], texts: Sequence[str], prompts: Sequence[str]
) -> list[Tokens]:
    """Tokenizes each text after its own prompt, with a call for each different prompt.

    Args:
      tokenize: Tokenizes texts after a prompt.
      texts: The texts.
      prompts: The prompt of each.

    Raises:
      EmptyContentError: If texts would have no content token.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    tokens: dict[int, Tokens] = {}
    min_limits: dict[int, int] = {}
    no_tokens: list[int] = []
    for prompt, indices in by_prompt.items():
        try:
            tokens |= zip(indices, tokenize(prompt, [texts[i] for i in indices]), strict=True)
        except EmptyContentError as error:
            min_limits |= {indices[i]: limit for i, limit in error.min_limits.items()}
            no_tokens += [indices[i] for i in error.no_tokens]
    if min_limits or no_tokens:
        raise EmptyContentError(min_limits, no_tokens)
    return [tokens[i] for i in range(len(texts))]


def prompt_texts(prompt: PromptSettings) -> dict[str, str]:
    """Returns the prompts under their sentence-transformers names, without `end`, which the exported tokenizer adds."""
    return {"query": query_prompt(prompt, prompt.default_instruction), "document": prompt.begin + prompt.passage}


def query_prompt(prompt: PromptSettings, instruction: str) -> str:
    """Returns the prompt of queries with this task instruction; without an instruction, only `begin`."""
    return prompt.begin + (prompt.query.replace("{instruction}", instruction) if instruction else "")


def _contents(triples: Sequence[Triple]) -> list[str]:
    return [triple.instance[:MAX_INSTANCE_CHARACTERS] + triple.text for triple in triples]


def _content_start(offsets: Sequence[tuple[int, int]], prompt_length: int) -> int:
    """Returns the index of the first token that ends after the prompt; the number of tokens if there is none."""
    start = next((i for i, (_, end) in enumerate(offsets) if end > prompt_length), len(offsets))
    if any(end <= prompt_length for _, end in offsets[start:]):
        raise UserError(
            "character offsets of the tokenizer are not in increasing order, so the prompt cannot be separated from "
            "the text; use another tokenizer.json"
        )
    return start
