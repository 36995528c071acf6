"""Tokenizes texts as sentence-transformers does, for model folders with its config files."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

from codiemb_jax.config import Flag
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import EmptyContentError, Tokens, split_list, tokenizer_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class SentencePrompts(BaseModel):
    """Text settings of a sentence-transformers folder, with the names used there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None
    include_prompt: Flag = True
    """Whether pooling includes the prompt."""
    do_lower_case: Flag = False
    query_template: str | None = None
    """Query prompt with the placeholder {instruction}, without `begin`. sentence-transformers ignores it. None if the
    folder is not an export of this project."""
    begin: str = ""
    """Special tokens before every text, which `prompts` include; the prompt of queries without an instruction."""

    @field_validator("query_template")
    @classmethod
    def _check_placeholder(cls, template: str | None) -> str | None:
        if template and template.count("{instruction}") != 1:
            raise ValueError("must contain the placeholder {instruction} exactly once")
        return template


class SentenceTokenizer:
    """Tokenizes texts after a prompt, with the special tokens that tokenizer.json adds."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompts: SentencePrompts):
        self._settings = prompts
        self._special = set(tokenizer.all_special_ids)
        self._side = tokenizer.truncation_side
        self._tokenizer = tokenizer.backend_tokenizer
        if prompts.do_lower_case:
            normalizers = [self._tokenizer.normalizer] if self._tokenizer.normalizer is not None else []
            self._tokenizer.normalizer = Normalizers([Lowercase(), *normalizers])
        self.prompts = {"query": "", "document": ""} | prompts.prompts
        self.default_prompt_name = prompts.default_prompt_name

    @property
    def takes_instructions(self) -> bool:
        """Whether the prompt of queries has a placeholder for an instruction."""
        return self._settings.query_template is not None

    def query_prompt(self, instruction: str) -> str:
        """Returns the prompt of queries with this task instruction; without an instruction, only `begin`.

        Raises:
          UserError: If the model's prompts take no instruction.
        """
        if self._settings.query_template is None:
            raise UserError("this model's prompts have no placeholder for an instruction; give the whole prompt")
        template = self._settings.query_template if instruction else ""
        return self._settings.begin + template.replace("{instruction}", instruction)

    def tokenize(self, texts: Sequence[str], prompt: str, max_tokens: int) -> list[Tokens]:
        """Tokenizes each text after `prompt` into at most `max_tokens` tokens, including special tokens.

        The number of prompt tokens is counted by tokenizing the prompt alone, as in sentence-transformers.

        Raises:
          EmptyContentError: If texts have no tokens.
          UserError: If `max_tokens` leaves no room for a text, or tokenizer.json is invalid.
        """
        special = self._tokenizer.num_special_tokens_to_add(False)
        if max_tokens <= special:
            raise UserError(
                f"a maximum of {max_tokens} tokens per text leaves no room next to {special} special tokens"
            )
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens, direction=self._side)
        prompt_tokens = 0
        if prompt and not self._settings.include_prompt:
            with tokenizer_errors():
                ids = self._tokenizer.encode(prompt).ids
            prompt_tokens = len(ids) - (bool(ids) and ids[-1] in self._special)
        with tokenizer_errors():
            tokens = [
                Tokens(np.array(encoding.ids, np.int32), prompt_tokens)
                for part in split_list(texts)
                for encoding in self._tokenizer.encode_batch_fast([prompt + text for text in part])
            ]
        empty = [i for i, text in enumerate(tokens) if not text.ids.size]
        if empty:
            raise EmptyContentError({}, empty)
        if any(text.ids.size > max_tokens for text in tokens):
            raise UserError(f"invalid tokenizer.json: the tokenizer produces more than the {max_tokens} tokens allowed")
        return tokens
