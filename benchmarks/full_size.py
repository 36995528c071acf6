"""A random model of Youtu-Embedding's true shape, there and back: bits, seconds, memory, and vectors.

    pip install -e ".[test]" && python benchmarks/full_size.py --work models/full_size

Makes the model (2.41 B parameters, bfloat16, in shards), converts it Hugging Face -> Orbax -> Hugging Face, each in
a process of its own, compares all weights bit by bit, and a few texts' vectors with those of transformers' Qwen3.
Needs 20 GB of disk and 20 GB of memory; the memory is transformers'.  What an earlier try left is made anew, but for
the random model.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

from codiemb_jax.checkpoints.model import open_model
from codiemb_jax.checkpoints.safetensors import WeightFiles
from codiemb_jax.config import MeshSettings, ModelSettings, PromptSettings
from codiemb_jax.models.embed import embed
from codiemb_jax.sharding import make_mesh
from codiemb_jax.text.prompts import PromptTokenizer
from codiemb_jax.text.records import Triple
from codiemb_jax.text.rows import pad

TEXTS = (
    "what is the capital of France",
    "How do plants make sugar out of light, water and air?",
    "怎样更换自行车的内胎？",
)


def measured(*command: str) -> tuple[float, float]:
    """Seconds and the largest resident memory, in GB, of a command."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def bitwise(one: Path, other: Path) -> int:
    """Number of weights, all equal in name, type, shape and bits."""
    first, second = WeightFiles(one), WeightFiles(other)
    if first.dtypes != second.dtypes or first.shapes != second.shapes:
        sys.exit("names, types or shapes differ")
    for name in first.dtypes:
        if first.read(name).tobytes() != second.read(name).tobytes():
            sys.exit(f"{name} differs")
    return len(first.dtypes)


def worst_cosine(checkpoint: Path, stock: Path) -> float:
    """Of the texts' vectors, ours of the checkpoint and those of transformers of the exported folder."""
    settings = ModelSettings(path=str(checkpoint), compute_dtype="float32", param_dtype="bfloat16")
    model = open_model(settings, PromptSettings(), make_mesh(MeshSettings()))
    tokens = PromptTokenizer(model.blueprint.tokenizer(), PromptSettings()).tokenize_queries(
        [Triple("Find the answer", "", text) for text in TEXTS], 512
    )
    rows = pad(tokens, max(text.ids.size for text in tokens))
    ours = np.asarray(jax.jit(lambda params: embed(nnx.merge(model.graph, params), rows))(model.load()), np.float64)
    jax.clear_caches()
    qwen3 = AutoModel.from_pretrained(stock, dtype=torch.float32).eval()
    with torch.no_grad():
        mask = torch.from_numpy(rows.segment_ids).long()
        states = qwen3(torch.from_numpy(rows.tokens).long(), attention_mask=mask).last_hidden_state.double().numpy()
    theirs = np.einsum("rt,rtd->rd", rows.pooling_mask, states)
    return float(np.min(np.sum(ours * theirs, 1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the models")
    parser.add_argument("--shape", default="youtu_embedding")
    work = parser.parse_args().work
    came, orbax, went, stock = (work / name for name in ("hf", "orbax", "back", "stock"))
    for folder in (orbax, went, stock):
        shutil.rmtree(folder, ignore_errors=True)
    if not came.exists():
        measured("scripts/make_random_checkpoint.py", "--shape", parser.parse_args().shape, "--output", str(came))
    size = sum(path.stat().st_size for path in came.glob("*.safetensors")) / 1e9
    table = Table("step", "seconds", "peak memory, GB", "of the checkpoint's bytes")
    steps = {
        "HF -> Orbax": ("convert.hf_to_orbax", "--model", str(came), "--output", str(orbax)),
        "Orbax -> HF": ("convert.orbax_to_hf", "--checkpoint", str(orbax), "--output", str(went)),
        "Orbax -> HF, stock": (
            "convert.orbax_to_hf", "--checkpoint", str(orbax), "--output", str(stock), "--architecture", "stock",
        ),
    }  # fmt: skip
    for name, command in steps.items():
        seconds, memory = measured("-m", *command)
        table.add_row(name, f"{seconds:.0f}", f"{memory:.2f}", f"{memory / size:.2f}")
    console = Console()
    console.print(f"checkpoint: {size:.2f} GB in {len(list(came.glob('*.safetensors')))} files")
    console.print(table)
    console.print(f"{bitwise(came, went)} weights, bit by bit the same")
    console.print(f"worst cosine with transformers over {len(TEXTS)} texts: {worst_cosine(orbax, stock):.7f}")


if __name__ == "__main__":
    main()
