"""Text and instruction -> token ids, and where the content starts."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from codiemb_jax.config import PromptSettings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.text.records import Triple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTANCE_CHARACTERS = 512
"""How much of an instance instruction is read."""


class Tokens(NamedTuple):
    """A text as the model sees it: begin, prompt, content, end."""

    ids: np.ndarray
    """int32 [tokens]"""
    content: int
    """Index of the first pooled token: `ids[content:]`, the end tokens included, is what a mean covers."""


@contextmanager
def tokenizing() -> Iterator[None]:
    """UserError if the tokenizers library fails, which is a matter of tokenizer.json."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # plain Exception, or a panic, which is not even that
        raise UserError(f"tokenizer.json cannot be used: {shorten(str(error), 200)}") from error


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
        super().__init__(f"texts without a content token:\n{format_problems(problems)}")

    def at(self, places: Sequence[str], setting: str) -> list[str]:
        """The problems, each text called by its place (file, line and field); `setting` is that of the limit."""
        return [
            f"{places[i]}: the prompt leaves the text no room, expected {setting} >= {least}"
            for i, least in self.no_room.items()
        ] + [f"{places[i]}: the tokenizer makes no token of the text, expected a text it knows" for i in self.no_tokens]


class PromptTokenizer:
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
        # The backend tokenizer: it is three times as fast and never warns of long texts.
        self._tokenizer = tokenizer.backend_tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special_ids("begin", prompt.begin, special)
        self._end = self._special_ids("end", prompt.end, special)
        # The default instruction is left out: it reaches a text only through its triple.
        strings = [prompt.begin, prompt.query, prompt.passage, prompt.end]
        content = self._tokenizer.to_str() + json.dumps([*strings, prompt.include_in_pooling])
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that the ids depend on: tokenizer and prompt."""
        return self._fingerprint

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts by sentence-transformers' names."""
        return prompt_texts(self._prompt)

    default_prompt_name: str | None = None

    def query_prompt(self, instruction: str) -> str:
        """What stands before a query with this task instruction; without one, as in training, no prompt."""
        return _query_prompt(self._prompt, instruction)

    def tokenize(self, texts: Sequence[str], prompt: str, max_tokens: int) -> list[Tokens]:
        """Tokens of each text after `prompt` (`begin` included), at most `max_tokens` each, the end tokens kept.

        Raises:
          EmptyContent: texts of which no content token would be left.
        """
        return self._tokenize_after([prompt] * len(texts), [Triple.of("", "", text).text for text in texts], max_tokens)

    def tokenize_queries(self, triples: Sequence[Triple], max_tokens: int) -> list[Tokens]:
        """Tokens of queries and of both texts of STS pairs; at most `max_tokens` each, the end tokens kept.

        Raises:
          EmptyContent: texts of which no content token would be left.
        """
        heads = [self.query_prompt(triple.task) for triple in triples]
        return self._tokenize_after(heads, _contents(triples), max_tokens)

    def tokenize_passages(self, triples: Sequence[Triple], max_tokens: int) -> list[Tokens]:
        """Tokens of IR passages, likewise; their task instructions are not read."""
        heads = [self._prompt.begin + self._prompt.passage] * len(triples)
        return self._tokenize_after(heads, _contents(triples), max_tokens)

    def _tokenize_after(self, heads: Sequence[str], contents: Sequence[str], max_tokens: int) -> list[Tokens]:
        texts = [head + content + self._prompt.end for head, content in zip(heads, contents, strict=True)]
        tokenized, no_room, no_tokens = [], {}, []
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
            tokenized.append(Tokens(np.array(ids, np.int32), 0 if self._prompt.include_in_pooling else first))
        if no_room or no_tokens:
            raise EmptyContent(no_room, no_tokens)
        return tokenized

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        # Both are state of the tokenizer, set by tokenizer.json or by whoever called it last.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        with tokenizing():
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


def prompt_texts(prompt: PromptSettings) -> dict[str, str]:
    """The prompts by sentence-transformers' names; the end token comes from the tokenizer."""
    return {"query": _query_prompt(prompt, prompt.default_instruction), "document": prompt.begin + prompt.passage}


def _query_prompt(prompt: PromptSettings, instruction: str) -> str:
    return prompt.begin + (prompt.query.replace("{instruction}", instruction) if instruction else "")


def _contents(triples: Sequence[Triple]) -> list[str]:
    return [triple.instance[:INSTANCE_CHARACTERS] + triple.text for triple in triples]


def _first_beyond(offsets: Sequence[tuple[int, int]], characters: int) -> int:
    """Index of the first token that ends beyond the first `characters`; the number of tokens if none does."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > characters), len(offsets))
    if any(end <= characters for _, end in offsets[first:]):
        raise UserError(
            "the tokenizer's character offsets do not rise from token to token, so the prompt cannot be told "
            "from the text; use another tokenizer.json"
        )
    return first
