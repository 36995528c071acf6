"""Tests of the persistent compilation cache: what it saves, and which folders are not trusted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache

from codiemb_jax import compilation
from codiemb_jax.compilation import use_compilation_cache
from tests.helpers import golden_settings

SETTINGS = (
    "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache",
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache folder, with JAX not configured to use another one."""
    monkeypatch.setenv("CODIEMB_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "compiled").rglob("*") if path.is_file())


def test_folder_is_private(cache, capsys):
    mask = os.umask(0)
    try:
        cache.mkdir(mode=0o755)
        use_compilation_cache()
    finally:
        os.umask(mask)
    folder = Path(jax.config.jax_compilation_cache_dir)
    assert folder.parent == cache / "compiled"
    assert [path.stat().st_mode & 0o777 for path in (folder.parent, folder)] == [0o700, 0o700]
    assert capsys.readouterr().err == ""


def test_programs_for_another_number_of_cores_are_kept_apart(cache, monkeypatch):
    def folder() -> str:
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache()
        return jax.config.jax_compilation_cache_dir

    monkeypatch.delenv("NPROC", raising=False)
    folders = []
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        folders.append(folder())
    assert folders[0] != folders[1]
    monkeypatch.setenv("NPROC", "1")  # XLA uses it instead
    assert folder() == folders[0]


def test_configuration_of_jax_has_precedence(cache, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert not cache.exists()
    jax.config.update("jax_enable_compilation_cache", True)
    use_compilation_cache()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7


def others_can_write(cache: Path) -> None:
    use_compilation_cache()
    Path(jax.config.jax_compilation_cache_dir).chmod(0o770)
    jax.config.update("jax_compilation_cache_dir", None)


def others_can_replace(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)


def compiled_is_a_file(cache: Path) -> None:
    cache.mkdir()
    (cache / "compiled").write_text("a file")


UNTRUSTED = {
    "other users can write to .*cache/compiled/.*; delete it, because its content cannot be trusted": others_can_write,
    "other users can replace folders in .*cache; run chmod go-w .*cache$": others_can_replace,
    r".*cache/compiled/\w+ cannot be used \(Not a directory\)": lambda cache: cache.write_text("a file"),
    ".*cache/compiled is not a folder; move it away$": compiled_is_a_file,
}


@pytest.mark.parametrize("message", UNTRUSTED)
def test_folder_that_others_can_change_is_not_used(message, cache, capsys):
    UNTRUSTED[message](cache)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    note = capsys.readouterr().err.strip()
    assert re.fullmatch(f"note: compiled programs are not cached, because {message}.*", note)


def test_folder_of_another_user_is_not_used(cache, capsys, monkeypatch):
    monkeypatch.setattr(compilation.os, "getuid", lambda: cache.parent.stat().st_uid + 1)
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "belongs to another user; set CODIEMB_JAX_CACHE to a folder of your own" in capsys.readouterr().err


@pytest.mark.parametrize("private", [True, False])
def test_group_that_only_the_user_is_in_may_write(private, cache, capsys, monkeypatch):
    monkeypatch.setattr(compilation, "_is_private_group", lambda group, user: private)
    cache.mkdir()
    cache.chmod(0o770)
    use_compilation_cache()
    assert (jax.config.jax_compilation_cache_dir is not None) == private
    assert ("other users can replace folders in" in capsys.readouterr().err) != private


@pytest.mark.parametrize(
    ("name", "members", "private"),
    [("alice", [], True), ("alice", ["alice"], True), ("alice", ["alice", "bob"], False), ("staff", [], False)],
)
def test_group_of_the_same_name_is_private_without_other_members(name, members, private, monkeypatch):
    monkeypatch.setattr(compilation.grp, "getgrgid", lambda group: SimpleNamespace(gr_name=name, gr_mem=members))
    monkeypatch.setattr(compilation.pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="alice"))
    assert compilation._is_private_group(1, 1) == private


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "flipped bit": lambda content: content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
    "other content": lambda content: b"\0" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_compiled_again(damage, cache):
    use_compilation_cache()

    @jax.jit
    def step(x: jax.Array) -> jax.Array:
        return jnp.sin(x) @ x.T

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = np.asarray(step(x))
    damaged = [path for path in entries(cache) if path.name.startswith("jit_step")]
    assert len(damaged) == 1
    damaged[0].write_bytes(DAMAGES[damage](damaged[0].read_bytes()))
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry for 'jit_step'"):
        np.testing.assert_array_equal(step(x), expected)


TRAIN = """
import collections, json, sys
import jax.monitoring
from codiemb_jax.train import main
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
main(sys.argv[1:])
print(json.dumps(counts))
"""


def test_second_process_compiles_nothing(golden, tmp_path):
    data = {"ir": [str(golden / "data" / "news.jsonl")], "query_max_tokens": 64, "passage_max_tokens": 64}
    environment = os.environ | {"CODIEMB_JAX_CACHE": str(tmp_path / "cache"), "XLA_FLAGS": ""}
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        environment.pop(name, None)

    def train(name: str) -> tuple[dict[str, int], list[Path]]:
        settings = golden_settings(golden, tmp_path / name, data=data, optimizer={"max_steps": 3}, export=False)
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-c", TRAIN, "--config", config]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=200)
        assert "compiled" not in output.stderr  # neither warnings nor notes
        return json.loads(output.stdout.splitlines()[-1]), entries(tmp_path / "cache")

    cold, after_cold = train("cold")
    warm, after_warm = train("warm")
    assert after_warm == after_cold
    assert sum(path.name.startswith("jit_step") for path in after_cold) == 1
    assert cold["cache_misses"] == len(after_cold)
    assert "cache_misses" not in warm
    assert warm["cache_hits"] == cold["compile_requests_use_cache"] == warm["compile_requests_use_cache"]
