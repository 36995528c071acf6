"""Benchmarks training steps against two PyTorch trainers, with the same weights and the same batches.

    pip install -e ".[test,benchmark]" && python benchmarks/training.py --work models/benchmark

The trainers are this project with packing and with padding, sentence-transformers (MultipleNegativesRankingLoss), and a
plain loop around a transformers model (batches padded to their longest text, AdamW). Each runs in its own process, and
they alternate. An example is a query, a passage that answers it and a hard negative, with lengths like those of news
stories: about 40 tokens per query, and passages of 250 on average and 1,000 at most. --equal makes all texts equally
long. All use the GPU if there is one; there, --dtype bfloat16 is mixed precision with float32 weights.

Reports tokens per second without padding: the median over the steps, and the spread over rounds. The first two steps,
and those that compile, are not counted. "of limit" is the rate of the operations that the texts need, without padding
or recomputation, as a share of the rate of plain matrix multiplications of the model's shapes, measured in each
round. On a known GPU, MFU is the same as a share of its peak.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from inputs import passage_lengths, query_lengths, random_texts, write_model
from limit import ENCODER_TYPES, jax_rate, needed_flops, peak_flops, processor, torch_rate
from rich.console import Console
from rich.table import Table

TEMPERATURE, LEARNING_RATE = 0.02, 1e-5
BASELINE = "transformers"
LIMIT, TORCH_LIMIT = "limit", "PyTorch's limit"
"""Measured like trainers, in processes of their own."""
WARMUP_STEPS = 2
"""The first steps fill caches, and are not counted."""


def write_data(path: Path, model: Path, examples: int, max_tokens: int, equal: bool) -> None:
    """Writes examples of a query, a positive and a negative."""
    random = np.random.default_rng(0)
    lengths = np.hstack([query_lengths(random, (examples, 1), 1000), passage_lengths(random, (examples, 2), 1000)])
    if equal:
        lengths[:] = 1.5 * max_tokens  # all are truncated
    texts = iter(random_texts(random, model, lengths.ravel()))
    with path.open("w", encoding="utf-8") as file:
        for query, positive, negative in zip(texts, texts, texts, strict=True):
            record = {"task_type": "ir", "query": ["", "", query], "positives": [["", "", positive]]}
            file.write(json.dumps(record | {"negatives": [["", "", negative]]}) + "\n")


def settings(options: argparse.Namespace, output: Path, packing: bool) -> dict[str, Any]:
    config = json.loads((options.model / "config.json").read_text())
    prompt = {"query": "", "passage": ""}
    is_encoder = config["model_type"] in ENCODER_TYPES
    if is_encoder:
        prompt["begin"], prompt["end"] = ("[CLS]", "[SEP]") if config["model_type"] == "bert" else ("<s>", "</s>")
    return {
        "output_dir": str(output),
        "model": {
            "path": str(options.model), "attention": "bidirectional" if is_encoder else "causal",
            "compute_dtype": options.dtype, "dropout": 0.0,
        },
        "prompt": prompt | {"include_in_pooling": True},
        "data": {
            "ir": [str(options.work / "data.jsonl")], "ir_global_batch_size": options.queries,
            "positives_per_query": 1, "negatives_per_query": 1,
            "query_max_tokens": options.max_tokens, "passage_max_tokens": options.max_tokens, "packing": packing,
            "row_tokens": options.row_tokens if packing else None,
        },
        "objective": {"temperature": TEMPERATURE},
        "optimizer": {
            "learning_rate": LEARNING_RATE, "warmup_steps": 0, "max_steps": options.steps, "schedule": "constant",
        },
        "export": False,
    }  # fmt: skip


def batches(options: argparse.Namespace) -> Iterator[tuple[list[int], list[list[list[int]]]]]:
    """Yields the examples of each step, and the token ids of their queries, positives and negatives."""
    from codiemb_jax.config import Settings
    from codiemb_jax.training.run import open_run, open_training_model

    run = open_run(open_training_model(Settings.model_validate(settings(options, options.work / "unused", False))))
    for number in range(options.steps):
        plan = run.plan.step(number)
        texts, queries = run.datasets[0].read(plan.examples)
        ids = [text.ids.tolist() for text in texts.split()]
        yield plan.examples.tolist(), [[ids[query + i] for query in queries] for i in range(3)]


def run_codiemb_jax(options: argparse.Namespace, packing: bool) -> dict[str, Any]:
    """Runs the training program and returns the metrics that it logs."""
    import tempfile

    import yaml

    from codiemb_jax.train import main as train

    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        config = Path(folder) / "settings.yaml"
        config.write_text(yaml.safe_dump(settings(options, Path(folder) / "run", packing)))
        train(["--config", str(config)])
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "loss": lines[0]["loss"],
        **{name: [line[name] for line in lines] for name in ("seconds", "tokens", "computed_tokens")},
    }


def run_transformers(options: argparse.Namespace) -> dict[str, Any]:
    """Runs a plain PyTorch loop."""
    import time

    import torch
    from transformers import AutoModel

    steps = [texts for _, texts in batches(options)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32).to(device)
    model.eval()  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def embed(texts: list[list[int]]) -> tuple[torch.Tensor, int]:
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=device)
        with torch.autocast(device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        pooled = (states.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(pooled, dim=1), ids.numel()

    losses, seconds, computed = [], [], []
    for queries, positives, negatives in steps:
        start = time.perf_counter()
        query, query_tokens = embed(queries)
        passage, passage_tokens = embed(positives + negatives)
        loss = torch.nn.functional.cross_entropy(
            query @ passage.T / TEMPERATURE, torch.arange(len(queries), device=device)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        computed.append(query_tokens + passage_tokens)
    tokens = [sum(len(text) for texts in step for text in texts) for step in steps]
    return {"loss": losses[0], "seconds": seconds, "tokens": tokens, "computed_tokens": computed}


def run_sentence_transformers(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the trainer of sentence-transformers on the texts of the same batches."""
    import tempfile
    import time

    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from torch.utils.data import BatchSampler, SequentialSampler
    from transformers import TrainerCallback

    records = [json.loads(line) for line in (options.work / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    planned = list(batches(options))
    order, steps = [i for examples, _ in planned for i in examples], [texts for _, texts in planned]
    columns = {
        "anchor": [records[i]["query"][2] for i in order],
        "positive": [records[i]["positives"][0][2] for i in order],
        "negative": [records[i]["negatives"][0][2] for i in order],
    }
    transformer = Transformer(str(options.model), max_seq_length=options.max_tokens, model_kwargs={"dtype": "float32"})
    transformer.modality_config.pop("message", None)  # no chat template around the texts
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension()), Normalize()],
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    for module in model.modules():  # without dropout
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder, per_device_train_batch_size=options.queries, max_steps=options.steps, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=not torch.cuda.is_available(), bf16=options.dtype == "bfloat16",
            disable_tqdm=True, dataloader_drop_last=True,
            batch_sampler=lambda data, batch_size, drop_last, **_: BatchSampler(
                SequentialSampler(data), batch_size, drop_last
            ),
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
        trainer = SentenceTransformerTrainer(
            model, arguments, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=[Clock()]
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    tokens = [sum(len(text) for texts in step for text in texts) for step in steps]
    computed = [sum(len(texts) * max(map(len, texts)) for texts in step) for step in steps]
    return {"loss": losses[0], "seconds": np.diff(ends).tolist(), "tokens": tokens, "computed_tokens": computed}


def run_limit(options: argparse.Namespace) -> dict[str, Any]:
    """Measures matrix products with as many tokens as a packed batch has, and counts what the texts need."""
    config = json.loads((options.model / "config.json").read_text())
    causal = config["model_type"] not in ENCODER_TYPES
    steps = [np.array([len(text) for part in texts for text in part]) for _, texts in batches(options)]
    tokens = int(np.median([lengths.sum() for lengths in steps]))
    return {
        "rate": jax_rate(options.model, tokens, options.dtype),
        "flops_per_token": float(
            np.median([
                needed_flops(config, lengths, causal=causal, training=True) / lengths.sum() for lengths in steps
            ])
        ),
        "peak": peak_flops(),
    }  # fmt: skip


def run_torch_limit(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the same matrix products with PyTorch."""
    tokens = int(np.median([sum(len(text) for part in texts for text in part) for _, texts in batches(options)]))
    return {"rate": torch_rate(options.model, tokens, options.dtype)}


TRAINERS = {
    "codiemb_jax, packed": lambda options: run_codiemb_jax(options, packing=True),
    "codiemb_jax, padded": lambda options: run_codiemb_jax(options, packing=False),
    BASELINE: run_transformers,
    "sentence-transformers": run_sentence_transformers,
    LIMIT: run_limit,
    TORCH_LIMIT: run_torch_limit,
}
TORCH = (BASELINE, "sentence-transformers", TORCH_LIMIT)
COMPARED = [name for name in TRAINERS if name not in (BASELINE, LIMIT, TORCH_LIMIT)]


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Runs a trainer in its own process."""
    output = options.work / "result.json"
    environment = dict(os.environ)
    if name in TORCH:  # JAX only plans the batches there, and must not take the memory of the GPU
        environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, __file__, *sys.argv[1:], "--trainer", name, "--json", str(output)]
    subprocess.run(command, check=True, env=environment)
    return json.loads(output.read_text())


def counted_steps(computed_tokens: list[int], compiles: bool) -> list[int]:
    """Returns the steps that count: those after the first two that do not compile, because their shape is not new."""
    steps = [
        step
        for step, number in enumerate(computed_tokens)
        if step >= WARMUP_STEPS and not (compiles and number not in computed_tokens[:step])
    ]
    if not steps:
        sys.exit("every step compiled, so there is nothing to measure; raise --steps")
    return steps


def summarize(name: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians over the steps of all rounds, and the range of the rounds' medians."""
    compiles = name.startswith("codiemb_jax")
    rates = [
        np.divide(result["tokens"], result["seconds"])[counted_steps(result["computed_tokens"], compiles)]
        for result in rounds
    ]
    medians = [float(np.median(rate)) for rate in rates]
    return {
        "first_loss": rounds[0]["loss"],
        "padding": 1 - sum(rounds[0]["tokens"]) / sum(rounds[0]["computed_tokens"]),
        "tokens_per_second": float(np.median(np.concatenate(rates))),
        "lowest_round": min(medians),
        "highest_round": max(medians),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the model and the data")
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face folder (default: a random decoder)")
    parser.add_argument("--max-tokens", type=int, default=512, help="maximum length of a text (default: %(default)s)")
    parser.add_argument("--row-tokens", type=int, metavar="N", help="tokens per packed row (default: --max-tokens)")
    parser.add_argument("--queries", type=int, default=16, help="queries per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps per round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)s)")
    parser.add_argument("--equal", action="store_true", help="make all texts as long as --max-tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of computation")
    parser.add_argument(
        "--compare", nargs="+", choices=COMPARED, default=COMPARED, metavar="NAME",
        help=f"trainers to compare with the plain loop, of {COMPARED} (default: all)",
    )  # fmt: skip
    parser.add_argument("--trainer", choices=TRAINERS, help="run only this trainer, in this process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args()
    if options.model is None:
        options.model = options.work / "decoder"
    if options.trainer:
        options.json.write_text(json.dumps(TRAINERS[options.trainer](options)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if not options.model.exists():
        write_model(options.model)
    write_data(
        options.work / "data.jsonl", options.model, options.queries * options.steps, options.max_tokens, options.equal
    )
    names = [name for name in TRAINERS if name not in COMPARED or name in options.compare]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            rounds[name].append(measure(options, name))
    limits, torch_limits = rounds.pop(LIMIT), rounds.pop(TORCH_LIMIT)
    limit = {name: float(np.median([limit[name] for limit in limits])) for name in ("rate", "flops_per_token")}
    peak = limits[0]["peak"]
    results = {name: summarize(name, results) for name, results in rounds.items()}
    baseline = results[BASELINE]
    table = Table("trainer", "first loss", "padding", "tokens/s", "rounds", "ratio", "1/(1-p)", "of limit", "MFU")
    for name, result in results.items():
        rate = result["tokens_per_second"] * limit["flops_per_token"]
        result |= {"of_limit": rate / limit["rate"], "mfu": rate / peak if peak else None}
        table.add_row(
            name, f"{result['first_loss']:.6f}", f"{result['padding']:.1%}", f"{result['tokens_per_second']:,.0f}",
            f"{result['lowest_round']:,.0f} to {result['highest_round']:,.0f}",
            f"{result['tokens_per_second'] / baseline['tokens_per_second']:.2f}", f"{1 / (1 - result['padding']):.2f}",
            f"{result['of_limit']:.0%}", f"{result['mfu']:.1%}" if peak else "-",
        )  # fmt: skip
    console = Console()
    console.print(table)
    for library, measured in (("JAX", limits), ("PyTorch", torch_limits)):
        rates = [round_["rate"] / 1e9 for round_ in measured]
        console.print(f"matrix products with {library}: {min(rates):,.0f} to {max(rates):,.0f} GFLOP/s")
    console.print(f"CPU: {processor()}")
    if options.json:
        content = {"results": results, "limit": limit, "rounds": rounds, "limits": limits, "torch_limits": torch_limits}
        options.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
