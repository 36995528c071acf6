"""What README.md and docs/ say can be followed: programs, files, links, settings and data exist and are right."""

import ast
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from codiemb_jax.config import Settings
from codiemb_jax.config_file import load_settings
from codiemb_jax.text.records import read_records

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
FILE_ENDINGS = ("json", "jsonl", "py", "safetensors", "yaml")
PATH = re.compile(r"(?<![\w/.])((?:configs|scripts|tests|codiemb_jax|convert)/[\w./-]*\w)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.name


def test_settings_page_is_up_to_date():
    path = REPOSITORY / "scripts" / "make_settings_doc.py"
    spec = importlib.util.spec_from_file_location("make_settings_doc", path)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert text_of(script.TARGET) == script.document(), "run python scripts/make_settings_doc.py"


def test_the_two_lines_of_the_start_stand_there():
    lines = text_of(README).splitlines()
    assert "pip install -e . && python -m codiemb_jax.train --config configs/quickstart.yaml" in lines
    assert 'pip install -e ".[test]" && pytest' in lines


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_programs_exist(page):
    for module in set(re.findall(r"python -m ([\w.]+)", text_of(page))):
        spec = importlib.util.find_spec(module)
        assert spec and spec.origin, module
        assert '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8"), module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_of_the_converters_exist(page):
    for module, rest in re.findall(r"python -m (convert\.\w+)([^`\n]*)", text_of(page)):
        source = (REPOSITORY / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for word in shlex.split(rest):
            assert not word.startswith("--") or f'"{word}"' in source, f"{module} {word}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page):
    for path in set(PATH.findall(text_of(page))):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_tests_exist(page):
    for path, choice in re.findall(r"pytest (tests/[\w./]+)(?: -k (\w+))?", text_of(page)):
        if choice:
            tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
            names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
            assert any(name.startswith("test_") and choice in name for name in names), f"{path} -k {choice}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_of_settings_are_valid(page, tmp_path):
    for block in blocks(page, "yaml"):
        (tmp_path / "settings.yaml").write_text(block, encoding="utf-8")
        load_settings(tmp_path / "settings.yaml")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_settings_exist(page):
    sections = {name: field.annotation for name, field in Settings.model_fields.items()}
    fields = {name: getattr(section, "model_fields", {}) for name, section in sections.items()}
    for section, field in re.findall(r"(?:`|--)(\w+)\.(\w+)(?=[`: ])", text_of(page)):
        if fields.get(section) and field not in FILE_ENDINGS:
            assert field in fields[section], f"{section}.{field}"
    for section, field in re.findall(r"--(\w+)\.(\w+)", text_of(page)):
        assert field in fields.get(section, ()), f"--{section}.{field}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_of_data_are_valid(page, tmp_path):
    for block in blocks(page, "json"):
        for line in block.splitlines():
            path = tmp_path / "data.jsonl"
            path.write_text(line + "\n", encoding="utf-8")
            (record,) = read_records(path, yaml.safe_load(line)["task_type"])
            assert record.positives


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_of_python_import_what_is_there(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("codiemb_jax", "convert")):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), node.module
