"""Benchmarks encoding against sentence-transformers, with the same folder and the same texts.

    pip install -e ".[test,benchmark]" && python benchmarks/encoding.py --work models/benchmark

Texts have lengths like those of news stories, 250 tokens on average and 1,000 at most, cut to --max-tokens; with
--equal, all have --max-tokens. Both encode with their defaults, each in its own process, and they alternate. Each
process encodes all texts twice, so that compilation is not counted. Reports texts and tokens per second, the spread
over rounds, and the largest difference between the embeddings. "of limit" is the rate of the operations that the texts
need, as a share of the rate of plain matrix multiplications of the model's shapes, measured in each round.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from inputs import passage_lengths, random_texts, write_model
from limit import ENCODER_TYPES, jax_rate, needed_flops, peak_flops
from rich.console import Console
from rich.table import Table


def write_texts(path: Path, model: Path, texts: int, max_tokens: int, equal: bool) -> None:
    random = np.random.default_rng(0)
    lengths = np.full(texts, 1.5 * max_tokens) if equal else passage_lengths(random, (texts,), 1000)
    path.write_text(json.dumps(random_texts(random, model, lengths)), encoding="utf-8")


def write_folder(model: Path, folder: Path, max_tokens: int) -> None:
    """Writes a folder for sentence-transformers with the weights of a Hugging Face folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(model), max_seq_length=max_tokens, model_kwargs={"dtype": "float32"})
    modules = [transformer, Pooling(transformer.get_embedding_dimension()), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))


def run_codiemb_jax(options: argparse.Namespace, texts: list[str]) -> tuple[np.ndarray, list[float]]:
    from codiemb_jax import Embedder

    model = Embedder.from_pretrained(options.folder, dtype=options.dtype)
    return _encode_twice(model, texts)


def run_sentence_transformers(options: argparse.Namespace, texts: list[str]) -> tuple[np.ndarray, list[float]]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(options.folder), model_kwargs={"dtype": options.dtype})
    return _encode_twice(model, texts)


def _encode_twice(model: Any, texts: list[str]) -> tuple[np.ndarray, list[float]]:
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        embeddings = model.encode(texts, show_progress_bar=False)
        seconds.append(time.perf_counter() - start)
    return embeddings, seconds


ENCODERS = {"codiemb_jax": run_codiemb_jax, "sentence-transformers": run_sentence_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the model and the texts")
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder (default: a random decoder)")
    parser.add_argument("--max-tokens", type=int, default=512, help="maximum length of a text (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=256, help="number of texts (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--equal", action="store_true", help="make all texts as long as --max-tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of computation")
    parser.add_argument("--encoder", choices=ENCODERS, help="run only this encoder, in this process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    options.model = options.model or options.work / "decoder"
    options.folder = options.work / "encoder"
    if options.encoder:
        texts = json.loads((options.work / "texts.json").read_text(encoding="utf-8"))
        embeddings, seconds = ENCODERS[options.encoder](options, texts)
        np.save(options.work / "embeddings.npy", embeddings)
        options.json.write_text(json.dumps(seconds))
        return

    from transformers import AutoTokenizer

    options.work.mkdir(parents=True, exist_ok=True)
    if not options.model.exists():
        write_model(options.model)
    shutil.rmtree(options.folder, ignore_errors=True)
    write_folder(options.model, options.folder, options.max_tokens)
    write_texts(options.work / "texts.json", options.model, options.texts, options.max_tokens, options.equal)
    texts = json.loads((options.work / "texts.json").read_text(encoding="utf-8"))
    encoded = AutoTokenizer.from_pretrained(options.model)(texts, truncation=True, max_length=options.max_tokens)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    config = json.loads((options.model / "config.json").read_text())
    flops = needed_flops(config, lengths, causal=config["model_type"] not in ENCODER_TYPES, training=False)

    seconds: dict[str, list[float]] = {name: [] for name in ENCODERS}
    embeddings, rates = {}, []
    for _ in range(options.rounds):
        for name in ENCODERS:
            output = options.work / "seconds.json"
            command = [sys.executable, __file__, *sys.argv[1:], "--encoder", name, "--json", str(output)]
            subprocess.run(command, check=True)
            seconds[name].append(json.loads(output.read_text())[-1])
            embeddings[name] = np.load(options.work / "embeddings.npy")
        rates.append(jax_rate(options.model, min(int(lengths.sum()), 8192), options.dtype))
    difference = float(np.abs(embeddings["codiemb_jax"] - embeddings["sentence-transformers"]).max())
    table = Table("encoder", "texts/s", "tokens/s", "rounds (texts/s)", "ratio", "of limit", "MFU")
    results = {}
    for name, measured in seconds.items():
        median = float(np.median(measured))
        results[name] = {
            "texts_per_second": len(texts) / median, "tokens_per_second": lengths.sum() / median,
            "ratio": float(np.median(seconds["sentence-transformers"])) / median,
            "of_limit": flops / median / float(np.median(rates)),
            "mfu": flops / median / peak if (peak := peak_flops()) else None, "seconds": measured,
        }  # fmt: skip
        result = results[name]
        table.add_row(
            name, f"{result['texts_per_second']:.1f}", f"{result['tokens_per_second']:,.0f}",
            f"{len(texts) / max(measured):.1f} to {len(texts) / min(measured):.1f}", f"{result['ratio']:.2f}",
            f"{result['of_limit']:.0%}", f"{result['mfu']:.1%}" if result["mfu"] else "-",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"largest difference of embeddings: {difference:.1e}")
    console.print(f"matrix products: {min(rates) / 1e9:,.0f} to {max(rates) / 1e9:,.0f} GFLOP/s")
    if options.json:
        options.json.write_text(json.dumps({"results": results, "rates": rates, "difference": difference}) + "\n")


if __name__ == "__main__":
    main()
