"""Searches documents with LangChain and FAISS.

pip install langchain-community faiss-cpu sentence-transformers "transformers>=5.2"
python examples/langchain_faiss.py runs/quickstart/export
"""

import sys

from langchain_community.vectorstores import FAISS
from langchain_community.vectorstores.utils import DistanceStrategy
from langchain_core.embeddings import Embeddings
from sentence_transformers import SentenceTransformer

QUESTIONS = ["I forgot my password, what can I do?", "Why does water boil faster in the mountains?"]
DOCUMENTS = [
    "On Sundays the shop is open from ten to four, and on public holidays it stays closed.",
    "Forgotten passwords can be reset with the link on the sign-in page.",
    "Water boils at a lower temperature on high mountains, because the air pressure is lower there.",
]


class ExportEmbeddings(Embeddings):
    """Queries and documents get the prompts of the model, unlike with a generic wrapper."""

    def __init__(self, model_path: str):
        self.model = SentenceTransformer(model_path)  # or Embedder.from_pretrained of codiemb_jax

    def embed_query(self, text: str) -> list[float]:
        return self.model.encode_query(text).tolist()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.model.encode_document(texts).tolist()


def main(model_path: str) -> None:
    embeddings = ExportEmbeddings(model_path)
    store = FAISS.from_texts(DOCUMENTS, embeddings, distance_strategy=DistanceStrategy.MAX_INNER_PRODUCT)
    for question in QUESTIONS:
        print(question)
        for document, score in store.similarity_search_with_score(question, k=3):
            print(f"  {score:.2f}  {document.page_content}")


if __name__ == "__main__":
    main(sys.argv[1])
