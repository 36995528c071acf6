"""Searches documents with sentence-transformers.

pip install "sentence-transformers>=5.1" "transformers>=5.2"
python examples/sentence_transformers_search.py runs/quickstart/export
"""

import sys

from sentence_transformers import SentenceTransformer

QUESTIONS = ["I forgot my password, what can I do?", "Why does water boil faster in the mountains?"]
DOCUMENTS = [
    "On Sundays the shop is open from ten to four, and on public holidays it stays closed.",
    "Forgotten passwords can be reset with the link on the sign-in page.",
    "Water boils at a lower temperature on high mountains, because the air pressure is lower there.",
]


def main(model_path: str) -> None:
    model = SentenceTransformer(model_path)
    questions = model.encode_query(QUESTIONS)
    documents = model.encode_document(DOCUMENTS)
    for question, scores in zip(QUESTIONS, model.similarity(questions, documents), strict=True):
        print(question)
        for i in scores.argsort(descending=True):
            print(f"  {scores[i]:.2f}  {DOCUMENTS[i]}")


if __name__ == "__main__":
    main(sys.argv[1])
