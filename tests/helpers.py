"""Shared by tests of several modules: settings, runs of the program, and folders compared."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from codiemb_jax.train import main as train

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def golden_settings(golden: Path, output_dir: Path, **sections: Any) -> dict[str, Any]:
    """Settings under which the golden trajectories were made, `sections` on top."""
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
    """Runs the training program; returns the lines of metrics.jsonl."""
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    train(["--config", str(config), *flags])
    return [json.loads(line) for line in (Path(settings["output_dir"]) / "metrics.jsonl").read_text().splitlines()]


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load_weights(folder: Path) -> dict[str, np.ndarray]:
    """All weights of a folder, whose files must not share a name."""
    loaded: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        assert not loaded.keys() & shard.keys()
        loaded |= shard
    return loaded


def assert_bitwise(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


def sentence_transformer(folder: Path) -> "SentenceTransformer":
    """A folder as sentence-transformers loads it, without remote code, in float32."""
    from sentence_transformers import SentenceTransformer  # slow to import, and most tests do without it

    return SentenceTransformer(
        str(folder), device="cpu", trust_remote_code=False, local_files_only=True, model_kwargs={"dtype": "float32"}
    )
