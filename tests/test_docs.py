"""Tests that commands, paths, links, settings and examples in the documentation are valid and that its Python runs."""

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from codiemb_jax import cli
from codiemb_jax.config import Settings
from codiemb_jax.config_file import find_config, load_settings
from codiemb_jax.embedder import Embedder
from codiemb_jax.text.records import read_records
from convert.hf_to_orbax import main as hf_to_orbax
from convert.orbax_to_hf import main as orbax_to_hf

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
FILE_EXTENSIONS = ("json", "jsonl", "md", "py", "safetensors", "yaml")
PATH = re.compile(r"(?<![\w/.])((?:configs|scripts|tests|benchmarks|codiemb_jax|convert)/[\w./-]*\w)")
USER_CONFIGS = ("mine.yaml",)


def read_text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_blocks(page: Path, language: str = "") -> list[str]:
    """Returns the code blocks of a language; blocks of commands have no language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", read_text(page), re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def commands(page: Path) -> list[list[str]]:
    """Returns the words of every command on a page."""
    lines = [line for block in code_blocks(page) for line in block.splitlines()]
    return [shlex.split(command) for line in lines for command in line.split("&&") if command.strip()]


def page_name(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


for_all_pages = pytest.mark.parametrize("page", PAGES, ids=page_name)


def for_pages_with(language: str, *names: str) -> pytest.MarkDecorator:
    """Parametrizes a test with the pages that have code blocks of a language, which must be those named."""
    pages = [page for page in PAGES if code_blocks(page, language)]
    assert [page_name(page) for page in pages] == list(names), language
    return pytest.mark.parametrize("page", pages, ids=page_name)


def test_settings_page_is_up_to_date():
    path = REPOSITORY / "scripts" / "make_settings_doc.py"
    spec = importlib.util.spec_from_file_location("make_settings_doc", path)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert read_text(script.TARGET) == script.document(), "run python scripts/make_settings_doc.py"


def test_readme_has_the_quickstart_and_test_commands():
    lines = read_text(README).splitlines()
    assert "pip install -e . && python -m codiemb_jax.train --config configs/quickstart.yaml" in lines
    assert 'pip install -e ".[test]" && pytest' in lines


def parse_program(words: list[str]) -> tuple[str, list[str]] | None:
    """Returns the `codiemb` subcommand that a command runs and its arguments; None for other programs."""
    modules = {module: name for name, (module, _) in cli.PROGRAMS.items()}
    if words[:2] == ["python", "-m"]:
        return modules[words[2]], words[3:]
    if words[0] == "codiemb":
        return words[1], words[2:]
    return None


@for_all_pages
def test_commands_are_valid(page):
    for words in commands(page):
        if words[0] == "pip":
            extras = re.search(r"\[([\w,]+)\]", words[-1])
            names = extras[1].split(",") if extras else []
            assert set(names) <= PROJECT["project"]["optional-dependencies"].keys(), words
        elif program := parse_program(words):
            name, arguments = program
            assert name in cli.PROGRAMS, words
            if name in ("train", "prepare"):
                check_train_arguments(arguments)
            elif name == "preflight":
                own = arguments.index("--topology") if "--topology" in arguments else len(arguments)
                check_train_arguments(arguments[:own] + arguments[own + 2 :])
            else:
                source = read_text(REPOSITORY / (cli.PROGRAMS[name][0].replace(".", "/") + ".py"))
                flags = [word for word in arguments if word.startswith("--")]
                assert flags and all(f'"{flag}"' in source for flag in flags), words
        elif words[:2] == ["python", "-c"]:
            ast.parse(words[2])
        elif words[0] == "python":
            assert (REPOSITORY / words[1]).is_file(), words
            flags = [word for word in words[2:] if word.startswith("--")]
            assert all(f'"{flag}"' in read_text(REPOSITORY / words[1]) for flag in flags), words
        else:
            assert words[0] in ("pytest", "pre-commit", "mkdocs", "vllm", "docker"), words


def check_train_arguments(arguments: list[str]) -> None:
    """Checks the flags of a training command, using the quickstart config in place of the user's config."""
    assert arguments[0] == "--config"
    config = find_config("quickstart" if arguments[1] in USER_CONFIGS else arguments[1])
    load_settings(config if config.is_absolute() else REPOSITORY / config, arguments[2:])


@for_all_pages
def test_modules_exist(page):
    for module in set(re.findall(r"python -m ([\w.]+)", read_text(page))):
        spec = importlib.util.find_spec(module)
        if module != "MODULE":
            assert spec and spec.origin, module
            assert '__name__ == "__main__"' in read_text(Path(spec.origin)), module


@for_all_pages
def test_paths_exist(page):
    for path in set(PATH.findall(read_text(page))):
        assert (REPOSITORY / path).exists(), path


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings on a page, as generated by GitHub and MkDocs."""
    headings = re.findall(r"^#+ (.+)$", read_text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@for_all_pages
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read_text(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@for_all_pages
def test_mentioned_tests_exist(page):
    for path, keyword in re.findall(r"pytest (tests/[\w./]+)(?: -k (\w+))?", read_text(page)):
        if keyword:
            tree = ast.parse(read_text(REPOSITORY / path))
            names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert any(name.startswith("test_") and keyword in name for name in names), f"{path} -k {keyword}"


@for_pages_with("yaml", "README.md", "docs/guides/evaluate.md", "docs/guides/train.md")
def test_settings_examples_are_valid(page, tmp_path):
    for block in code_blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if "output_dir" not in values:  # some settings of a run
            values = yaml.safe_load(code_blocks(README, "yaml")[0]) | values
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        load_settings(tmp_path / "settings.yaml")


@for_all_pages
def test_mentioned_settings_exist(page):
    sections = {name: field.annotation for name, field in Settings.model_fields.items()}
    fields = {name: getattr(section, "model_fields", {}) for name, section in sections.items()}
    for section, field in re.findall(r"(?:`|--)(\w+)\.(\w+)(?=[`: ])", read_text(page)):
        if fields.get(section) and field not in FILE_EXTENSIONS:
            assert field in fields[section], f"{section}.{field}"


@for_pages_with("json", "README.md", "docs/guides/data.md")
def test_data_examples_are_valid(page, tmp_path):
    for block in code_blocks(page, "json"):
        for line in block.splitlines():
            path = tmp_path / "data.jsonl"
            path.write_text(line + "\n", encoding="utf-8")
            (record,) = read_records(path, yaml.safe_load(line)["task_type"])
            assert record.positives


@pytest.fixture(scope="module")
def working_folder(golden, tmp_path_factory) -> Path:
    """A folder with the inputs of the Python examples: exports and a checkpoint."""
    folder = tmp_path_factory.mktemp("docs")
    checkpoint = folder / "runs" / "mine" / "checkpoints" / "STEP"
    hf_to_orbax(["--model", str(golden / "youtu_tiny"), "--output", str(checkpoint)])
    for run in ("mine", "quickstart"):
        export = folder / "runs" / run / "export"
        orbax_to_hf(["--checkpoint", str(checkpoint), "--output", str(export), "--architecture", "stock"])
    return folder


@for_pages_with("python", "README.md", "docs/guides/export.md", "docs/guides/train.md", "docs/index.md")
def test_python_examples_run(page, working_folder, monkeypatch):
    monkeypatch.chdir(working_folder)
    for block in code_blocks(page, "python"):
        if "sentence_transformers" in block:
            pytest.importorskip("sentence_transformers")
        exec(compile(block, str(page), "exec"), {})


def test_five_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    """From a CSV file to a model that is trained, evaluated, exported and queried, with the README's settings."""
    monkeypatch.chdir(tmp_path)
    topics = ("bicycle", "oven", "garden", "printer", "passport", "guitar", "kettle", "tent")
    places = ("at home", "at work", "in winter", "in a city", "on a boat")
    rows = "".join(
        f'"How do I clean, and repair, a {topic} {place}?",To clean a {topic} {place} use a soft cloth\n'
        for topic in topics
        for place in places
    )
    Path("faq.csv").write_text("question,answer\n" + rows, encoding="utf-8")
    example, _ = code_blocks(README, "yaml")
    settings = yaml.safe_load(example)
    settings["model"]["path"] = "package://quickstart/model"  # instead of a larger one
    Path("mine.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (block,) = (block for block in code_blocks(README) if "convert-data" in block)
    install, *steps = [shlex.split(line) for line in block.splitlines()]
    assert install == ["pip", "install", "-e", "."]
    assert [words[:2] for words in steps] == [["codiemb", name] for name in ("convert-data", "train", "evaluate")] + [
        ["python", "-c"]
    ]
    for words in steps[:3]:
        cli.main(words[1:])
    train, held_out = (list(read_records(Path("data") / f"{name}.jsonl", "ir")) for name in ("train", "heldout"))
    assert (len(train), len(held_out)) == (36, 4)
    lines = Path("runs/mine/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
    after = json.loads(Path("runs/mine/evaluation.json").read_text(encoding="utf-8"))["after"]
    found = json.loads(Path("results.json").read_text(encoding="utf-8"))["results"]
    assert {f"heldout {name}": value for name, value in found["heldout"].items()} == pytest.approx(after, abs=1e-6)
    capsys.readouterr()
    exec(compile(steps[3][2], "README.md", "exec"), {})
    printed = [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    model = Embedder.from_pretrained("runs/mine/export")
    query = model.encode_query("how do I reset my password")
    documents = model.encode_document(["Choose Forgot password on the sign-in page.", "We ship to all countries."])
    assert printed == pytest.approx((documents @ query).tolist(), abs=1e-5)
