"""Benchmarks the conversion of a random model with the full shape of Youtu-Embedding.

    pip install -e ".[test]" && python benchmarks/full_size.py --work models/full_size

Creates the model (2.41 B parameters, bfloat16, sharded) and converts it Hugging Face -> Orbax -> Hugging Face, each
step in its own process. Compares all weights bitwise, and the embeddings of a few texts with those of Qwen3 in
transformers. Reports seconds and peak memory. Needs 20 GB of disk, and 20 GB of memory (for transformers). An
existing random model in --work is reused; other outputs are overwritten.
"""

import argparse
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from child import run_measured
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
from codiemb_jax.text.rows import Texts, lay_out

TEXTS = (
    "what is the capital of France",
    "How do plants make sugar out of light, water and air?",
    "怎样更换自行车的内胎？",
)


def compare_bitwise(folder: Path, other: Path) -> int:
    """Checks that two folders have the same weights, names, dtypes and shapes; returns the number of weights."""
    first, second = WeightFiles(folder), WeightFiles(other)
    if first.dtypes != second.dtypes or first.shapes != second.shapes:
        sys.exit("names, dtypes or shapes differ")
    for name in first.dtypes:
        if first.read(name).tobytes() != second.read(name).tobytes():
            sys.exit(f"{name} differs")
    return len(first.dtypes)


def smallest_cosine(checkpoint: Path, export: Path) -> float:
    """Returns the smallest cosine between embeddings of the checkpoint and of its export in transformers."""
    settings = ModelSettings(path=str(checkpoint), compute_dtype="float32", param_dtype="bfloat16")
    model = open_model(settings, PromptSettings(), make_mesh(MeshSettings()))
    tokens = PromptTokenizer(model.blueprint.tokenizer(), PromptSettings()).tokenize_queries(
        [Triple("Find the answer", "", text) for text in TEXTS], 512
    )
    rows, _ = lay_out(Texts.join(tokens), np.arange(len(tokens)), len(tokens), max(text.ids.size for text in tokens))
    actual = np.asarray(jax.jit(lambda params: embed(nnx.merge(model.graph, params), rows))(model.load()), np.float64)
    jax.clear_caches()
    qwen3 = AutoModel.from_pretrained(export, dtype=torch.float32).eval()
    with torch.no_grad():
        mask = torch.from_numpy(rows.segment_ids).long()
        states = qwen3(torch.from_numpy(rows.tokens).long(), attention_mask=mask).last_hidden_state.double().numpy()
    expected = np.einsum("rt,rtd->rd", rows.pooling_mask, states)
    norms = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.min(np.sum(actual * expected, axis=1) / norms))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the models")
    parser.add_argument("--shape", default="youtu_embedding", help="file in codiemb_jax/shapes (default: %(default)s)")
    options = parser.parse_args()
    work = options.work
    original, orbax, exported, stock = (work / name for name in ("hf", "orbax", "back", "stock"))
    for folder in (orbax, exported, stock):
        shutil.rmtree(folder, ignore_errors=True)
    if not original.exists():
        script = Path(__file__).parent.parent / "scripts" / "make_random_checkpoint.py"
        run_measured([sys.executable, script, "--shape", options.shape, "--output", original])
    size = sum(path.stat().st_size for path in original.glob("*.safetensors")) / 1e9
    table = Table("step", "seconds", "peak memory (GB)", "peak memory / checkpoint size")
    steps = {
        "HF -> Orbax": ("convert.hf_to_orbax", "--model", original, "--output", orbax),
        "Orbax -> HF": ("convert.orbax_to_hf", "--checkpoint", orbax, "--output", exported),
        "Orbax -> HF, stock": (
            "convert.orbax_to_hf", "--checkpoint", orbax, "--output", stock, "--architecture", "stock",
        ),
    }  # fmt: skip
    for name, command in steps.items():
        usage = run_measured([sys.executable, "-m", *command])
        memory = usage.peak_mb * (1 << 20) / 1e9
        table.add_row(name, f"{usage.seconds:.0f}", f"{memory:.2f}", f"{memory / size:.2f}")
    console = Console()
    console.print(f"checkpoint: {size:.2f} GB in {len(list(original.glob('*.safetensors')))} files")
    console.print(table)
    console.print(f"{compare_bitwise(original, exported)} weights are bitwise equal")
    console.print(f"smallest cosine with transformers over {len(TEXTS)} texts: {smallest_cosine(orbax, stock):.7f}")


if __name__ == "__main__":
    main()
