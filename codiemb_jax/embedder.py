"""Encodes texts with a trained or published model."""

from collections.abc import Sequence
from copy import copy
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from rich.progress import track

from codiemb_jax.batch import TokenRows
from codiemb_jax.checkpoints.blueprint import Blueprint
from codiemb_jax.checkpoints.model import open_folder, open_with_stored_settings, resolve_model_path
from codiemb_jax.config import MeshSettings
from codiemb_jax.distributed import log_console
from codiemb_jax.errors import UserError, shorten
from codiemb_jax.files import is_unicode
from codiemb_jax.models.attention import ROW_MULTIPLES
from codiemb_jax.models.embed import embed
from codiemb_jax.models.pooling import l2_normalize
from codiemb_jax.sharding import compiler_options, make_mesh, replicated, row_shards, split_rows
from codiemb_jax.text.batches import plan_batches
from codiemb_jax.text.prompts import EmptyContentError, PromptTokenizer, Tokens
from codiemb_jax.text.rows import Texts, lay_out
from codiemb_jax.text.sentence import SentencePrompts, SentenceTokenizer

PLAIN_TRANSFORMER_SETTINGS = {"pooling": "mean", "normalize": False}
"""Defaults of sentence-transformers for a folder that contains only a transformer."""


class TextTokenizer(Protocol):
    """Tokenizes texts with a prompt."""

    @property
    def prompts(self) -> dict[str, str]: ...

    @property
    def default_prompt_name(self) -> str | None: ...

    @property
    def takes_instructions(self) -> bool: ...

    def query_prompt(self, instruction: str) -> str: ...

    def tokenize(self, texts: Sequence[str], prompt: str, max_tokens: int) -> list[Tokens]: ...


class Embedder:
    """Encodes texts on all devices, with the prompts, pooling and maximum length stored with the model.

        model = Embedder.from_pretrained("runs/mine/export")
        queries = model.encode_query(["how do I reset my password"])
        documents = model.encode_document(["Choose Forgot password on the sign-in page."])
        model.similarity(queries, documents)

    Methods and arguments follow `SentenceTransformer` of sentence-transformers.
    """

    def __init__(self, graph: Any, params: Any, blueprint: Blueprint, mesh: jax.sharding.Mesh):
        """Creates an embedder from an open model. Use `from_pretrained` to load one.

        Args:
          graph: NNX graph definition of the model.
          params: Parameters on the mesh; None if `with_params` sets them later.
          blueprint: Blueprint of the model.
          mesh: The device mesh.
        """
        self._params, self._mesh = params, mesh
        self._max_tokens = blueprint.max_tokens
        self._tokenizer = make_tokenizer(blueprint)
        normalize = blueprint.encoding["normalize"]

        def embed_rows(params: Any, rows: TokenRows, slots: int) -> jax.Array:
            embeddings = embed(nnx.merge(graph, params), rows, slots)
            return l2_normalize(embeddings) if normalize else embeddings

        self._embed = jax.jit(
            embed_rows,
            out_shardings=replicated(mesh),
            static_argnums=2,
            compiler_options=compiler_options(mesh),
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        mesh: MeshSettings | None = None,
    ) -> "Embedder":
        """Loads a model.

        A Hugging Face folder is used like sentence-transformers does, a checkpoint exactly as in training,
        where the boundary between prompt and text is found by character offsets.

        Args:
          path: A Hugging Face folder, a hub id, an Orbax checkpoint of this project, or the folder of a run with an
            export.
          dtype: The dtype of weights and computation.
          mesh: The device mesh. By default, weights are replicated on all devices and texts are split over them.

        Raises:
          UserError: If the model cannot be used.
        """
        folder = open_folder(resolve_model_path(str(path)))
        device_mesh = make_mesh(mesh or MeshSettings())
        defaults = {} if folder.text else PLAIN_TRANSFORMER_SETTINGS
        if folder.text is None and folder.family.causal:
            defaults = {**defaults, "attention": "causal"}
        model = open_with_stored_settings(
            folder, device_mesh, SentencePrompts(), compute_dtype=dtype, param_dtype=dtype, **defaults
        )
        text = model.blueprint.sentence
        if text and not text.include_prompt and model.blueprint.encoding["pooling"] in ("cls", "weighted_mean"):
            raise UserError(
                f"{path}: pooling {model.blueprint.encoding['pooling']} without the prompt (include_prompt: false) is "
                "not supported; use mean pooling"
            )
        with jax.set_mesh(device_mesh):
            return cls(model.graph, model.load(), model.blueprint, device_mesh)

    @property
    def max_seq_length(self) -> int:
        """Maximum number of tokens per text. Longer texts are truncated."""
        return self._max_tokens

    def with_params(self, params: Any) -> "Embedder":
        """Returns the same model with other parameters, without recompiling."""
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
        """Encodes queries, by default with the model's query prompt.

        Args:
          inputs: One text or several.
          prompt_name: See `encode`.
          prompt: See `encode`.
          batch_size: See `encode`.
          show_progress_bar: See `encode`.
          instruction: Task instruction to insert into the query prompt. Only for checkpoints and exports.

        Returns:
          Embeddings, float32 [texts, dim], or [dim] for a single text.

        Raises:
          UserError: See `encode`.
        """
        if instruction is not None:
            if prompt is not None or prompt_name is not None:
                raise UserError("give an instruction or a prompt, not both")
            prompt = self.prompt("query", instruction)
        if prompt is None and prompt_name is None:
            prompt = self.prompt("query")
        return self.encode(inputs, prompt_name, prompt, batch_size, show_progress_bar)

    def encode_document(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Encodes documents, by default with the model's document prompt.

        Args:
          inputs: One text or several.
          prompt_name: See `encode`.
          prompt: See `encode`.
          batch_size: See `encode`.
          show_progress_bar: See `encode`.

        Returns:
          Embeddings, float32 [texts, dim], or [dim] for a single text.

        Raises:
          UserError: See `encode`.
        """
        if prompt is None and prompt_name is None:
            prompt = self.prompt("document")
        return self.encode(inputs, prompt_name, prompt, batch_size, show_progress_bar)

    def prompt(self, kind: Literal["query", "document"], instruction: str | None = None) -> str:
        """Returns the prompt of queries or documents.

        Args:
          kind: What the texts are.
          instruction: Task instruction to insert into the query prompt. Only for checkpoints and exports.

        Raises:
          UserError: If the model's prompts take no instruction.
        """
        if instruction is not None:
            return self._tokenizer.query_prompt(instruction)
        return default_prompt(self._tokenizer, kind)

    def encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray:
        """Encodes texts. Equal texts of a call are encoded once, so they have exactly the same embedding.

        Args:
          inputs: One text or several.
          prompt_name: Name of a prompt in `prompts` to put before each text. None means the model's default prompt, if
            it has one.
          prompt: Prompt to put before each text. Overrides `prompt_name`.
          batch_size: Maximum number of rows per batch, rounded up to a multiple of the number of devices. Rows are as
            long as the longest text, and short texts share rows.
          show_progress_bar: Whether to show a progress bar. None shows it on a terminal if there are several batches.

        Returns:
          Embeddings, float32 [texts, dim], or [dim] for a single text.

        Raises:
          UserError: If an argument is invalid, if the prompt leaves no room for the texts or, for checkpoints, if a
            text has no token after the prompt.
        """
        if not isinstance(inputs, str | Sequence):
            raise UserError(f"expected a string or a list of strings, found {type(inputs).__name__}")
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        for text in (*texts, *(part for part in (prompt, prompt_name) if part is not None)):
            if not isinstance(text, str):
                raise UserError(f"expected a string, found {type(text).__name__}")
            if not is_unicode(text):
                raise UserError(f"{shorten(ascii(text))} is not valid Unicode")
        if prompt is None:
            name = prompt_name if prompt_name is not None else self._tokenizer.default_prompt_name
            if name is not None and name not in self.prompts:
                raise UserError(f"unknown prompt {name!r}; available prompts: {', '.join(self.prompts)}")
            prompt = "" if name is None else self.prompts[name]
        tokens = self._tokenizer.tokenize(texts, prompt, self.max_seq_length)
        check_room(self._tokenizer, tokens, prompt, self.max_seq_length)
        vectors = self.embed_tokens(tokens, batch_size, show_progress_bar)
        return vectors[0] if isinstance(inputs, str) else vectors

    def embed_tokens(
        self, texts: Sequence[Tokens], batch_size: int = 32, show_progress_bar: bool | None = None
    ) -> np.ndarray:
        """Encodes tokenized texts, float32 [texts, dim]; see `encode`."""
        if type(batch_size) is not int or batch_size < 1:
            raise UserError(f"batch_size: expected a positive integer, found {batch_size!r}")
        vectors = np.empty((len(texts), self.get_embedding_dimension()), np.float32)
        if not texts:
            return vectors
        sources = _first_of_equals(texts)
        is_first = sources == np.arange(len(texts))
        unique = np.flatnonzero(is_first)
        batches = plan_batches(
            np.array([text.ids.size for text in texts])[unique],
            self.max_seq_length,
            max_rows=batch_size,
            shards=row_shards(self._mesh),
            # Elsewhere every length would do; rounding it makes batches share compiled programs.
            multiple=ROW_MULTIPLES["splash"] if self._mesh.devices.flat[0].platform == "tpu" else 8,
        )
        console = log_console()
        show = console.is_terminal and len(batches.texts) > 1 if show_progress_bar is None else show_progress_bar
        steps = zip(batches.texts, batches.text_rows, strict=True)
        pending: list[tuple[np.ndarray, np.ndarray, jax.Array]] = []
        for indices, text_rows in track(
            steps, "encoding", len(batches.texts), console=console, disable=not show, transient=True
        ):
            indices = unique[indices]
            rows, slots = lay_out(Texts.join([texts[i] for i in indices]), text_rows, batches.rows, batches.row_length)
            with jax.set_mesh(self._mesh):
                rows = jax.tree.map(partial(split_rows, mesh=self._mesh), rows)
                embeddings = self._embed(self._params, rows, batches.slots)
            pending.append((indices, text_rows * batches.slots + slots, embeddings))
            if len(pending) > 1:  # fetch a batch while the devices compute the next one
                _fetch(vectors, *pending.pop(0))
        for batch in pending:
            _fetch(vectors, *batch)
        vectors[~is_first] = vectors[sources[~is_first]]
        return vectors

    def get_embedding_dimension(self) -> int:
        """Returns the dimension of the embeddings."""
        matrix = self._params["projection"]["kernel"] if "projection" in self._params else self._params["embedding"]
        return matrix.shape[-1]

    @staticmethod
    def similarity(embeddings1: np.ndarray, embeddings2: np.ndarray) -> np.ndarray:
        """Returns the cosine similarities of all pairs of embeddings, float32 [embeddings1, embeddings2]."""
        arrays = [np.atleast_2d(embeddings) for embeddings in (embeddings1, embeddings2)]
        first, second = map(unit_vectors, arrays)
        return first @ second.T


def _first_of_equals(texts: Sequence[Tokens]) -> np.ndarray:
    """Returns the index of the first text that is equal to each text, int [texts]."""
    first: dict[tuple[int, bytes], int] = {}
    # Digests, because a dict of the texts themselves would take as much memory as they do.
    keys = ((text.content_start, blake2b(text.ids.tobytes(), digest_size=16).digest()) for text in texts)
    return np.array([first.setdefault(key, i) for i, key in enumerate(keys)])


def _fetch(vectors: np.ndarray, texts: np.ndarray, slots: np.ndarray, embeddings: jax.Array) -> None:
    """Copies the embeddings of a batch to those of the whole list."""
    vectors[texts] = np.asarray(embeddings)[slots]


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Returns vectors, [vectors, dim], divided by their lengths; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def check_room(
    tokenizer: TextTokenizer,
    tokens: Sequence[Tokens],
    prompt: str,
    max_tokens: int,
    fix: str = "give a shorter prompt or instruction",
) -> None:
    """Checks that a prompt does not fill the limit alone, which would give all texts the same embedding.

    Args:
      tokenizer: The tokenizer.
      tokens: Texts tokenized after the prompt.
      prompt: The prompt.
      max_tokens: The limit.
      fix: What to do, for the error message.

    Raises:
      UserError: If nothing is left of the texts.
    """
    if not prompt or not tokens or any(found.ids.size < max_tokens for found in tokens):
        return
    try:
        fills = tokenizer.tokenize([""], prompt, max_tokens)[0].ids.size == max_tokens
    except EmptyContentError:  # a tokenizer that notices by itself
        return
    if fills:
        raise UserError(f"{max_tokens} tokens per text leave no room next to the prompt; {fix}")


def count_truncated(
    tokenizer: TextTokenizer, texts: Sequence[str], tokens: Sequence[Tokens], prompt: str, max_tokens: int
) -> int:
    """Returns how many texts have more than `max_tokens` tokens, given those that are left of each."""
    full = [text for text, found in zip(texts, tokens, strict=True) if found.ids.size == max_tokens]
    if not full:
        return 0
    return sum(found.ids.size > max_tokens for found in tokenizer.tokenize(full, prompt, max_tokens + 1))


def default_prompt(tokenizer: TextTokenizer, kind: Literal["query", "document"]) -> str:
    """Returns the prompt of queries or documents, without an instruction other than the model's default.

    Raises:
      UserError: If the default prompt does not exist.
    """
    names = ("query",) if kind == "query" else ("document", "passage", "corpus")
    name = next((name for name in names if name in tokenizer.prompts), tokenizer.default_prompt_name)
    if name is not None and name not in tokenizer.prompts:
        raise UserError(f"unknown prompt {name!r}; available prompts: {', '.join(tokenizer.prompts)}")
    return "" if name is None else tokenizer.prompts[name]


def make_tokenizer(blueprint: Blueprint) -> PromptTokenizer | SentenceTokenizer:
    """Creates the tokenizer that a model's blueprint describes."""
    if blueprint.prompt is not None:
        return PromptTokenizer(blueprint.tokenizer(), blueprint.prompt)
    assert blueprint.sentence is not None
    return SentenceTokenizer(blueprint.tokenizer(), blueprint.sentence)
