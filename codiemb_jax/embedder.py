"""Texts -> vectors."""

from collections.abc import Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.blueprint import Blueprint
from codiemb_jax.checkpoints.model import locate, open_as_stored, open_folder
from codiemb_jax.config import MeshSettings
from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import is_unicode
from codiemb_jax.models.embed import embed
from codiemb_jax.models.pooling import unit
from codiemb_jax.sharding import make_mesh, replicated, row_sharding, row_shards
from codiemb_jax.text.prompts import PromptTokenizer, Tokens
from codiemb_jax.text.rows import pad, padded_length
from codiemb_jax.text.sentence import SentencePrompts, SentenceTokenizer

AS_SENTENCE_TRANSFORMERS = {"pooling": "mean", "normalize": False}
"""How sentence-transformers encodes with a folder that holds a transformer alone."""


class TextTokenizer(Protocol):
    """Makes tokens of texts, each after a prompt."""

    @property
    def prompts(self) -> dict[str, str]: ...

    @property
    def default_prompt_name(self) -> str | None: ...

    def tokenize(self, texts: Sequence[str], prompt: str, max_tokens: int) -> list[Tokens]: ...


class Embedder:
    """Encodes texts on all devices, with the prompts, pooling and lengths that the model's folder names.

        model = Embedder.from_pretrained("runs/mine/export")
        queries = model.encode_query(["how do I reset my password"])
        documents = model.encode_document(["Choose Forgot password on the sign-in page."])
        model.similarity(queries, documents)

    Names and arguments are those of sentence-transformers' `SentenceTransformer`.
    """

    def __init__(self, graph: Any, params: Any, blueprint: Blueprint, mesh: jax.sharding.Mesh):
        """`params` are those of the model with this graph and blueprint, placed on the mesh; see `from_pretrained`."""
        self._params, self._mesh = params, mesh
        self._max_tokens = blueprint.max_tokens
        self._tokenizer = text_tokenizer(blueprint)
        normalize = blueprint.encoding["normalize"]

        def vectors(params: Any, rows: TokenRows) -> jax.Array:
            found = embed(nnx.merge(graph, params), rows)
            return unit(found) if normalize else found

        self._embed = jax.jit(vectors, out_shardings=replicated(mesh))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        mesh: MeshSettings | None = None,
    ) -> "Embedder":
        """Loads a Hugging Face folder, a hub id, an Orbax checkpoint of this project, or the export in a run's folder.

        A Hugging Face folder is read as sentence-transformers reads it.  A checkpoint encodes as in training, which
        tells prompt from text by characters.

        Args:
          dtype: of weights and computation.
          mesh: how devices are used; by default each has all weights and its share of the texts.

        Raises:
          UserError: the folder cannot be used.
        """
        folder = open_folder(locate(str(path)))
        devices = make_mesh(mesh or MeshSettings())
        otherwise = {} if folder.text else AS_SENTENCE_TRANSFORMERS
        if folder.text is None and folder.family.causal:
            otherwise = {**otherwise, "attention": "causal"}
        model = open_as_stored(folder, devices, SentencePrompts(), compute_dtype=dtype, param_dtype=dtype, **otherwise)
        text = model.blueprint.sentence
        if text and not text.include_prompt and model.blueprint.encoding["pooling"] in ("cls", "weighted_mean"):
            raise UserError(
                f"{path}: pooling {model.blueprint.encoding['pooling']} without the prompt (include_prompt: false) is "
                "not supported; supported is the mean"
            )
        with jax.set_mesh(devices):
            return cls(model.graph, model.load(), model.blueprint, devices)

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens; what exceeds it is cut off."""
        return self._max_tokens

    def with_params(self, params: Any) -> "Embedder":
        """The same model with these parameters; nothing is compiled again."""
        other = copy(self)
        other._params = params
        return other

    @property
    def prompts(self) -> dict[str, str]:
        """The model's prompts by name."""
        return self._tokenizer.prompts

    @property
    def tokenizer(self) -> TextTokenizer:
        return self._tokenizer

    def encode_query(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        *,
        instruction: str | None = None,
    ) -> np.ndarray:
        """Vectors of queries, float32 [texts, dim]; of a single text, [dim].

        Args:
          prompt_name, prompt: as for `encode`; by default the model's query prompt.
          instruction: task instruction to put into the query prompt of a checkpoint.
        """
        if instruction is not None:
            if prompt is not None or prompt_name is not None:
                raise UserError("give an instruction, or a prompt, not both")
            if not isinstance(self._tokenizer, PromptTokenizer):
                raise UserError("this model's prompts have no place for an instruction; give the prompt itself")
            prompt = self._tokenizer.query_prompt(instruction)
        if prompt is None and prompt_name is None and "query" in self.prompts:
            prompt_name = "query"
        return self.encode(inputs, prompt_name, prompt, batch_size, show_progress_bar)

    def encode_document(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Vectors of documents, float32 [texts, dim]; of a single text, [dim]."""
        if prompt is None and prompt_name is None:
            prompt_name = next((name for name in ("document", "passage", "corpus") if name in self.prompts), None)
        return self.encode(inputs, prompt_name, prompt, batch_size, show_progress_bar)

    def encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Vectors of texts, float32 [texts, dim]; of a single text, [dim].

        Args:
          prompt_name: which of `prompts` to put before each text; None: the model's default, if it has one.
          prompt: what to put before each text instead.
          batch_size: texts encoded at once, rounded up to a multiple of the devices.
          show_progress_bar: None: if stderr is a terminal and there is more than one batch.

        Raises:
          UserError: there is no such prompt, or (with a checkpoint) a text of which no token is left.
        """
        if not isinstance(inputs, str | Sequence):
            raise UserError(f"expected a text or a list of texts, found {type(inputs).__name__}")
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        for text in (*texts, *(part for part in (prompt, prompt_name) if part is not None)):
            if not isinstance(text, str):
                raise UserError(f"expected texts, found {type(text).__name__}")
            if not is_unicode(text):
                raise UserError(f"{shorten(ascii(text))} is not valid Unicode")
        if prompt is None:
            name = prompt_name if prompt_name is not None else self._tokenizer.default_prompt_name
            if name is not None and name not in self.prompts:
                raise UserError(f"there is no prompt {name!r}; prompts are {', '.join(self.prompts)}")
            prompt = "" if name is None else self.prompts[name]
        tokens = self._tokenizer.tokenize(texts, prompt, self.max_seq_length)
        vectors = self.embed_tokens(tokens, batch_size, show_progress_bar)
        return vectors[0] if isinstance(inputs, str) else vectors

    def embed_tokens(
        self, texts: Sequence[Tokens], batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> np.ndarray:
        """Vectors of tokenized texts, float32 [texts, dim]."""
        if type(batch_size) is not int or batch_size < 1:
            raise UserError(f"batch_size: expected a whole number of at least 1, found {batch_size!r}")
        shards = row_shards(self._mesh)
        count = -(-batch_size // shards) * shards
        order = sorted(range(len(texts)), key=lambda i: texts[i].ids.size)  # neighbours share a row length
        vectors: list[np.ndarray] = [np.empty(0, np.float32)] * len(texts)
        starts = range(0, len(order), count)
        console = Console(stderr=True)
        shown = console.is_terminal and len(starts) > 1 if show_progress_bar is None else show_progress_bar
        for start in track(starts, "encoding", console=console, disable=not shown, transient=True):
            chosen = order[start : start + count]
            length = padded_length(texts[chosen[-1]].ids.size, self.max_seq_length)
            # The last batch is filled up with empty rows, so that it has the shape of the others.
            rows = pad([texts[i] for i in chosen] + [None] * (count - len(chosen)), length)
            with jax.set_mesh(self._mesh):
                place = partial(jax.device_put, device=row_sharding(self._mesh))
                batch = np.asarray(self._embed(self._params, jax.tree.map(place, rows)))
            for i, vector in zip(chosen, batch, strict=False):
                vectors[i] = vector
        return np.stack(vectors) if vectors else np.empty((0, self.get_embedding_dimension()), np.float32)

    def get_embedding_dimension(self) -> int:
        """Number of dimensions of a vector."""
        table = self._params["projection"]["kernel"] if "projection" in self._params else self._params["embedding"]
        return table.shape[-1]

    @staticmethod
    def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Cosine of each vector of one array with each of the other, float32 [one, other]."""
        one, other = np.atleast_2d(one), np.atleast_2d(other)
        directions = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (one, other)]
        return directions[0] @ directions[1].T


def text_tokenizer(blueprint: Blueprint) -> PromptTokenizer | SentenceTokenizer:
    """Makes tokens of texts as a model's blueprint says."""
    if blueprint.prompt is not None:
        return PromptTokenizer(blueprint.tokenizer(), blueprint.prompt)
    assert blueprint.sentence is not None
    return SentenceTokenizer(blueprint.tokenizer(), blueprint.sentence)
