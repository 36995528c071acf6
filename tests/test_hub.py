"""Tests of uploads to the Hugging Face Hub, against a stand-in: only on request, and a refusal loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from codiemb_jax.errors import UserError
from tests.helpers import golden_settings, read_files, run
from tests.hub_stand_in import Hub, running_hub


def train(hub: Hub, golden: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Trains for a step with the stand-in as the Hub."""
    settings = golden_settings(
        golden, folder / "run", data={"ir": [str(golden / "data" / "news.jsonl")]}, optimizer={"max_steps": 1}
    )
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(settings))
    environment = os.environ | {
        "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hub"),
        "CODIEMB_JAX_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "codiemb_jax.train", "--config", str(config), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_export_is_uploaded_if_asked(golden, tmp_path):
    with running_hub() as hub:
        plain = train(hub, golden, tmp_path)
        assert (plain.returncode, hub.created, hub.commits) == (0, [], []), plain.stderr
        hub.refuse = "/commit/main"
        refused = train(hub, golden, tmp_path, "--push_to_hub", "me/faq-model")
        assert refused.returncode == 2
        export = tmp_path / "run" / "export"
        assert "error: push_to_hub: me/faq-model cannot be written" in refused.stderr
        assert "You have no permission to write here." in refused.stderr
        assert f"{export} is complete; run the same command again to upload it" in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.stderr
        hub.refuse = None
        done = train(hub, golden, tmp_path, "--push_to_hub", "me/faq-model")
        assert done.returncode == 0, done.stderr
        assert [(entry["name"], entry["organization"], entry["visibility"]) for entry in hub.created] == [
            ("faq-model", "me", "private")
        ] * 2  # at each start
        assert hub.commits == [read_files(export)]
        hub.files = ["README.md", "model-00001-of-00002.safetensors", "model.safetensors", "onnx/model.safetensors"]
        done = train(hub, golden, tmp_path, "--push_to_hub", "me/faq-model")
        assert done.returncode == 0, done.stderr
        # The weights of an earlier model would be loaded as well, or instead.
        assert hub.commits[1] == read_files(export) | {"model-00001-of-00002.safetensors": None}


def test_refused_repository_ends_the_run_before_it_starts(golden, tmp_path):
    with running_hub() as hub:
        hub.refuse = "/create"
        refused = train(hub, golden, tmp_path, "--push_to_hub", "them/model")
    assert refused.returncode == 2
    assert "error: push_to_hub: them/model cannot be created" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "me/a b", "", "me/" + "x" * 100, "me/a--b", "me/-x", "me/x.git", "me/模型"]
)
def test_invalid_name_is_named(name, golden, tmp_path):
    with pytest.raises(UserError, match="--push_to_hub: (must be the name of a repository|String should have at most)"):
        run(golden_settings(golden, tmp_path / "run"), tmp_path, "--push_to_hub", name)
