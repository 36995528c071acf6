"""Runs the programs in examples/ on the model of the quickstart, and compares their outputs with the documentation.

    CODIEMB_JAX_WRITE_EXAMPLES=1 pytest tests/test_examples.py

writes the outputs into docs/guides/use.md instead.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from codiemb_jax import Embedder
from codiemb_jax.train import main as train
from tests.conftest import REPOSITORY, create_once
from tests.helpers import sentence_transformer

EXAMPLES = REPOSITORY / "examples"
PAGE = REPOSITORY / "docs" / "guides" / "use.md"
NAMES = ["embedder", "sentence_transformers_search", "transformers_only", "langchain_faiss", "llamaindex_faiss"]
PACKAGES = ("langchain_community", "llama_index", "faiss")


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """The export of the quickstart."""

    def create(folder: Path) -> None:
        flags = ["--evaluation.ir", "[]", "--evaluation.sts", "[]"]
        train(["--config", "quickstart", "--output_dir", str(folder / "run"), *flags])

    return create_once(tmp_path_factory, "quickstart", create) / "run" / "export"


def test_all_examples_are_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NAMES)
    assert all(importlib.util.find_spec(name) for name in PACKAGES)


def split_numbers(output: str) -> tuple[str, list[float]]:
    """Returns a text without its cosines, and the cosines."""
    pattern = r"-?\d\.\d\d\b"
    return re.sub(pattern, "#", output), [float(number) for number in re.findall(pattern, output)]


@pytest.mark.parametrize("name", NAMES)
def test_output_is_as_documented(name, export):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), str(export)]
    # One CPU device, and no telemetry or download.
    environment = os.environ | {"XLA_FLAGS": "", "HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    page = PAGE.read_text()
    marker = f"<!-- output of {name}.py -->\n```text\n"
    before, _, rest = page.partition(marker)
    documented, end, after = rest.partition("```\n")
    if os.environ.get("CODIEMB_JAX_WRITE_EXAMPLES"):
        PAGE.write_text(before + marker + result.stdout + end + after)
        return
    text, numbers = split_numbers(result.stdout)
    expected_text, expected_numbers = split_numbers(documented)
    assert text == expected_text
    assert len(numbers) == 6
    assert numbers == pytest.approx(expected_numbers, abs=0.02)  # training rounds differently on other machines


def load(name: str) -> ModuleType:
    """Imports an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_vectors_agree(export):
    """Embedder, sentence-transformers, transformers, LangChain and LlamaIndex, on texts of both languages."""
    queries = ["I forgot my password, what can I do?", "羽毛球双打发球有什么规定", "jet lag"]
    documents = ["Light at the right hour helps.", "发球员站在发球区内。" * 3, "x"]
    model = Embedder.from_pretrained(str(export))
    expected = [model.encode_query(queries), model.encode_document(documents)]
    peer = sentence_transformer(export)
    encoder = load("transformers_only").Encoder(str(export))
    langchain = load("langchain_faiss").ExportEmbeddings(str(export))
    llama = load("llamaindex_faiss").ExportEmbedding(str(export))
    found = {
        "sentence-transformers": [peer.encode_query(queries), peer.encode_document(documents)],
        "transformers": [
            encoder.encode(queries, encoder.prompts["query"]).numpy(),
            encoder.encode(documents, encoder.prompts["document"]).numpy(),
        ],
        "LangChain": [[langchain.embed_query(query) for query in queries], langchain.embed_documents(documents)],
        "LlamaIndex": [
            [llama.get_query_embedding(query) for query in queries],
            llama.get_text_embedding_batch(documents),
        ],
    }
    for name, vectors in found.items():
        for actual, wanted in zip(vectors, expected, strict=True):
            array = np.asarray(actual, np.float64)
            cosines = (array * wanted).sum(1) / np.linalg.norm(array, axis=1) / np.linalg.norm(wanted, axis=1)
            assert cosines.min() > 0.99999, name
