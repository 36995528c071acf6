"""Searches documents with the Embedder of this project, on all devices.

python examples/embedder.py runs/quickstart/export
"""

import sys

from codiemb_jax import Embedder

QUESTIONS = ["I forgot my password, what can I do?", "Why does water boil faster in the mountains?"]
DOCUMENTS = [
    "On Sundays the shop is open from ten to four, and on public holidays it stays closed.",
    "Forgotten passwords can be reset with the link on the sign-in page.",
    "Water boils at a lower temperature on high mountains, because the air pressure is lower there.",
]


def main(model_path: str) -> None:
    model = Embedder.from_pretrained(model_path)
    questions = model.encode_query(QUESTIONS)
    documents = model.encode_document(DOCUMENTS)
    for question, scores in zip(QUESTIONS, model.similarity(questions, documents), strict=True):
        print(question)
        for i in (-scores).argsort():
            print(f"  {scores[i]:.2f}  {DOCUMENTS[i]}")


if __name__ == "__main__":
    main(sys.argv[1])
