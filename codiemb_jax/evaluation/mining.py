"""Mines hard negatives: corpus texts that a model ranks high for a query, but that are not among its positives.

The definitions follow `mine_hard_negatives` of sentence-transformers. What differs: `range_min` and `range_max` are
ranks among all corpus texts but the query's positives, before the margins drop any.

Vectors are held of the queries and of one block of the corpus. Texts lie in temporary files; held are a hash and the
position of each, and the `range_max` nearest texts of each query.
"""

import json
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, TextIO

import numpy as np

from codiemb_jax.cache import shown
from codiemb_jax.distributed import log_console
from codiemb_jax.embedder import Embedder, check_room, unit_vectors
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.evaluation.search import VECTORS_PER_BLOCK, TopK
from codiemb_jax.files import check_new_file, is_unicode, temporary_path
from codiemb_jax.text.plain import decode_line, parse_text
from codiemb_jax.text.prompts import MAX_INSTANCE_CHARACTERS, EmptyContentError, Tokens, tokenize_groups
from codiemb_jax.text.records import Triple, read_records

PAIRS_PER_BLOCK = 16_384
"""Pairs of a query and a passage whose similarity is computed at a time."""
NOT_FOUND = -1


@dataclass(frozen=True)
class MiningSettings:
    """Which corpus texts become negatives of a query.

    Scores are cosine similarities. A query's positive score is the least of those of its positives.
    """

    negatives: int = 4
    """Maximum number of negatives to mine per query."""
    range_min: int = 10
    """Number of nearest texts to skip, which may be unlabeled positives."""
    range_max: int = 50
    """The last rank to consider, counted from 1."""
    margin: float | None = None
    """Drops candidates whose score is above the positive score minus this."""
    relative_margin: float | None = None
    """Drops candidates whose score is above the positive score minus this share of its magnitude."""
    max_score: float | None = None
    """Drops candidates whose score is above this."""
    sampling: Literal["top", "random"] = "top"
    """Takes the nearest of the remaining candidates, or random ones."""
    seed: int = 0
    scores: bool = False
    """Whether to write `positive_scores` and `negative_scores`."""
    keep_negatives: bool = False
    """Whether to add to the negatives that a record has, instead of replacing them."""

    def __post_init__(self) -> None:
        """Checks the ranks.

        Raises:
          UserError: If they leave too few candidates.
        """
        if self.range_min >= self.range_max:
            raise UserError(f"range_min {self.range_min}: must be less than range_max, {self.range_max}")
        if self.negatives > self.range_max - self.range_min:
            raise UserError(
                f"negatives {self.negatives}: ranks {self.range_min + 1} to {self.range_max} are only "
                f"{self.range_max - self.range_min} candidates per query; increase range_max or decrease range_min"
            )


@dataclass
class MiningReport:
    """What was found. A query that several records share counts once for each."""

    corpus: int
    """Different texts in the corpus."""
    queries: int = 0
    candidates: int = 0
    """Texts in the range of ranks, over all queries."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Candidates dropped for each reason. One with several reasons counts for the first."""
    negatives: int = 0
    """Negatives mined."""
    short: int = 0
    """Queries for which fewer negatives were found than wanted."""


class Encoder(Protocol):
    """Embeds texts, float32 [texts, dim]."""

    def encode_queries(self, queries: Sequence[Triple]) -> np.ndarray: ...

    def encode_passages(self, passages: Sequence[Triple]) -> np.ndarray: ...


class ModelEncoder:
    """Embeds queries and passages with the prompts of a model."""

    def __init__(self, embedder: Embedder, instruction: str | None = None, batch_size: int = 32):
        """Creates an encoder.

        Args:
          embedder: The model.
          instruction: Task instruction of all queries, instead of that of each query.
          batch_size: See `Embedder.encode`.

        Raises:
          UserError: If there is an instruction and the model's prompts take none.
        """
        self._embedder, self._instruction, self._batch_size = embedder, instruction, batch_size
        if instruction is not None and not embedder.tokenizer.takes_instructions:
            raise UserError("--instruction: this model's prompts have no placeholder for an instruction; leave it out")

    def encode_queries(self, queries: Sequence[Triple]) -> np.ndarray:
        """Embeds queries with their instructions if the model's prompts take them, else with its query prompt."""
        tokenizer, limit = self._embedder.tokenizer, self._embedder.max_seq_length
        texts = list(map(content, queries))
        if not tokenizer.takes_instructions:
            return self._embedder.encode_query(texts, batch_size=self._batch_size)
        instructions = [query.task if self._instruction is None else self._instruction for query in queries]

        def tokenize(prompt: str, group: Sequence[str]) -> list[Tokens]:
            tokens = tokenizer.tokenize(group, prompt, limit)
            check_room(tokenizer, tokens, prompt, limit)
            return tokens

        tokens = tokenize_groups(tokenize, texts, list(map(tokenizer.query_prompt, instructions)))
        return self._embedder.embed_tokens(tokens, self._batch_size)

    def encode_passages(self, passages: Sequence[Triple]) -> np.ndarray:
        """Embeds passages with the model's document prompt."""
        return self._embedder.encode_document(list(map(content, passages)), batch_size=self._batch_size)


def content(triple: Triple, separator: str = "") -> str:
    """Returns what a model reads of a text, apart from the prompt."""
    return f"{triple.instance[:MAX_INSTANCE_CHARACTERS]}{separator}{triple.text}".strip()


def _key(text: str) -> int:
    return Triple("", "", text).hash()


class Location(NamedTuple):
    """A text and where it is in the user's files."""

    where: str
    triple: Triple


class TextFile:
    """Texts in a temporary file. Those with the same key are one text, numbered in the order of first appearance."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._offsets, self._keys = array("q"), array("Q")

    @property
    def added(self) -> int:
        """How many texts have been added, equal ones included."""
        return len(self._keys)

    def add(self, key: int, text: Location) -> None:
        """Appends a text."""
        self._offsets.append(self._file.tell())
        self._keys.append(key)
        self._file.write(json.dumps([text.where, *text.triple], ensure_ascii=False).encode() + b"\n")

    def number_texts(self) -> None:
        """Numbers the texts added so far; call this before the methods below."""
        self._sorted, first = np.unique(np.frombuffer(self._keys, np.uint64), return_index=True)
        order = np.argsort(first)
        self._first = first[order]
        self.keys = self._sorted[order]
        """Key of each text, by number."""
        self._starts = np.frombuffer(self._offsets, np.int64)[self._first]
        self._numbers = np.empty_like(order)
        self._numbers[order] = np.arange(order.size)

    def __len__(self) -> int:
        return len(self.keys)

    def count(self, added: int) -> int:
        """Returns how many different texts are among the first `added`."""
        return int(np.searchsorted(self._first, added))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the numbers of texts by their keys, int64 [keys]; -1 for unknown ones."""
        positions = np.minimum(np.searchsorted(self._sorted, keys), len(self) - 1)
        return np.where(self._sorted[positions] == keys, self._numbers[positions], NOT_FOUND)

    def read(self, number: int) -> Location:
        """Reads a text by its number."""
        self._file.seek(self._starts[number])
        where, *parts = json.loads(self._file.readline())
        return Location(where, Triple(*parts))

    def blocks(self) -> Iterator[tuple[int, list[Location]]]:
        """Yields all texts in blocks, with the number of the first."""
        for start in range(0, len(self), VECTORS_PER_BLOCK):
            yield start, [self.read(i) for i in range(start, min(start + VECTORS_PER_BLOCK, len(self)))]


def read_corpus(path: Path) -> Iterator[Location]:
    """Yields the texts of a file.

    In a .txt file, each line is a text, and blank lines are skipped. Each line of a .jsonl file is an object with a
    `text` and optionally a `title`, which is put before the text with a space; other keys are ignored.

    Raises:
      UserError: If the file cannot be read, a line is invalid, or there is no text. Invalid lines are reported together
        at the end.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--corpus {path}: expected a .txt file (one text per line) or a .jsonl file (with `text`)")
    if not is_unicode(str(path)):
        raise UserError(f"--corpus {ascii(str(path))}: the name is not valid UTF-8; rename the file")
    problems: list[str] = []
    empty = True
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block
            raise UserError(f"--corpus {path}: is not a file")
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                empty = False
                where = f"{shown(path)}:{number}"
                try:
                    text = decode_line(line, number)
                    if path.suffix == ".jsonl":
                        text = " ".join(parse_text(text))
                    triple = Triple.stripped("", "", text.strip())
                    if not triple.text:
                        raise ValueError("empty text, expected a text")
                except UnicodeDecodeError as error:
                    problems.append(f"{where}: byte {error.start + 1}: not valid UTF-8, expected UTF-8 text")
                    continue
                except (ValueError, RecursionError) as error:
                    problems.append(f"{where}: {shorten(str(error), 200)}")
                    continue
                if not problems:
                    yield Location(where, triple)
    except OSError as error:
        raise UserError(f"--corpus {path}: cannot be read: {error.strerror}") from error
    if problems:
        raise UserError(f"invalid corpus:\n{format_problems(problems)}")
    if empty:
        raise UserError(f"--corpus {path}: contains no texts")


class _Pairs:
    """Pairs of a record and a text, by its key."""

    def __init__(self) -> None:
        self._records, self._keys = array("q"), array("Q")

    def add(self, record: int, key: int) -> None:
        self._records.append(record)
        self._keys.append(key)

    def resolve(self, queries: np.ndarray, texts: TextFile) -> tuple[np.ndarray, np.ndarray]:
        """Returns the query of each pair, given that of each record, and the number of its text."""
        return (
            queries[np.frombuffer(self._records, np.int64)],
            texts.find(np.frombuffer(self._keys, np.uint64)),
        )


def mine(
    files: Sequence[Path], corpus: Path | None, output: Path, settings: MiningSettings, encoder: Encoder
) -> MiningReport:
    """Writes the records of IR files with mined negatives.

    Never found are texts equal to the query or to one of its positives; records with the same query share their
    positives.

    Args:
      files: IR files.
      corpus: A file of texts, see `read_corpus`. None means all passages of the IR files.
      output: The file to write.
      settings: Which texts become negatives.
      encoder: The model.

    Raises:
      UserError: If an input is invalid, the output exists or cannot be written, or the corpus is too small.
    """
    folder = output.parent  # not that of temporary files, which may be in memory
    with (
        new_file(output) as target,
        tempfile.TemporaryFile(dir=folder) as queries,
        tempfile.TemporaryFile(dir=folder) as texts,
    ):
        miner = _Miner(files, settings, TextFile(queries), TextFile(texts))
        miner.read(corpus)
        miner.search(encoder)
        return miner.write(target)


class _Miner:
    def __init__(self, files: Sequence[Path], settings: MiningSettings, queries: TextFile, texts: TextFile):
        self._files, self._settings = files, settings
        self._queries, self._texts = queries, texts

    def read(self, corpus: Path | None) -> None:
        """Reads all texts. Those that are not in the corpus follow it, and are embedded for their scores only."""
        settings = self._settings
        self._states = [_state(path) for path in self._files]
        for text in read_corpus(corpus) if corpus else ():
            self._texts.add(_key(content(text.triple)), text)
        added = self._texts.added
        query_keys = self._read_records(corpus is None)
        self._queries.number_texts()
        self._texts.number_texts()
        self._query_of_record = self._queries.find(np.frombuffer(query_keys, np.uint64))
        self._corpus_size = self._texts.count(added) if corpus else len(self._texts)
        if self._corpus_size <= settings.range_min:
            raise UserError(
                f"range_min {settings.range_min}: the corpus has only {self._corpus_size} different texts, so none "
                "would be left; decrease range_min"
            )

    def _read_records(self, passages_are_corpus: bool) -> array:
        """Reads the IR files, adds their texts, and returns the key of the query of each record."""
        self._scored, self._excluded = _Pairs(), _Pairs()
        self._is_positive, query_keys = array("b"), array("Q")
        keeps_scores = self._settings.keep_negatives and self._settings.scores
        for path in self._files:
            where = shown(path)
            for record in read_records(path, "ir"):
                number = len(query_keys)
                query_keys.append(record.query.hash())
                self._queries.add(query_keys[-1], Location(f"{where}:{record.line}: query", record.query))
                for name in ("positives", "negatives"):
                    is_positive = name == "positives"
                    for i, passage in enumerate(getattr(record, name)):
                        key = _key(content(passage))
                        is_scored = is_positive or keeps_scores
                        if is_scored or passages_are_corpus:
                            self._texts.add(key, Location(f"{where}:{record.line}: {name}[{i}]", passage))
                        if is_scored:
                            self._scored.add(number, key)
                            self._is_positive.append(is_positive)
                # A corpus text may be an instance instruction and a text, or a title and a text with a space between.
                for text in (record.query, *record.positives):
                    for key in {_key(content(text)), _key(content(text, " "))}:
                        self._excluded.add(number, key)
        return query_keys

    def search(self, encoder: Encoder) -> None:
        """Finds the nearest texts of each query, and computes the scores of its own passages."""
        console = log_console()
        console.print(f"embedding {len(self._queries):,} queries")
        vectors = np.concatenate([_encode(encoder.encode_queries, block) for _, block in self._queries.blocks()])
        top = TopK(vectors, min(self._settings.range_max, self._corpus_size))
        excluded_queries, excluded_texts = self._excluded.resolve(self._query_of_record, self._texts)
        order = np.lexsort((excluded_queries, excluded_texts // VECTORS_PER_BLOCK))  # by block, then by query
        excluded_queries, excluded_texts = excluded_queries[order], excluded_texts[order]
        excluded_blocks = excluded_texts // VECTORS_PER_BLOCK
        scored_queries, scored_texts = self._scored.resolve(self._query_of_record, self._texts)
        scored_order = np.argsort(scored_texts, kind="stable")
        self._own_scores = np.empty(len(scored_queries), np.float32)
        for start, block in self._texts.blocks():
            embeddings = _encode(encoder.encode_passages, block)
            stop = start + len(block)
            if start < self._corpus_size:
                number = start // VECTORS_PER_BLOCK
                pairs = slice(*np.searchsorted(excluded_blocks, (number, number + 1)))
                in_corpus = embeddings[: self._corpus_size - start]
                top.add(in_corpus, (excluded_queries[pairs], excluded_texts[pairs] - start))
            first, last = np.searchsorted(scored_texts, (start, stop), sorter=scored_order)
            for i in range(first, last, PAIRS_PER_BLOCK):
                chosen = scored_order[i : min(i + PAIRS_PER_BLOCK, last)]
                products = vectors[scored_queries[chosen]] * embeddings[scored_texts[chosen] - start]
                self._own_scores[chosen] = products.sum(axis=1)
            console.print(f"embedded {stop:,} of {len(self._texts):,} passages")
        self._scores, self._indices = top.result()
        positive = np.frombuffer(self._is_positive, np.int8) == 1
        self._positive_score = np.full(len(self._queries), np.inf, np.float32)
        np.minimum.at(self._positive_score, scored_queries[positive], self._own_scores[positive])

    def write(self, target: TextIO) -> MiningReport:
        """Writes the records and returns the report."""
        report = MiningReport(self._corpus_size)
        scored = 0
        for path, state in zip(self._files, self._states, strict=True):
            if _state(path) != state:
                raise UserError(f"{shown(path)}: has changed while negatives were mined; start again")
            with path.open("rb") as lines:
                for line in lines:
                    if line.strip():
                        record = json.loads(line)
                        scored += self._fill(record, report, scored)
                        # meta_data may have unpaired surrogates.
                        target.write(json.dumps(record, ensure_ascii=not is_unicode(record)) + "\n")
        return report

    def _fill(self, record: dict[str, Any], report: MiningReport, scored: int) -> int:
        """Sets the negatives of the next record, and returns how many own scores it has, which start at `scored`."""
        settings = self._settings
        kept = record.get("negatives", []) if settings.keep_negatives else []
        query = self._query_of_record[report.queries]
        chosen, scores = self._choose(query, kept, report)
        record["negatives"] = kept + [["", *self._texts.read(i).triple[1:]] for i in chosen]
        positives = len(record["positives"])
        if settings.scores:
            own = self._own_scores[scored : scored + positives + len(kept)]
            record["positive_scores"] = _rounded(own[:positives])
            record["negative_scores"] = _rounded(np.concatenate([own[positives:], scores]))
        elif "negative_scores" in record:
            record["negative_scores"] = []  # those that it had are of other negatives
        report.queries += 1
        report.negatives += len(chosen)
        report.short += len(chosen) < settings.negatives
        return positives + (len(kept) if settings.scores else 0)

    def _choose(self, query: int, kept: Sequence[list[str]], report: MiningReport) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers and scores of the texts that become negatives, in descending order of scores."""
        settings = self._settings
        indices, scores = (array[query, settings.range_min :] for array in (self._indices, self._scores))
        indices, scores = indices[indices != NOT_FOUND], scores[indices != NOT_FOUND].astype(np.float64)
        report.candidates += len(indices)
        positive = float(self._positive_score[query])
        reasons: dict[str, np.ndarray] = {}
        if settings.keep_negatives:
            keys = [_key(content(Triple.stripped(*triple))) for triple in kept]
            reasons["already a negative"] = np.isin(self._texts.keys[indices], np.array(keys, np.uint64))
        if settings.margin is not None:
            reasons["margin"] = scores > positive - settings.margin
        if settings.relative_margin is not None:
            reasons["relative_margin"] = scores > positive - abs(positive) * settings.relative_margin
        if settings.max_score is not None:
            reasons["max_score"] = scores > settings.max_score
        remaining = np.ones(len(indices), bool)
        for reason, applies in reasons.items():
            report.dropped[reason] = report.dropped.get(reason, 0) + int((remaining & applies).sum())
            remaining &= ~applies
        left = np.flatnonzero(remaining)
        if settings.sampling == "random" and len(left) > settings.negatives:
            random = np.random.default_rng((settings.seed, report.queries))
            left = np.sort(random.choice(left, settings.negatives, replace=False))
        left = left[: settings.negatives]
        return indices[left], scores[left]


def _encode(encode: Callable[[Sequence[Triple]], np.ndarray], texts: Sequence[Location]) -> np.ndarray:
    """Returns L2-normalized embeddings, even if the model does not normalize."""
    try:
        embeddings = encode([text.triple for text in texts])
    except EmptyContentError as error:
        problems = error.problems_at([text.where for text in texts], "the maximum length of the model")
        raise UserError(f"texts without a content token:\n{format_problems(problems)}") from error
    if not np.isfinite(embeddings).all():
        raise UserError("the model's embeddings are NaN or infinite; check its weights")
    return unit_vectors(embeddings)


def _rounded(scores: np.ndarray) -> list[float]:
    return [round(float(score), 6) for score in scores]


def _state(path: Path) -> tuple[int, int] | None:
    """Returns what changes with the content of a file; None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


@contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """Yields a temporary text file in the same folder; renames it to `path`, or removes it on an error.

    Raises:
      UserError: If `path` exists or cannot be written.
    """
    folder = path.parent.resolve()
    temporary = temporary_path(folder / path.name)
    try:
        check_new_file(path, ".jsonl", ".json")
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                yield file
            check_new_file(path, ".jsonl", ".json")
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(folder):
            raise  # an error of reading, not of writing
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
