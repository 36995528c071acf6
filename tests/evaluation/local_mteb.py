"""Small tasks of each type in mteb, with data of their own."""

from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

TOPICS = {
    "bicycle": "wheel brake saddle chain pedal tube rim spoke",
    "kitchen": "oven flour butter sugar whisk bowl recipe dough",
    "garden": "rose soil seed shovel hedge lawn compost tulip",
    "office": "printer password email meeting desk report budget file",
}


def sentences(count: int, seed: int) -> tuple[list[str], list[int]]:
    """Returns sentences and the index of the topic of each."""
    rng = np.random.default_rng(seed)
    labels = [i % len(TOPICS) for i in range(count)]
    words = [words.split() for words in TOPICS.values()]
    texts = [
        "How do I use the {} with the {} and the {}?".format(*rng.choice(words[label], 3, replace=False))
        for label in labels
    ]
    return texts, labels


def pairs(count: int, seed: int) -> tuple[list[str], list[str], list[int]]:
    """Returns pairs of different sentences, and the number of words that both have, from 0 to 2."""
    rng = np.random.default_rng(seed)
    vocabulary = " ".join(TOPICS.values()).split()
    first, second, shared = [], [], []
    for _ in range(count):
        words = list(rng.choice(vocabulary, 6, replace=False))
        kept = int(rng.integers(3))
        first.append(f"The {words[0]} is next to the {words[1]} and the {words[2]}.")
        other = rng.permutation(words[:kept] + words[3 + kept :])
        second.append(f"The {other[0]} is next to the {other[1]} and the {other[2]}.")
        shared.append(kept)
    return first, second, shared


def metadata(task_type: str, main_score: str, prompt: Any) -> TaskMetadata:
    return TaskMetadata(
        name=f"Local{task_type}", type=task_type, main_score=main_score, prompt=prompt, description="A local task.",
        reference=None, dataset={"path": "local/none", "revision": "1"}, category="t2t", eval_splits=["test"],
        eval_langs=["eng-Latn"], date=None, domains=None, task_subtypes=None, license=None, modalities=["text"],
        annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation="",
    )  # fmt: skip


class LocalClassification(AbsTaskClassification):
    metadata = metadata("Classification", "accuracy", "Classify the topic of the question")
    n_experiments = 3

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = DatasetDict()
        for seed, split in enumerate(("train", "test")):
            texts, labels = sentences(60, seed)
            self.dataset[split] = Dataset.from_dict({"text": texts, "label": labels})
        self.data_loaded = True


class LocalClustering(AbsTaskClusteringLegacy):
    metadata = metadata("Clustering", "v_measure", "Identify the topic of the question")

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        texts, labels = sentences(48, 2)
        self.dataset = DatasetDict(test=Dataset.from_dict({"sentences": [texts], "labels": [labels]}))
        self.data_loaded = True


class LocalPairClassification(AbsTaskPairClassification):
    metadata = metadata("PairClassification", "max_ap", "Retrieve paraphrases")

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        first, second, shared = pairs(80, 3)
        columns = {"sentence1": first, "sentence2": second, "labels": [int(kept > 0) for kept in shared]}
        self.dataset = DatasetDict(test=Dataset.from_dict(columns))
        self.data_loaded = True


class LocalSTS(AbsTaskSTS):
    metadata = metadata("STS", "cosine_spearman", None)  # as those of CMTEB
    min_score, max_score = 0, 2

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        first, second, shared = pairs(80, 4)
        columns = {"sentence1": first, "sentence2": second, "score": [float(kept) for kept in shared]}
        self.dataset = DatasetDict(test=Dataset.from_dict(columns))
        self.data_loaded = True


def retrieval_data(*, reranking: bool) -> RetrievalSplitData:
    """Queries, and documents of which those with the same topic are relevant. Reranking ranks some of them."""
    queries, topics = sentences(12, 5)
    documents, labels = sentences(48, 6)
    query_ids, document_ids = ([f"{kind}{i}" for i in range(n)] for kind, n in (("q", 12), ("d", 48)))
    titles = ["" if i % 3 else "Manual" for i in range(48)]
    rng = np.random.default_rng(7)
    return RetrievalSplitData(
        queries=Dataset.from_dict({"id": query_ids, "text": queries}),
        corpus=Dataset.from_dict({"id": document_ids, "title": titles, "text": documents}),
        relevant_docs={
            query: {name: 1 for name, label in zip(document_ids, labels, strict=True) if label == topic}
            for query, topic in zip(query_ids, topics, strict=True)
        },
        top_ranked={q: [str(d) for d in rng.choice(document_ids, 30, replace=False)] for q in query_ids}
        if reranking
        else None,
    )


class LocalRetrieval(AbsTaskRetrieval):
    metadata = metadata("Retrieval", "ndcg_at_10", {"query": "Given a question, retrieve manuals"})

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = {"default": {"test": retrieval_data(reranking=False)}}
        self.data_loaded = True


class LocalReranking(AbsTaskRetrieval):
    metadata = metadata("Reranking", "map_at_1000", "Given a question, rank manuals")

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = {"default": {"test": retrieval_data(reranking=True)}}
        self.data_loaded = True


class LocalMissing(AbsTaskSTS):
    """Its data set must be downloaded."""

    metadata = metadata("STS", "cosine_spearman", None).model_copy(update={"name": "LocalMissing"})


TASKS = (
    LocalClassification,
    LocalClustering,
    LocalPairClassification,
    LocalReranking,
    LocalRetrieval,
    LocalSTS,
)
