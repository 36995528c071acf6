"""Helpers shared by tests: settings, training runs and comparison of folders."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from codiemb_jax.data.index import DTYPES, Index
from codiemb_jax.train import main as train

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def golden_settings(golden: Path, output_dir: Path, **sections: Any) -> dict[str, Any]:
    """Returns the settings of the golden trajectories, updated by `sections`."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "model": {"path": str(golden / "youtu_tiny")},
        "data": {
            "ir_global_batch_size": 8, "sts_global_batch_size": 16, "positives_per_query": 1,
            "negatives_per_query": 4, "query_max_tokens": 128, "passage_max_tokens": 128,
        },
        "objective": {"sts_list_size": None},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "max_steps": 8},
    }  # fmt: skip
    for name, section in sections.items():
        settings[name] = settings.get(name, {}) | section if isinstance(section, dict) else section
    return settings


def run(settings: dict[str, Any], folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Runs the training program and returns the lines of metrics.jsonl."""
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    train(["--config", str(config), *flags])
    return [json.loads(line) for line in (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()]


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_memory(index: Index) -> Index:
    """Returns the same index with arrays."""
    columns = {name: getattr(index, name) for name in DTYPES}
    return Index(**{name: column[np.arange(column.size)] for name, column in columns.items()}, folder=index.folder)


def load_weights(folder: Path) -> dict[str, np.ndarray]:
    """Loads the weights of all safetensors files in a folder."""
    weights: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        assert not weights.keys() & shard.keys()
        weights |= shard
    return weights


def assert_bitwise(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Asserts that names, dtypes, shapes and bits are equal."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert actual[name].shape == value.shape, name
        assert actual[name].tobytes() == value.tobytes(), name


def sentence_transformer(folder: Path) -> "SentenceTransformer":
    """Loads a folder with sentence-transformers in float32, without remote code."""
    from sentence_transformers import SentenceTransformer  # slow to import, and most tests do not need it

    return SentenceTransformer(
        str(folder), device="cpu", trust_remote_code=False, local_files_only=True, model_kwargs={"dtype": "float32"}
    )
