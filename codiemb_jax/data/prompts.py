"""Texts + instruction -> token ids + where the content starts."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from codiemb_jax.config import PromptSettings
from codiemb_jax.data.records import Triple
from codiemb_jax.errors import UserError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTANCE_CHARACTERS = 512
"""How much of an instance instruction is read."""


class Tokens(NamedTuple):
    """A text as the model sees it: begin, prompt, content, end."""

    ids: np.ndarray
    """int32 [tokens]"""
    content: int
    """Index of the first content token; the content is `ids[content:]`, the end tokens included."""


class EmptyContent(UserError):
    """Texts of which no content token would be left: their pooled vector would be 0/0.

    Both fields name texts by their place in the call.
    """

    def __init__(self, no_room: dict[int, int], no_tokens: list[int]):
        self.no_room = no_room
        """The prompt alone fills the limit: text -> the least limit that leaves one content token."""
        self.no_tokens = no_tokens
        """The tokenizer makes no token of the text."""
        problems = [f"text {i}: its prompt leaves no room below {n} tokens" for i, n in no_room.items()]
        problems += [f"text {i}: the tokenizer makes no token of it" for i in no_tokens]
        super().__init__(f"texts without a content token:\n{listed(problems)}")


class PromptEncoder:
    """Turns triples into token ids with one tokenizer and one prompt."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt: PromptSettings):
        """
        Raises:
          UserError: the tokenizer is slow or has no pad token; `prompt.begin` or `prompt.end` is not made of
            its special tokens.
        """
        if not tokenizer.is_fast:
            raise UserError("the tokenizer knows no character offsets; the model needs a tokenizer.json")
        if tokenizer.pad_token_id is None:
            raise UserError("the tokenizer has no pad token; set pad_token in its tokenizer_config.json")
        self._prompt = prompt
        # The tokenizer inside, for it is three times as fast and never warns of long texts.
        self._tokenizer = tokenizer.backend_tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special_ids("begin", prompt.begin, special)
        self._end = self._special_ids("end", prompt.end, special)
        # Left out: the default instruction, which is written into a text by whoever makes its triple.
        strings = [prompt.begin, prompt.query, prompt.passage, prompt.end]
        content = self._tokenizer.to_str() + json.dumps(strings)
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that the ids depend on: tokenizer and prompt."""
        return self._fingerprint

    def encode_queries(self, triples: Sequence[Triple], max_tokens: int) -> list[Tokens]:
        """Tokens of queries and of both texts of STS pairs; at most `max_tokens` each, the end tokens kept.

        Raises:
          EmptyContent: texts of which no content token would be left.
        """
        prompts = [self._prompt.query.replace("{instruction}", t.task) if t.task else "" for t in triples]
        return self._encode(prompts, triples, max_tokens)

    def encode_passages(self, triples: Sequence[Triple], max_tokens: int) -> list[Tokens]:
        """Tokens of IR passages, likewise; their task instructions are not read."""
        return self._encode([self._prompt.passage] * len(triples), triples, max_tokens)

    def _encode(self, prompts: Sequence[str], triples: Sequence[Triple], max_tokens: int) -> list[Tokens]:
        heads = [self._prompt.begin + prompt for prompt in prompts]
        contents = [triple.instance[:INSTANCE_CHARACTERS] + triple.text for triple in triples]
        texts = [head + content + self._prompt.end for head, content in zip(heads, contents, strict=True)]
        encoded, no_room, no_tokens = [], {}, []
        # The last tokens are those of the end string: special tokens never merge with what precedes them.
        ends = len(self._end)
        for place, (head, (ids, offsets)) in enumerate(zip(heads, self._tokenize(texts), strict=True)):
            first = _first_beyond(offsets, len(head))
            if first >= len(ids) - ends:
                no_tokens.append(place)
            elif len(ids) > max_tokens and first >= max_tokens - ends:
                no_room[place] = first + 1 + ends
            if len(ids) > max_tokens:
                ids = ids[: max_tokens - ends] + self._end
            encoded.append(Tokens(np.array(ids, np.int32), first))
        if no_room or no_tokens:
            raise EmptyContent(no_room, no_tokens)
        return encoded

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        # Both are state of the tokenizer, set by tokenizer.json or by whoever called it last.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        return [(e.ids, e.offsets) for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _special_ids(self, field: str, literal: str, special: set[str]) -> list[int]:
        ids = self._tokenize([literal])[0][0]
        tokens = [self._tokenizer.id_to_token(i) or "" for i in ids]
        # The second condition: an unknown token is special, too, but stands for other characters.
        if not special.issuperset(tokens) or "".join(tokens) != literal:
            raise UserError(
                f"prompt.{field}: {literal!r} is not made of the tokenizer's special tokens alone, "
                f"expected some of {', '.join(sorted(special)[:20])}"
            )
        return ids


def _first_beyond(offsets: Sequence[tuple[int, int]], characters: int) -> int:
    """Index of the first token that ends beyond the first `characters`; the number of tokens if none does."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > characters), len(offsets))
    if any(end <= characters for _, end in offsets[first:]):
        raise UserError(
            "the tokenizer's character offsets do not rise from token to token, so the prompt cannot be told "
            "from the text; use another tokenizer.json"
        )
    return first
