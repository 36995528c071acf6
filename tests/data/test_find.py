"""Tests of finding and naming data files."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codiemb_jax.data.find import dataset_names, find_files
from codiemb_jax.errors import UserError


def test_find_files_searches_folders_recursively_and_sorts(tmp_path):
    for name in ("b/z.jsonl", "b/deep/er/a.json", "a.jsonl", "b/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    files = find_files([tmp_path / "b", tmp_path / "a.jsonl"], "data.ir")
    assert files == [tmp_path / "a.jsonl", tmp_path / "b/deep/er/a.json", tmp_path / "b/z.jsonl"]


def test_linked_files_and_folders_are_found_once(tmp_path):
    for name in ("elsewhere/a.json", "folder/b.json", "c.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    folder = tmp_path / "folder"
    for name, target in (("linked", tmp_path / "elsewhere"), ("loop", folder), ("c.json", tmp_path / "c.json")):
        (folder / name).symlink_to(target)
    assert find_files([folder], "data.ir") == [folder / "b.json", folder / "c.json", folder / "linked" / "a.json"]


@pytest.mark.parametrize("reverse", [False, True])
def test_folder_that_is_also_linked_has_its_own_name(reverse, tmp_path, monkeypatch):
    for name in ("a", "z"):
        (tmp_path / f"real-{name}").mkdir()
        (tmp_path / f"real-{name}" / "data.json").write_text("{}")
        (tmp_path / f"link-{name}").symlink_to(tmp_path / f"real-{name}")
    walk = os.walk

    def walk_in_order(*args: Any, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for name, folders, names in walk(*args, **options):
            folders.sort(reverse=reverse)
            yield name, folders, names

    monkeypatch.setattr(os, "walk", walk_in_order)
    assert find_files([tmp_path], "data.ir") == [tmp_path / f"real-{name}" / "data.json" for name in ("a", "z")]


def test_what_cannot_be_read_in_a_folder_is_reported(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    (folder / "private").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    (folder / "broken.jsonl").symlink_to("missing.jsonl")
    (folder / "gone").symlink_to("/missing/folder")
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read everything
        if Path(path).name == "private":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError) as caught:
        find_files([folder], "data.ir")
    assert sorted(str(caught.value).splitlines()[1:]) == [
        f"  {folder}/broken.jsonl: broken link",
        f"  {folder}/gone: broken link",
        f"  {folder}/pipe.json: not a file",
        f"  {folder}/private: cannot be read: Permission denied",
    ]


def test_all_invalid_paths_are_reported(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.json").write_text("{}")
    (tmp_path / "a.csv").write_text("")
    names = ["empty", "missing.jsonl", "a.csv", "folder", "folder/../folder/a.json"]
    with pytest.raises(UserError) as caught:
        find_files([tmp_path / name for name in names], "data.sts")
    assert str(caught.value).splitlines() == [
        "data.sts:",
        f"  {tmp_path}/empty: the folder contains no .json or .jsonl files",
        f"  {tmp_path}/missing.jsonl: no such file or folder",
        f"  {tmp_path}/a.csv: expected a .json or .jsonl file, or a folder (the data guide shows how to convert CSV)",
        f"  {tmp_path}/folder/a.json and {tmp_path}/folder/../folder/a.json: the same file is listed 2 times; "
        "list it once",
    ]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_the_same_file_raise_user_error(link, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    link(tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(UserError) as caught:
        find_files([tmp_path / "a.json", tmp_path / "b.json"], "data.ir")
    names = f"{tmp_path}/a.json and {tmp_path}/b.json"
    assert str(caught.value) == f"data.ir:\n  {names}: the same file is listed 2 times; list it once"


def test_pipe_raises_user_error(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match=f"{tmp_path}/a.json: not a file or folder"):
        find_files([tmp_path / "a.json"], "data.ir")


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ([], []),
        (["x/a.json", "x/b.json"], ["a", "b"]),
        (["x/a.json", "x/a.jsonl"], ["a.json", "a.jsonl"]),
        (["x/a.json", "y/a.json", "y/b.json"], ["x/a.json", "y/a.json", "y/b.json"]),
    ],
)
def test_dataset_names_are_the_shortest_unique_ones(files, names):
    assert dataset_names([Path(file) for file in files]) == names
