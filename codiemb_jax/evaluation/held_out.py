"""Evaluates a model on held-out data: retrieval by metrics of rankings, similarity by correlations.

Similarities are cosines. In an IR file, each query ranks all passages of the file; in a BEIR folder, all documents but
the one with the query's own id, as in BEIR.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from codiemb_jax.cache import cache_folder, shown
from codiemb_jax.config import EvaluationSettings
from codiemb_jax.data.digest import file_digest
from codiemb_jax.data.find import dataset_names, find_files
from codiemb_jax.distributed import log_console
from codiemb_jax.embedder import Embedder, TextTokenizer, check_room, count_truncated, default_prompt, unit_vectors
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.evaluation.beir import CORPUS, QUERIES, BeirFolder, find_folders, read_folder
from codiemb_jax.evaluation.metrics import CORRELATIONS, CUT, MEASURES, retrieval_metrics, similarity_metrics
from codiemb_jax.evaluation.search import VECTORS_PER_BLOCK, TopK, search
from codiemb_jax.remote import Location
from codiemb_jax.text.prompts import MAX_INSTANCE_CHARACTERS, EmptyContentError, Tokens, tokenize_groups
from codiemb_jax.text.records import Triple, read_records
from codiemb_jax.training.run_folder import HeldOutMetrics
from codiemb_jax.training.selection import score

PLACEHOLDER = "{instruction}"


class HeldOutTexts:
    """Tokenizes held-out texts with the prompts of a model.

    Queries of IR and STS files get their own instructions if the model's prompts take them. Queries of BEIR folders,
    and all queries of other models, get the model's query prompt.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        max_tokens: int,
        *,
        instruction: str | None = None,
        query_prompt: str | None = None,
        limit_setting: str = "data.query_max_tokens and data.passage_max_tokens",
        count_truncated: bool = False,
    ):
        """Checks the prompt.

        Args:
          tokenizer: The model's tokenizer.
          max_tokens: Maximum number of tokens per text.
          instruction: Task instruction of all queries, instead of their own.
          query_prompt: Whole prompt of queries, instead of the model's. {instruction} is replaced by the instruction of
            the query, if it occurs.
          limit_setting: Name of the setting of `max_tokens`, for error messages.
          count_truncated: Whether to count the texts that are truncated, which takes time for each.

        Raises:
          UserError: If there is an instruction but no placeholder, or the prompt lacks the model's special tokens.
        """
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._instruction, self._query_prompt = instruction, query_prompt
        self._limit_setting, self._count_truncated = limit_setting, count_truncated
        self._begin = tokenizer.query_prompt("") if tokenizer.takes_instructions else ""
        self.truncated = 0
        """Texts that were truncated so far, if they are counted."""
        self.unused_instructions = False
        """Whether queries had instructions that the model's prompts do not take."""
        if query_prompt is not None and not query_prompt.startswith(self._begin):
            raise UserError(
                f"query prompt {shorten(query_prompt)!r}: must start with {self._begin!r}, as all texts of this model "
                "do"
            )
        takes = tokenizer.takes_instructions if query_prompt is None else PLACEHOLDER in query_prompt
        if instruction is not None and not takes:
            raise UserError(
                f"instruction {shorten(instruction)!r}: "
                + ("this model's prompts have" if query_prompt is None else "the query prompt has")
                + f" no placeholder for it; give a query prompt with {PLACEHOLDER}, or leave the instruction out"
            )

    def queries(self, queries: Sequence[Triple], locations: Sequence[str]) -> list[Tokens]:
        """Tokenizes queries, or either text of similarity pairs, with their instructions.

        Args:
          queries: The queries.
          locations: File, line and field of each, for error messages.

        Raises:
          UserError: If a query has no tokens after the prompt.
        """
        texts = [query.instance[:MAX_INSTANCE_CHARACTERS] + query.text for query in queries]
        return self._tokenize(texts, [self._prompt(query.task) for query in queries], locations)

    def plain_queries(self, queries: Sequence[str], locations: Sequence[str]) -> list[Tokens]:
        """Tokenizes queries that have no instruction of their own. See `queries`."""
        return self._tokenize(queries, [self._prompt(None)] * len(queries), locations)

    def passages(self, passages: Sequence[Triple], locations: Sequence[str]) -> list[Tokens]:
        """Tokenizes passages. See `queries`."""
        texts = [passage.instance[:MAX_INSTANCE_CHARACTERS] + passage.text for passage in passages]
        return self._tokenize(texts, [default_prompt(self._tokenizer, "document")] * len(texts), locations)

    def documents(self, texts: Sequence[str]) -> tuple[list[int], list[Tokens]]:
        """Tokenizes documents, some of which may be empty.

        Returns:
          The indices of the documents with tokens after the prompt, and their tokens.
        """
        prompt = default_prompt(self._tokenizer, "document")
        kept = [i for i, text in enumerate(texts) if text.strip()]
        try:
            return kept, self._tokenize_after(prompt, [texts[i] for i in kept])
        except EmptyContentError as error:
            if error.min_limits:
                problem = f"expected {self._limit_setting} >= {max(error.min_limits.values())}"
                raise UserError(f"the prompt of documents leaves no room for the text, {problem}") from error
            without = set(error.no_tokens)
            kept = [i for number, i in enumerate(kept) if number not in without]
            return kept, self._tokenize_after(prompt, [texts[i] for i in kept])

    def _prompt(self, instruction: str | None) -> str:
        """Returns the prompt of a query with this instruction of its own; None stands for the model's default."""
        if self._instruction is not None:
            instruction = self._instruction
        if self._query_prompt is not None:
            if PLACEHOLDER not in self._query_prompt:
                return self._query_prompt
            if instruction is None:
                raise UserError(
                    f"query prompt {shorten(self._query_prompt)!r}: queries of BEIR folders have no instruction to "
                    f"insert for {PLACEHOLDER}; also give an instruction"
                )
            return self._query_prompt.replace(PLACEHOLDER, instruction) if instruction else self._begin
        if instruction is not None and self._tokenizer.takes_instructions:
            return self._tokenizer.query_prompt(instruction)
        self.unused_instructions |= bool(instruction)
        return default_prompt(self._tokenizer, "query")

    def _tokenize(self, texts: Sequence[str], prompts: Sequence[str], locations: Sequence[str]) -> list[Tokens]:
        try:
            return tokenize_groups(self._tokenize_after, texts, prompts)
        except EmptyContentError as error:
            problems = error.problems_at(locations, self._limit_setting)
            raise UserError(f"texts without a content token:\n{format_problems(problems)}") from error

    def _tokenize_after(self, prompt: str, texts: Sequence[str]) -> list[Tokens]:
        limit = self._max_tokens
        tokens = self._tokenizer.tokenize(texts, prompt, limit)
        check_room(self._tokenizer, tokens, prompt, limit, f"increase {self._limit_setting}")
        if self._count_truncated:
            self.truncated += count_truncated(self._tokenizer, texts, tokens, prompt, limit)
        return tokens


@dataclass(frozen=True)
class HeldOutIR:
    """A retrieval file: its queries, its unique passages, and the relevant passages of each query."""

    name: str
    queries: list[Tokens]
    passages: list[Tokens]
    relevant: list[set[int]]
    """Indices in `passages`, for each query."""

    def score(self, embedder: Embedder, batch_size: int = 32) -> dict[str, float]:
        """Returns the metrics of rankings of all passages. Relevant ones have gain 1."""
        queries, passages = (_unit_embeddings(embedder, texts, batch_size) for texts in (self.queries, self.passages))
        # The search breaks ties by position, trec_eval by name: in this order, both find the same passages.
        order = sorted(range(len(passages)), key=str, reverse=True)
        blocks = (passages[order[i : i + VECTORS_PER_BLOCK]] for i in range(0, len(order), VECTORS_PER_BLOCK))
        relevant = [{str(j): 1 for j in found} for found in self.relevant]
        return retrieval_metrics(relevant, *search(queries, blocks, CUT), [str(j) for j in order])

    @property
    def digest(self) -> str:
        """Digest of the data."""
        return _digest(self.queries, self.passages, [sorted(found) for found in self.relevant])


@dataclass(frozen=True)
class HeldOutBeir:
    """A BEIR folder and the queries that have judgments. Its corpus is embedded in blocks, of which only ids are kept.

    Metrics do not depend on the order of the corpus, unless it has more than `VECTORS_PER_BLOCK` documents and some
    have the same cosine: up to rounding if they are in different blocks, exactly if they are at rank `CUT`.
    """

    name: str
    folder: BeirFolder
    queries: list[Tokens]
    texts: HeldOutTexts

    def score(self, embedder: Embedder, batch_size: int = 32) -> dict[str, float]:
        """Returns the metrics of rankings of all documents. Those without any token have the cosine 0."""
        top = TopK(_unit_embeddings(embedder, self.queries, batch_size), CUT)
        query_indices = {name: i for i, name in enumerate(self.folder.queries)}
        names: list[str] = []
        with Progress(console=log_console(), transient=True) as progress:
            task = progress.add_task(f"encoding {self.name}", total=self.folder.documents)
            for block in self.folder.blocks(VECTORS_PER_BLOCK):
                block.sort(reverse=True)  # by id, as trec_eval breaks ties
                own = sorted((query_indices[name], j) for j, (name, _) in enumerate(block) if name in query_indices)
                kept, tokens = self.texts.documents([document.text for document in block])
                vectors = np.zeros((len(block), embedder.get_embedding_dimension()), np.float32)
                vectors[kept] = _unit_embeddings(embedder, tokens, batch_size, show_progress_bar=False)
                columns = np.array(own, np.int64).reshape(-1, 2).T
                top.add(vectors, (columns[0], columns[1]))
                names += [document.id for document in block]
                progress.update(task, completed=len(names))
        return retrieval_metrics(self.folder.relevant, *top.result(), names)

    @property
    def digest(self) -> str:
        """Digest of the data."""
        corpus = file_digest(self.folder.path / CORPUS, cache_folder())
        return _digest(self.queries, [], [self.folder.relevant, corpus])


@dataclass(frozen=True)
class HeldOutSTS:
    """A similarity file: pairs of texts and their scores."""

    name: str
    first: list[Tokens]
    second: list[Tokens]
    scores: list[float]

    def score(self, embedder: Embedder, batch_size: int = 32) -> dict[str, float]:
        """Returns the correlations between cosine similarities and scores."""
        both = _unit_embeddings(embedder, [*self.first, *self.second], batch_size)
        first, second = np.split(both, 2)
        return similarity_metrics(np.sum(first * second, axis=1), self.scores)

    @property
    def digest(self) -> str:
        """Digest of the data."""
        return _digest(self.first, self.second, self.scores)


def _digest(first: Sequence[Tokens], second: Sequence[Tokens], rest: Any) -> str:
    digest = hashlib.sha256(json.dumps(rest).encode())
    for texts in (first, second):
        digest.update(np.array([text.ids.size for text in texts], np.int64).tobytes())
        for text in texts:
            digest.update(text.ids.tobytes())
    return digest.hexdigest()


def _unit_embeddings(
    embedder: Embedder, texts: Sequence[Tokens], batch_size: int, show_progress_bar: bool | None = None
) -> np.ndarray:
    """Returns L2-normalized embeddings, even if the model does not normalize."""
    embeddings = embedder.embed_tokens(texts, batch_size, show_progress_bar)
    if not np.isfinite(embeddings).all():
        raise UserError("the model's embeddings of held-out texts are NaN or infinite")
    return unit_vectors(embeddings)


HeldOut = HeldOutIR | HeldOutSTS | HeldOutBeir


def read_held_out(settings: EvaluationSettings, tokenizer: TextTokenizer, max_tokens: int) -> list[HeldOut]:
    """Reads all held-out data of the settings, and tokenizes all but the documents of BEIR folders.

    Raises:
      UserError: If a file is invalid.
    """
    texts = HeldOutTexts(tokenizer, max_tokens)
    held_out = read_files(settings.ir, settings.sts, settings.beir, texts, "evaluation.")
    if settings.metric is not None:
        check_metric(settings.metric, held_out)
    return held_out


def check_metric(metric: str, held_out: Sequence[HeldOut]) -> None:
    """Checks that held-out data have the metric that chooses the best checkpoint.

    Raises:
      UserError: If they do not.
    """
    known = metric_names(held_out)
    try:
        score(dict.fromkeys(known, 0.0), metric)
    except KeyError as error:
        raise UserError(
            f"evaluation.metric: there is no {shorten(metric)!r}; the metrics are "
            f"{', '.join(dict.fromkeys(name.rpartition(' ')[2] for name in known))}, alone or after the name of a "
            f"file, such as {known[0]!r}"
        ) from error


def metric_names(held_out: Sequence[HeldOut]) -> list[str]:
    """Returns the names of the metrics that `evaluate` returns."""
    return [
        f"{data.name} {name}"
        for data in held_out
        for name in (CORRELATIONS if isinstance(data, HeldOutSTS) else MEASURES)
    ]


def held_out_digest(held_out: Sequence[HeldOut]) -> str:
    """Returns a digest by which a change of held-out data is noticed."""
    parts = [[type(data).__name__, data.name, data.digest] for data in held_out]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def read_files(
    ir: Sequence[Location], sts: Sequence[Location], beir: Sequence[Location], texts: HeldOutTexts, prefix: str
) -> list[HeldOut]:
    """Reads held-out data.

    Args:
      ir: Retrieval files, or folders of them.
      sts: Similarity files, or folders of them.
      beir: Folders in the format of BEIR.
      texts: How to tokenize texts.
      prefix: Start of the names of the three settings, for error messages.

    Raises:
      UserError: If a file is invalid.
    """
    ir_files, sts_files = find_files(ir, f"{prefix}ir"), find_files(sts, f"{prefix}sts")
    folders = find_folders(beir, f"{prefix}beir")
    names = dataset_names([*ir_files, *folders])  # together, because they have the same metrics
    return [
        *(_read_ir(path, name, texts) for path, name in zip(ir_files, names[: len(ir_files)], strict=True)),
        *(_read_sts(path, name, texts) for path, name in zip(sts_files, dataset_names(sts_files), strict=True)),
        *(_read_beir(path, name, texts) for path, name in zip(folders, names[len(ir_files) :], strict=True)),
    ]


def evaluate(embedder: Embedder, held_out: Sequence[HeldOut]) -> HeldOutMetrics:
    """Returns metrics of rankings in [0, 1] and correlations in [-1, 1], by name of the data and of the metric."""
    return {f"{data.name} {metric}": value for data in held_out for metric, value in data.score(embedder).items()}


def _read_ir(path: Path, name: str, texts: HeldOutTexts) -> HeldOutIR:
    where = shown(path)
    indices: dict[Triple, int] = {}
    queries: list[Triple] = []
    query_locations: list[str] = []
    passages: list[Triple] = []
    passage_locations: list[str] = []
    relevant: list[set[int]] = []
    for record in read_records(path, "ir"):
        queries.append(record.query)
        query_locations.append(f"{where}:{record.line}: query")
        found = []
        for field in ("positives", "negatives"):
            for i, passage in enumerate(getattr(record, field)):
                passage = passage._replace(task="")  # the task instruction of a passage is not used
                if passage not in indices:
                    indices[passage] = len(passages)
                    passages.append(passage)
                    passage_locations.append(f"{where}:{record.line}: {field}[{i}]")
                found.append(indices[passage])
        relevant.append(set(found[: len(record.positives)]))
    return HeldOutIR(
        name=name,
        queries=texts.queries(queries, query_locations),
        passages=texts.passages(passages, passage_locations),
        relevant=relevant,
    )


def _read_sts(path: Path, name: str, texts: HeldOutTexts) -> HeldOutSTS:
    where = shown(path)
    records = list(read_records(path, "sts"))
    scores = [record.score for record in records if record.score is not None]
    if len(set(scores)) < 2:
        raise UserError(f"{where}: all pairs have the same score; correlation needs at least two different scores")
    return HeldOutSTS(
        name=name,
        first=texts.queries(
            [record.query for record in records], [f"{where}:{record.line}: query" for record in records]
        ),
        second=texts.queries(
            [record.positives[0] for record in records], [f"{where}:{record.line}: positives[0]" for record in records]
        ),
        scores=scores,
    )


def _read_beir(path: Path, name: str, texts: HeldOutTexts) -> HeldOutBeir:
    folder = read_folder(path)
    where = shown(path / QUERIES)
    queries = texts.plain_queries(
        [text for _, text in folder.queries.values()], [f"{where}:{line}: text" for line, _ in folder.queries.values()]
    )
    return HeldOutBeir(name, folder, queries, texts)
