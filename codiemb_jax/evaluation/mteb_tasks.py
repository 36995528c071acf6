"""Evaluates a model on tasks of MTEB, the Massive Text Embedding Benchmark, with an instruction for each task.

Tasks, data sets and metrics are those of the mteb package (https://github.com/embeddings-benchmark/mteb).
"""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from codiemb_jax.distributed import log_console
from codiemb_jax.embedder import Embedder
from codiemb_jax.errors import UserError, shorten
from codiemb_jax.text.prompts import EmptyContentError

if TYPE_CHECKING:
    from mteb.abstasks.abstask import AbsTask

CMTEB = "cmteb"
"""Stands for all tasks of the Chinese benchmark."""
CMTEB_BENCHMARK = "MTEB(cmn, v1)"
"""Its name in mteb."""
PUBLISHED_MODEL = "tencent/Youtu-Embedding"
"""The model trained with CoDiEmb, whose instructions are in mteb's registry."""
PUBLISHED_QUERY_PROMPT = "Instruction: {instruction} \nQuery: "
"""Query prompt with which the published scores were computed. It differs from that of the training data, which has no
newline."""
PUBLISHED_CMTEB = {
    "Class.": 78.04,
    "Clust.": 79.67,
    "Pair Class.": 89.69,
    "Rerank.": 73.85,
    "Retr.": 80.95,
    "STS": 70.91,
    "Mean(Task)": 77.60,
    "Mean(Type)": 78.85,
}
"""Published CMTEB scores of Youtu-Embedding-V1, from its README."""
COLUMNS = {
    "Classification": "Class.",
    "Clustering": "Clust.",
    "PairClassification": "Pair Class.",
    "Reranking": "Rerank.",
    "Retrieval": "Retr.",
    "STS": "STS",
}
"""Column of each type of task."""

_PROBES = ("how do I reset my password", "怎样更换自行车的内胎？")


@dataclass(frozen=True)
class MtebScore:
    """The result of one task."""

    task: str
    type: str
    metric: str
    """Name of the main score."""
    value: float
    """Main score in [0, 1], or in [-1, 1] for correlations: the mean over splits and languages."""


@dataclass(frozen=True)
class MtebResults:
    """The results of a model."""

    model: str
    scores: tuple[MtebScore, ...]


class MtebEncoder:
    """Presents an `Embedder` to mteb, as mteb's `EncoderProtocol`.

    Queries, and texts of symmetric tasks such as STS, get the instruction of their task: the first of

      1. the caller's `instructions`,
      2. the instruction of Youtu-Embedding in mteb's registry,
      3. the prompt of the task in mteb,

    inserted into the model's query prompt, or into `query_prompt`. Without any, they get the model's query prompt as it
    is. If the model's prompts have no placeholder for an instruction and there is no `query_prompt`, the model's own
    prompts are used, under the names that mteb looks up: task and kind of text, task, type of task and kind of text,
    type of task, kind of text. Documents always get their prompts by these names.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        query_prompt: str | None = None,
        instructions: Mapping[str, str] | None = None,
        name: str = "model",
        revision: str | None = None,
    ):
        """Creates an encoder.

        Args:
          embedder: The model.
          query_prompt: Whole prompt of queries, with the placeholder {instruction}. None means the model's.
          instructions: Instructions by name of task. An empty instruction means no prompt.
          name: Name of the model in mteb's results.
          revision: Revision of the model in mteb's results.

        Raises:
          UserError: If mteb is not installed, or `query_prompt` or `instructions` cannot be used with this model.
        """
        mteb = _import_mteb()
        from mteb.models import ModelMeta  # imports PyTorch
        from mteb.models.model_meta import ScoringFunction

        self._embedder = embedder
        self._query_prompt = query_prompt
        self._instructions = dict(instructions or {})
        self._begin = embedder.tokenizer.query_prompt("") if embedder.tokenizer.takes_instructions else ""
        if query_prompt is not None:
            if query_prompt.count("{instruction}") != 1:
                raise UserError(
                    f"query prompt {shorten(query_prompt)!r}: must contain the placeholder {{instruction}} exactly once"
                )
            if not query_prompt.startswith(self._begin):
                raise UserError(
                    f"query prompt {shorten(query_prompt)!r}: must start with {self._begin!r}, as all texts of this "
                    "model do"
                )
        self._inserts_instructions = query_prompt is not None or embedder.tokenizer.takes_instructions
        if self._instructions and not self._inserts_instructions:
            raise UserError(
                "this model's prompts have no placeholder for an instruction; also give the query prompt, with the "
                "placeholder {instruction}"
            )
        self._registered = mteb.get_model_meta(PUBLISHED_MODEL).loader_kwargs["prompts_dict"]
        # mteb wants a name with an organization, and uses it as the name of a folder.
        safe_name = re.sub(r"[^\w.-]+", "_", name)
        self.mteb_model_meta = ModelMeta.create_empty(
            overwrites={
                "name": f"codiemb_jax/{safe_name}",
                "revision": revision,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: str | None = None,
        batch_size: int = 32,
        **_: Any,
    ) -> np.ndarray:
        """Encodes the texts of a task.

        Args:
          inputs: Batches of texts, each with the key "text".
          task_metadata: mteb's metadata of the task.
          hf_split: Not used.
          hf_subset: Not used.
          prompt_type: "query", "document", or None for symmetric tasks.
          batch_size: See `Embedder.encode`.

        Returns:
          Embeddings, float32 [texts, dim]. Those of texts without any token are 0.

        Raises:
          UserError: If an embedding is NaN or infinite, or a prompt leaves no room for the text.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        encode = partial(self._with_prompt(task_metadata, prompt_type), batch_size=batch_size)
        try:
            embeddings = encode(texts)
        except EmptyContentError as error:
            if error.min_limits:
                raise UserError(f"{task_metadata.name}: {error}") from error
            # Some data sets have empty texts, which should not end the evaluation.
            kept = np.setdiff1d(np.arange(len(texts)), error.no_tokens)
            embeddings = np.zeros((len(texts), self._embedder.get_embedding_dimension()), np.float32)
            embeddings[kept] = encode([texts[i] for i in kept])
        if not np.isfinite(embeddings).all():
            raise UserError(f"{task_metadata.name}: the model's embeddings are NaN or infinite")
        return embeddings

    def _with_prompt(self, task_metadata: Any, prompt_type: Any) -> Any:
        """Returns the method of the embedder that encodes these texts, with its prompt as an argument."""
        from mteb.models.abs_encoder import get_prompt_name

        document = prompt_type == "document"
        if document or not self._inserts_instructions:
            prompt_name = get_prompt_name(self._embedder.prompts, task_metadata, prompt_type)
            method = self._embedder.encode_document if document else self._embedder.encode_query
            return partial(method, prompt_name=prompt_name)
        instruction = self._instruction(task_metadata)
        if instruction is None:
            return self._embedder.encode_query
        if self._query_prompt is None:
            return partial(self._embedder.encode_query, instruction=instruction)
        prompt = self._query_prompt.replace("{instruction}", instruction) if instruction else self._begin
        return partial(self._embedder.encode_query, prompt=prompt)

    def _instruction(self, task_metadata: Any) -> str | None:
        if task_metadata.name in self._instructions:
            return self._instructions[task_metadata.name]
        return _instruction_of(task_metadata, self._registered)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine similarities of all pairs, [embeddings1, embeddings2]."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine similarities of corresponding embeddings, [embeddings]."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def find_tasks(names: Iterable[str]) -> "list[AbsTask]":
    """Finds tasks by name, without downloading anything.

    Args:
      names: Names of tasks in mteb. "cmteb" stands for all tasks of `CMTEB_BENCHMARK`. Tasks of this benchmark are
        evaluated on its splits also if they are given by name.

    Returns:
      The tasks, without repetition.

    Raises:
      UserError: If mteb is not installed, there is no such task, or a task has other inputs than texts.
    """
    mteb = _import_mteb()
    from mteb.get_tasks import TASK_LIST

    cmteb = {task.metadata.name: task for task in mteb.get_benchmark(CMTEB_BENCHMARK).tasks}
    tasks: dict[str, AbsTask] = {}
    for name in names:
        if name == CMTEB:
            tasks |= cmteb
            continue
        try:
            task = cmteb.get(name) or mteb.get_task(name)
        except KeyError:
            known = {known.casefold(): known for known in (CMTEB, *(task.metadata.name for task in TASK_LIST))}
            near = [known[match] for match in difflib.get_close_matches(name.casefold(), known)]
            hint = f"did you mean {' or '.join(near)}?" if near else "mteb.get_tasks() lists all tasks"
            raise UserError(f"{shorten(name)}: mteb has no such task; {hint}") from None
        if list(task.metadata.modalities) != ["text"]:
            raise UserError(f"{name}: this task has inputs other than texts: {', '.join(task.metadata.modalities)}")
        tasks[task.metadata.name] = task
    return list(tasks.values())


def instructions_of(tasks: Sequence[str]) -> dict[str, str]:
    """Returns the instructions of tasks, by the names under which mteb looks prompts up in a model's `prompts`.

    Inserted into the model's query prompt, these are the prompts with which an export is evaluated by mteb itself as it
    is by `run_mteb`.

    Args:
      tasks: Names of tasks; see `find_tasks`.

    Raises:
      UserError: See `find_tasks`.
    """
    registered = _import_mteb().get_model_meta(PUBLISHED_MODEL).loader_kwargs["prompts_dict"]
    instructions = {}
    for task in find_tasks(tasks):
        instruction = _instruction_of(task.metadata, registered)
        if instruction is not None:
            # In tasks with documents, a prompt under the name of the task alone would also be that of documents.
            asymmetric = "retrieval" in task.metadata.type.lower() or "reranking" in task.metadata.type.lower()
            instructions[task.metadata.name + ("-query" if asymmetric else "")] = instruction
    return instructions


def run_mteb(
    embedder: Embedder,
    tasks: Sequence[str],
    *,
    query_prompt: str | None = None,
    instructions: Mapping[str, str] | None = None,
    model_name: str = "model",
    results_folder: Path | None = None,
    batch_size: int = 32,
) -> MtebResults:
    """Evaluates a model on tasks of mteb, which downloads their data sets from the Hugging Face Hub.

    Args:
      embedder: The model.
      tasks: Names of tasks; see `find_tasks`.
      query_prompt: See `MtebEncoder`. `PUBLISHED_QUERY_PROMPT` reproduces the published scores.
      instructions: See `MtebEncoder`.
      model_name: Name of the model in the results.
      results_folder: Folder for mteb's files of results, which are written after each task. Results that it already
        contains for the same embeddings, prompts and version of mteb are not computed again.
      batch_size: See `Embedder.encode`.

    Raises:
      UserError: If mteb is not installed, an argument is invalid, or a data set cannot be downloaded.
    """
    mteb = _import_mteb()
    found = find_tasks(tasks)
    find_tasks(name for name in instructions or {})
    revision = None
    cache = None
    if results_folder is not None:
        try:
            cache = mteb.ResultCache(results_folder)
        except OSError as error:
            raise UserError(f"{results_folder}: cannot be created: {error.strerror}") from error
        revision = _fingerprint(embedder, query_prompt, instructions, mteb.__version__)
    encoder = MtebEncoder(
        embedder, query_prompt=query_prompt, instructions=instructions, name=model_name, revision=revision
    )
    console = log_console()
    scores = []
    for number, task in enumerate(found, 1):
        name = task.metadata.name
        console.print(f"{name} ({number} of {len(found)})", highlight=False)
        result = _evaluate(encoder, task, cache, batch_size)
        # A correlation with constant similarities is undefined.
        value = float(np.nan_to_num(result.get_score()))
        scores.append(MtebScore(name, task.metadata.type, task.metadata.main_score, value))
        console.print(f"{name}: {task.metadata.main_score} {100 * value:.2f}", highlight=False)
    return MtebResults(model_name, tuple(scores))


def mteb_table(results: MtebResults) -> tuple[Table, dict[str, float]]:
    """Summarizes results as in the published tables.

    Returns:
      A table, which also has the published scores of Youtu-Embedding if `results` has all tasks of CMTEB; and the
      scores in percent by column: the mean of each type of task, the mean of all tasks, and that of all types.
    """
    by_type: dict[str, list[float]] = {}
    for score in results.scores:
        by_type.setdefault(score.type, []).append(100 * score.value)
    figures = {
        COLUMNS.get(task_type, task_type): float(np.mean(by_type[task_type]))
        for task_type in sorted(by_type, key=[*COLUMNS, *by_type].index)
    }
    figures |= {
        "Mean(Task)": float(np.mean([100 * score.value for score in results.scores])),
        "Mean(Type)": float(np.mean(list(figures.values()))),
    }
    table = Table("Model", "Tasks")
    for column in figures:
        table.add_column(column, justify="right")
    rows = {results.model: figures}
    if {score.task for score in results.scores} == {task.metadata.name for task in find_tasks([CMTEB])}:
        rows |= {"Youtu-Embedding-V1 (published)": PUBLISHED_CMTEB}
    for model, row in rows.items():
        table.add_row(Text(model), str(len(results.scores)), *(f"{row[column]:.2f}" for column in figures))
    return table, figures


def _import_mteb() -> ModuleType:
    try:
        import mteb  # imports PyTorch, and is not needed otherwise
    except ImportError as error:
        raise UserError(f'mteb cannot be imported ({error}); pip install "codiemb-jax[mteb]"') from error
    except OSError as error:  # it creates its cache when it is imported
        raise UserError(f"mteb cannot be imported ({error}); set MTEB_CACHE to a folder that can be written") from error
    return mteb


def _instruction_of(task_metadata: Any, registered: Mapping[str, Any]) -> str | None:
    """Returns the instruction of a task, from the registry's instructions or the task's own."""
    for instruction in (registered.get(task_metadata.name), task_metadata.prompt):
        if isinstance(instruction, Mapping):
            instruction = instruction.get("query")
        if instruction:
            return instruction
    return None


def _fingerprint(
    embedder: Embedder, query_prompt: str | None, instructions: Mapping[str, str] | None, version: str
) -> str:
    """Returns a digest of everything but the data that results depend on. Equal weights give equal embeddings."""
    settings = [embedder.prompts, embedder.max_seq_length, query_prompt, dict(instructions or {}), version]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(embedder.encode_query(_PROBES).tobytes())
    return digest.hexdigest()[:16]


def _evaluate(encoder: MtebEncoder, task: "AbsTask", cache: Any, batch_size: int) -> Any:
    """Returns mteb's result of a task."""
    import mteb

    name = task.metadata.name
    try:
        if cache is not None:
            cache.load_task_result(name, encoder.mteb_model_meta)
    except Exception as error:  # of many types
        path = cache.get_task_result_path(name, encoder.mteb_model_meta)
        raise UserError(f"{path}: not a result of mteb; remove it to evaluate the task again") from error
    try:
        results = mteb.evaluate(
            encoder,
            task,
            cache=cache,
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size},
            show_progress_bar=False,
        )
    except Exception as error:
        members = getattr(task.metadata, "tasks", [task])  # of a task that consists of others
        if isinstance(error, UserError) or any(member.data_loaded for member in members):
            raise
        raise UserError(f"{name}: its data set cannot be downloaded: {shorten(str(error), 300)}") from error
    if results.exceptions:  # mteb only warns if a private data set cannot be read
        raise UserError(f"{name}: its data set cannot be downloaded: {shorten(results.exceptions[0].exception, 300)}")
    return results.task_results[0]
