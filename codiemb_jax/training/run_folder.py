"""A run's output folder: every path in it, what may be there, and what is written when.

A run writes only into an empty folder or its own, and replaces no file but its own.
"""

import hashlib
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from codiemb_jax.checkpoints.orbax import is_checkpoint, steps_of
from codiemb_jax.config import Settings
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import read_json, write_atomically, write_json

FREE_TO_CHANGE = (
    "output_dir", "mesh", "encode_chunks", "checkpoint", "export", "evaluation", "model.remat",
)  # fmt: skip
"""Settings that may differ when a run is continued: they do not change what is computed."""

MARK = "codiemb_jax"
"""Key of inputs.json that tells a run's folder from others; its value is the format's version."""
VERSION = 1

LEFTOVER = re.compile(r"\.inputs\.json\.[0-9a-f]{8}\.tmp")
SCRATCH = re.compile(r"\.export\.[0-9a-f]{8}\.unfinished")
"""Names that only a run gives, to files and folders that it is still writing."""

HeldOutMetrics = dict[str, float]
"""Held-out metrics by `FILE METRIC`."""


@dataclass(frozen=True)
class RunFolder:
    """`output_dir` of a run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def inputs(self) -> Path:
        return self.path / "inputs.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def done(self) -> int:
        """Steps done at the newest checkpoint; 0 if there is none."""
        return max(steps_of(self.checkpoints), default=0)

    def check_place(self, read: Mapping[str, Sequence[Path]]) -> None:
        """Checks that a run may write here; nothing is written.  read: the paths that it reads, by setting.

        Raises:
          UserError: the folder cannot be created or written, holds other files, or the run reads what is in it.
        """
        self._check_place()
        self._check_reads(read)
        self._check_owner()

    def check_run(self, settings: Settings, inputs: Mapping[str, str]) -> None:
        """Checks that this run is the one that is here, if any is.

        inputs: what the run's steps depend on beside its settings, by fingerprint.

        Raises:
          UserError: it is another, or its files are damaged.
        """
        # Without either, a run was killed at its very start.
        if self.done() or self.config.exists():
            self._check_same_run(settings, inputs)
            self._read_before()
        if settings.export:
            self._check_export()

    def _check_place(self) -> None:
        try:
            there = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
            if not there.is_dir():
                raise UserError(f"output_dir: {there} is a file")
            # A name that is too long is noticed only in a folder that exists; a path that is too long, anywhere.
            for name in (*self.path.relative_to(there).parts, str(self.path.absolute() / ("x" * 150))):
                _look_up(there / name)
        except OSError as error:
            raise UserError(
                f"output_dir: {shorten(str(self.path), 200)} cannot be created: {error.strerror}"
            ) from error
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {there} cannot be written")

    def _check_reads(self, read: Mapping[str, Sequence[Path]]) -> None:
        own = self.path.resolve()
        for setting, paths in read.items():
            for path in paths:
                there = path.resolve()
                if there.is_relative_to(own) or own.is_relative_to(there):
                    raise UserError(
                        f"output_dir: {self.path} contains, or lies in, {setting} {path}; a run does not write "
                        "where it reads: give another output_dir"
                    )

    def _check_owner(self) -> None:
        try:
            names = sorted(child.name for child in self.path.iterdir()) if self.path.exists() else []
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be read: {error.strerror}") from error
        if all(LEFTOVER.fullmatch(name) for name in names):  # a run killed at its very start leaves this much
            return
        files, folders = (self.config, self.inputs, self.metrics, self.evaluation), (self.tensorboard, self.checkpoints)
        if self.inputs.name not in names and self.config.name not in names:
            shown = ", ".join([*names[:5], *["…"] * (len(names) > 5)])
            raise UserError(
                f"output_dir: {self.path} holds other files ({shown}); a run writes only into an empty "
                "folder or its own"
            )
        for path in files:
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise UserError(f"{path}: is not a file; move it away")
        for path in folders:
            if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
                raise UserError(f"{path}: is a file or a link, and should be a folder; move it away")
        # Old checkpoints are removed as new ones come; the newest is checked when it is read.
        for step in steps_of(self.checkpoints)[:-1]:
            if not is_checkpoint(self.checkpoints / str(step)):
                raise UserError(f"{self.checkpoints / str(step)}: is not a checkpoint of this run; move it away")
        if os.path.lexists(self.export) and (self.export.is_symlink() or not self.export.is_dir()):
            raise UserError(f"{self.export}: is not a folder, so that nothing can be exported there; move it away")
        try:
            version = read_json(self.inputs, dict).get(MARK)
        except UserError as error:
            raise self._not_ours(str(error)) from error
        if version != VERSION:
            raise self._not_ours(f"{self.inputs} is not that of a run of this version")

    def _not_ours(self, why: str) -> UserError:
        return UserError(
            f"{self.path} holds files, but config.yaml and inputs.json, which say what run they are of, cannot be read "
            f"({why}); put them back, or start over in another output_dir"
        )

    def _check_same_run(self, settings: Settings, inputs: Mapping[str, str]) -> None:
        try:
            earlier = _flat(yaml.safe_load(self.config.read_text(encoding="utf-8")))
            earlier_inputs = read_json(self.inputs, dict)["inputs"].items()
        except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
            raise self._not_ours(str(error)) from error
        now = _flat(settings.model_dump(mode="json"))
        differences = [
            f"{name}: was {earlier.get(name)}, now {now.get(name)}"
            for name in sorted(earlier.keys() | now.keys())
            if earlier.get(name) != now.get(name) and not str(name).startswith(FREE_TO_CHANGE)
        ]
        differences += [
            f"{name}: {_difference(was, inputs.get(name))}"
            for name, was in sorted({**dict.fromkeys(inputs), **dict(earlier_inputs)}.items())
            if was != inputs.get(name)
        ]
        if differences:
            raise UserError(
                f"{self.path} holds a run with other settings; give the same settings to continue it, or another "
                "output_dir to start a new one:\n" + format_problems(differences)
            )

    def begin(self, settings: Settings, inputs: Mapping[str, str]) -> None:
        """Creates the folder and writes down what run it belongs to."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.inputs, {MARK: VERSION, "inputs": dict(inputs), "exports": self._exports()})
            resolved = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            write_atomically(self.config, resolved)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from error

    def write_before(self, metrics: HeldOutMetrics) -> None:
        """Keeps the metrics of the model as it came."""
        write_json(self.evaluation, {"before": metrics})

    def _read_before(self) -> HeldOutMetrics:
        if not self.evaluation.exists():
            return {}
        before = read_json(self.evaluation, dict).get("before")
        if not isinstance(before, dict) or not all(_is_number(value) for value in before.values()):
            raise UserError(
                f"{self.evaluation}: holds no metrics under `before`; put the file back, or remove it to go on without"
            )
        return before

    def write_after(self, metrics: HeldOutMetrics) -> HeldOutMetrics:
        """Keeps the metrics of the trained model; returns those from before."""
        before = self._read_before()
        write_json(self.evaluation, {"before": before, "after": metrics})
        return before

    def write_export(self, write: Callable[[Path], None]) -> None:
        """Calls `write` with the path of a folder to make, which becomes `export` when it returns.

        Raises:
          UserError: a folder is there that this run has not written, or that has been changed since.
        """
        for leftover in self.path.iterdir():
            if SCRATCH.fullmatch(leftover.name) and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
        scratch = self.path / f".export.{secrets.token_hex(4)}.unfinished"
        try:
            scratch.mkdir()
            write(scratch / self.export.name)
            # Written down before it is there, so that a run killed in between knows its own.
            digest = folder_digest(scratch / self.export.name)
            self._write_exports(list(dict.fromkeys([*self._exports(), digest])))
            self._check_export()
            if self.export.exists():
                self.export.rename(scratch / "replaced")
            (scratch / self.export.name).rename(self.export)
            self._write_exports([digest])
        except OSError as error:
            raise UserError(f"{self.export}: cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _check_export(self) -> None:
        if os.path.lexists(self.export) and folder_digest(self.export) not in self._exports():
            raise UserError(
                f"{self.export}: exists, and this run has not written it, or it has been changed since; move it away"
            )

    def _exports(self) -> list[str]:
        """Digests of the exports that this run has written."""
        digests = read_json(self.inputs, dict).get("exports") if self.inputs.exists() else []
        if not isinstance(digests, list):
            raise UserError(f"{self.inputs}: exports: expected a list; put the file back, or use another output_dir")
        return digests

    def _write_exports(self, digests: list[str]) -> None:
        write_json(self.inputs, read_json(self.inputs, dict) | {"exports": digests})


def _difference(was: str | None, now: str | None) -> str:
    """How an input of a run differs: a fingerprint or a number of devices."""
    if was is None or now is None:
        return "is new" if was is None else "is gone"
    return f"was {was}, now {now}" if len(now) < 8 else "its content has changed"


def _look_up(path: Path) -> None:
    """OSError if the file system could hold no such path."""
    with suppress(FileNotFoundError):
        path.lstat()


def folder_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all that is in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0{path.is_symlink()}\0{path.is_dir()}\0".encode(errors="replace"))
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
