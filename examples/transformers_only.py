"""Searches documents with plain transformers: prompt, tokens, states, mean over the tokens after the prompt, norm.

For models with the default pooling: mean, without the prompt.

pip install "transformers>=5.2" torch
python examples/transformers_only.py runs/quickstart/export
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

QUESTIONS = ["I forgot my password, what can I do?", "Why does water boil faster in the mountains?"]
DOCUMENTS = [
    "On Sundays the shop is open from ten to four, and on public holidays it stays closed.",
    "Forgotten passwords can be reset with the link on the sign-in page.",
    "Water boils at a lower temperature on high mountains, because the air pressure is lower there.",
]


class Encoder:
    """The model of an export."""

    def __init__(self, model_path: str):
        self.prompts = json.loads((Path(model_path) / "config_sentence_transformers.json").read_text())["prompts"]
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.model = AutoModel.from_pretrained(model_path).eval()

    @torch.inference_mode()
    def encode(self, texts: list[str], prompt: str = "") -> torch.Tensor:
        """Returns unit vectors, [texts, dim]."""
        batch = self.tokenizer([prompt + text for text in texts], return_tensors="pt", padding=True, truncation=True)
        states = self.model(**batch).last_hidden_state
        prompt_tokens = len(self.tokenizer(prompt)["input_ids"]) if prompt else 0
        mask = batch["attention_mask"].clone()
        mask[:, :prompt_tokens] = 0
        vectors = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(vectors, dim=-1)


def main(model_path: str) -> None:
    encoder = Encoder(model_path)
    questions = encoder.encode(QUESTIONS, encoder.prompts["query"])
    documents = encoder.encode(DOCUMENTS, encoder.prompts["document"])
    for question, scores in zip(QUESTIONS, questions @ documents.T, strict=True):
        print(question)
        for i in scores.argsort(descending=True):
            print(f"  {scores[i]:.2f}  {DOCUMENTS[i]}")


if __name__ == "__main__":
    main(sys.argv[1])
