"""Searches documents with LlamaIndex and FAISS.

pip install llama-index-core llama-index-vector-stores-faiss faiss-cpu sentence-transformers "transformers>=5.2"
python examples/llamaindex_faiss.py runs/quickstart/export
"""

import sys
from typing import Any

import faiss
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import TextNode
from llama_index.vector_stores.faiss import FaissVectorStore
from pydantic import PrivateAttr
from sentence_transformers import SentenceTransformer

QUESTIONS = ["I forgot my password, what can I do?", "Why does water boil faster in the mountains?"]
DOCUMENTS = [
    "On Sundays the shop is open from ten to four, and on public holidays it stays closed.",
    "Forgotten passwords can be reset with the link on the sign-in page.",
    "Water boils at a lower temperature on high mountains, because the air pressure is lower there.",
]


class ExportEmbedding(BaseEmbedding):
    """Queries and documents get the prompts of the model."""

    _model: SentenceTransformer = PrivateAttr()

    def __init__(self, model_path: str, **kwargs: Any):
        super().__init__(model_name=model_path, **kwargs)
        self._model = SentenceTransformer(model_path)  # or Embedder.from_pretrained of codiemb_jax

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._model.encode_query(query).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._model.encode_document(text).tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode_document(texts).tolist()


def main(model_path: str) -> None:
    embedding = ExportEmbedding(model_path)
    dimension = len(embedding.get_query_embedding("any text"))
    store = FaissVectorStore(faiss_index=faiss.IndexFlatIP(dimension))  # inner product of unit vectors: cosine
    index = VectorStoreIndex(
        nodes=[TextNode(text=document) for document in DOCUMENTS],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=embedding,
    )
    retriever = index.as_retriever(similarity_top_k=3)
    for question in QUESTIONS:
        print(question)
        for found in retriever.retrieve(question):
            print(f"  {found.score:.2f}  {found.text}")


if __name__ == "__main__":
    main(sys.argv[1])
