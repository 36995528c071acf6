"""Text -> token ids as sentence-transformers does it, for model folders that it describes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers

from codiemb_jax.config import Flag
from codiemb_jax.errors import UserError
from codiemb_jax.text.prompts import Tokens, tokenizing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class SentencePrompts(BaseModel):
    """What a sentence-transformers folder says about texts, in its own words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: dict[str, str] = {}
    default_prompt_name: str | None = None
    include_prompt: Flag = True
    """Whether pooling covers the prompt."""
    do_lower_case: Flag = False


class SentenceTokenizer:
    """Puts a prompt before each text; special tokens are those that tokenizer.json adds."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompts: SentencePrompts):
        self._settings = prompts
        self._special = set(tokenizer.all_special_ids)
        self._side = tokenizer.truncation_side
        self._tokenizer = tokenizer.backend_tokenizer
        if prompts.do_lower_case:
            others = [self._tokenizer.normalizer] if self._tokenizer.normalizer is not None else []
            self._tokenizer.normalizer = Normalizers([Lowercase(), *others])
        self.prompts = {"query": "", "document": ""} | prompts.prompts
        self.default_prompt_name = prompts.default_prompt_name

    def tokenize(self, texts: Sequence[str], prompt: str, max_tokens: int) -> list[Tokens]:
        """Tokens of each text after `prompt`, at most `max_tokens` each, special tokens included.

        The number of prompt tokens is that of the prompt alone, as sentence-transformers counts it.
        """
        special = self._tokenizer.num_special_tokens_to_add(False)
        if max_tokens <= special:
            raise UserError(f"a longest text of {max_tokens} tokens leaves no room beside {special} special tokens")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens, direction=self._side)
        head = 0
        if prompt and not self._settings.include_prompt:
            with tokenizing():
                ids = self._tokenizer.encode(prompt).ids
            head = len(ids) - (bool(ids) and ids[-1] in self._special)
        with tokenizing():
            encoded = self._tokenizer.encode_batch([prompt + text for text in texts])
            tokens = [Tokens(np.array(text.ids, np.int32), head) for text in encoded]
        if any(text.ids.size > max_tokens for text in tokens):
            raise UserError(f"tokenizer.json cannot be used: it makes more than the {max_tokens} tokens allowed")
        return tokens
