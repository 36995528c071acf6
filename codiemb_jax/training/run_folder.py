"""A run's output folder: every path in it, what may be there, and what is written when.

A run writes only into an empty folder or its own, and replaces no file but its own.
"""

import filecmp
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from codiemb_jax.checkpoints.orbax import steps_of
from codiemb_jax.config import Settings
from codiemb_jax.errors import UserError, format_problems
from codiemb_jax.files import read_json, write_atomically

FREE_TO_CHANGE = (
    "output_dir", "mesh", "encode_chunks", "checkpoint", "export", "evaluation", "model.remat",
)  # fmt: skip
"""Settings that may differ when a run is continued: they do not change what is computed."""

MARK = "codiemb_jax"
"""Key of inputs.json that tells a run's folder from others; its value is the format's version."""
VERSION = 1

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

    def check(
        self, settings: Settings, inputs: Mapping[str, str], read: Mapping[str, Sequence[Path]], steps: int
    ) -> None:
        """Checks that the run may write here; nothing is written.

        inputs: what the run's steps depend on beside its settings, by fingerprint; read: the paths that it reads, by
        setting; steps: how many it has.

        Raises:
          UserError: other files are here, or the run that is here is another, or this run reads what is in here.
        """
        self._check_place()
        self._check_reads(read)
        self._check_owner()
        if self.done():
            self._check_same_run(settings, inputs)
            self._read_before()
        if os.path.lexists(self.export) and self.done() < steps and settings.export:
            raise UserError(
                f"{self.export}: exists, but this run has not written it; move it away, or give another output_dir"
            )

    def _check_place(self) -> None:
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"output_dir: {self.path} is a file")
            self.path.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be created: {error.strerror}") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {self.path} cannot be written")

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
        if not set(names) - {self.inputs.name + ".tmp"}:  # a run killed at its very start leaves this much
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
            if os.path.lexists(path) and not path.is_dir():
                raise UserError(f"{path}: is a file, and should be a folder; move it away")
        if os.path.lexists(self.export) and (self.export.is_symlink() or not self.export.is_dir()):
            raise UserError(f"{self.export}: is not a folder, so that nothing can be exported there; move it away")
        try:
            ours = MARK in read_json(self.inputs, dict)
        except UserError as error:
            raise self._not_ours(str(error)) from error
        if not ours:
            raise self._not_ours(f"{self.inputs} is not that of a run")

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
            f"{name}: was {was}, now {inputs.get(name)}"
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
            marked = {MARK: VERSION, "inputs": dict(inputs)}
            write_atomically(self.inputs, json.dumps(marked, indent=2) + "\n")
            resolved = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            write_atomically(self.config, resolved)
        except OSError as error:
            raise UserError(f"output_dir: {self.path} cannot be written: {error.strerror}") from error

    def write_before(self, metrics: HeldOutMetrics) -> None:
        """Keeps the metrics of the model as it came."""
        write_atomically(self.evaluation, json.dumps({"before": metrics}, indent=2) + "\n")

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
        write_atomically(self.evaluation, json.dumps({"before": before, "after": metrics}, indent=2) + "\n")
        return before

    def write_export(self, write: Any) -> None:
        """Calls `write` with the path of a new folder, which becomes `export` when it returns.

        An export that is there already is the one of this run if it holds the same, and is left as it is.

        Raises:
          UserError: it holds something else.
        """
        shutil.rmtree(self.path / ".export.unfinished", ignore_errors=True)  # that of a killed run
        if not os.path.lexists(self.export):
            write(self.export)
            return
        with _scratch(self.path / ".export-again") as again:
            write(again)
            if not _same_files(again, self.export):
                raise UserError(
                    f"{self.export}: differs from what this run writes; move it away and start the same command again"
                )


@contextmanager
def _scratch(path: Path) -> Any:
    """A path that holds nothing before and after."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _same_files(one: Path, other: Path) -> bool:
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, other)]
    return names[0] == names[1] and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names[0] if (one / name).is_file()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
