"""The output folder of a run: its paths, and checks that protect other files.

A run writes only into a new or empty folder or its own, and never replaces files that it has not written.
"""

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import jax
from filelock import FileLock, Timeout

from codiemb_jax.checkpoints.orbax import is_checkpoint
from codiemb_jax.checkpoints.run_checkpoints import saved_steps
from codiemb_jax.config import Settings
from codiemb_jax.config_file import dump_settings, read_values
from codiemb_jax.distributed import first_value, is_first_process
from codiemb_jax.errors import UserError, format_problems, shorten
from codiemb_jax.files import read_json, write_atomically, write_json
from codiemb_jax.remote import Location

CHANGEABLE_SETTINGS = (
    "output_dir", "mesh", "distributed", "encode_chunks", "checkpoint", "export", "evaluation", "tracking",
    "push_to_hub", "model.remat",
    "data.packing", "data.row_tokens", "optimizer.offload", "non_finite", "non_finite_skips",
)  # fmt: skip
"""Settings and sections that may change when a run is continued: they do not affect the results of its steps."""

FORMAT_KEY = "codiemb_jax"
"""Key in inputs.json that identifies the folder of a run. Its value is the version of the format."""
FORMAT_VERSION = 1

TEMPORARY_FILE = re.compile(r"\.inputs\.json\.[0-9a-f]{8}\.tmp")
"""Name of inputs.json while it is being written, see `write_atomically`."""
LOCK = ".lock"
"""Name of the file that a running run keeps locked."""
RUN_ID = re.compile(r"[0-9a-f]{16}")
UNFINISHED_EXPORT = re.compile(r"\.export\.[0-9a-f]{8}\.unfinished")
"""Name of the folder of an export while it is being written."""

HeldOutMetrics = dict[str, float]
"""Held-out metrics, with keys `FILE METRIC`."""


@dataclass(frozen=True)
class RunFolder:
    """The `output_dir` of a run."""

    path: Path
    """The folder on this machine."""
    done: int
    """Number of steps at the newest checkpoint when the folder was opened; 0 if there was none."""

    def __str__(self) -> str:
        return str(self.location)

    @property
    def location(self) -> Location:
        """The folder as given in the settings."""
        return self.path

    def shown(self, path: Path) -> str:
        """Returns the path of something in the folder as users know it, for messages."""
        return str(self.location / path.relative_to(self.path).as_posix())

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
    def checkpoints(self) -> Location:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def check_location(self, input_paths: Mapping[str, Sequence[Location]]) -> None:
        """Checks that a run may write to this folder, without writing anything.

        Args:
          input_paths: The paths that the run reads, by setting.

        Raises:
          UserError: If the folder cannot be created or written, contains other files, or overlaps with input paths.
        """
        self._check_writable()
        self._check_inputs_outside(input_paths)
        self._check_content()

    def check_same_run(self, settings: Settings, inputs: Mapping[str, str]) -> None:
        """Checks that the folder contains no run, or the same run.

        Args:
          settings: The settings of the run.
          inputs: Fingerprints of everything besides the settings on which the steps depend.

        Raises:
          UserError: If the folder contains another run, or its files are damaged.
        """
        # A run that was killed before it wrote its settings has neither.
        if self.done or self.config.exists():
            self._compare_run(settings, inputs)
            self._read_before()
            self._exports()
        if settings.export:
            self._check_export()

    def _check_writable(self) -> None:
        try:
            parent = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
            if not parent.is_dir():
                raise UserError(f"output_dir: {parent} is not a folder")
            # The OS checks the length of a name only in an existing folder, and the length of a path anywhere.
            for name in (*self.path.relative_to(parent).parts, str(self.path.absolute() / ("x" * 150))):
                _check_valid_path(parent / name)
        except OSError as error:
            raise UserError(
                f"output_dir: {shorten(str(self.path), 200)} cannot be created: {error.strerror}"
            ) from error
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {parent} is not writable")

    def _check_inputs_outside(self, input_paths: Mapping[str, Sequence[Location]]) -> None:
        output = _resolve(self.location)
        for setting, paths in input_paths.items():
            for path in paths:
                resolved = _resolve(path)
                if resolved.is_relative_to(output) or output.is_relative_to(resolved):
                    raise UserError(
                        f"output_dir: {self} overlaps with {setting} {path}; give an output_dir outside the "
                        "inputs of the run"
                    )

    def _check_content(self) -> None:
        try:
            names = self._names()
        except OSError as error:
            raise UserError(f"output_dir: {self} cannot be read: {error.strerror}") from error
        # Empty, or left by a run that was killed at its very start.
        if all(name == LOCK or TEMPORARY_FILE.fullmatch(name) for name in names):
            return
        files = self.config, self.inputs, self.metrics, self.evaluation
        # Weights & Biases takes either of the last two.
        folders = self.tensorboard, self.checkpoints, self.path / "wandb", self.path / ".wandb"
        if self.inputs.name not in names and self.config.name not in names:
            listed = ", ".join([*names[:5], *["…"] * (len(names) > 5)])
            raise UserError(
                f"output_dir: {self} contains other files ({listed}); give a new or empty folder, or the folder "
                "of the same run"
            )
        for path in files:
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                raise UserError(f"{path}: is not a file; move it away")
        for path in folders:
            if isinstance(path, Path) and os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
                raise UserError(f"{path}: expected a folder, found a file or a link; move it away")
        # Old checkpoints will be deleted, so they must be checkpoints. The newest one is checked when it is read.
        for step in saved_steps(self.checkpoints)[:-1]:
            if not is_checkpoint(self.checkpoints / str(step)):
                raise UserError(f"{self.checkpoints / str(step)}: is not a checkpoint of this run; move it away")
        if os.path.lexists(self.export) and (self.export.is_symlink() or not self.export.is_dir()):
            raise UserError(f"{self.export}: is not a folder; move it away")
        try:
            version = self._read(self.inputs).get(FORMAT_KEY)
        except UserError as error:
            raise self._unknown_run_error(str(error)) from error
        if version != FORMAT_VERSION:
            raise self._unknown_run_error(f"{self.shown(self.inputs)} is not from a run of this version")

    def _names(self) -> list[str]:
        """Returns the names of everything in the folder."""
        return sorted(child.name for child in self.path.iterdir()) if self.path.exists() else []

    def _unknown_run_error(self, reason: str) -> UserError:
        return UserError(
            f"{self} contains files, but config.yaml and inputs.json, which identify the run, cannot be read "
            f"({reason}); restore them, or start over in another output_dir"
        )

    def _compare_run(self, settings: Settings, inputs: Mapping[str, str]) -> None:
        try:
            old = flatten(read_values(self.config)[0])
            old_inputs = self._read(self.inputs)["inputs"].items()
        except (UserError, AttributeError, TypeError, KeyError) as error:
            raise self._unknown_run_error(str(error)) from error
        new = flatten(settings.model_dump(mode="json"))
        differences = [
            f"{name}: was {old.get(name)}, now {new.get(name)}"
            for name in sorted(old.keys() | new.keys())
            if old.get(name) != new.get(name) and not _is_changeable(name)
        ]
        differences += [
            f"{name}: {_describe_change(was, inputs.get(name))}"
            for name, was in sorted({**dict.fromkeys(inputs), **dict(old_inputs)}.items())
            if was != inputs.get(name)
        ]
        if differences:
            raise UserError(
                f"{self} contains a run with other settings; use the same settings to continue it, or another "
                "output_dir to start a new run:\n" + format_problems(differences)
            )

    @contextmanager
    def write_errors(self) -> Iterator[None]:
        """Raises `UserError` if the folder cannot be written in this block, for example because the disk is full."""
        try:
            yield
        except OSError as error:
            raise UserError(f"output_dir: {self} cannot be written: {error.strerror or error}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Creates the folder, and keeps every other run out of it in this block.

        Raises:
          UserError: If another run uses the folder, or has used it since it was opened.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / LOCK
        if os.path.lexists(lock) and (lock.is_symlink() or not lock.is_file()):
            raise UserError(f"{lock}: is not a file; move it away")
        try:
            held = FileLock(lock).acquire(blocking=False)
        except Timeout as error:
            raise UserError(
                f"output_dir: {self} is in use by another run; wait until it ends, or use another output_dir"
            ) from error
        with held:
            self._check_unchanged()
            yield

    def _check_unchanged(self) -> None:
        """Raises UserError if another run has saved a checkpoint since the folder was opened."""
        if newest_step(self.checkpoints) != self.done:
            raise UserError(f"output_dir: another run has written to {self}; run the same command again")

    def check_shared(self) -> None:
        """Checks that all processes of this run see the same folder.

        Raises:
          UserError: If the folder of this process is not that of the first one.
        """
        expected = first_value(self._read_inputs() if is_first_process() else "")
        if self._read_inputs() != expected:
            raise UserError(
                f"output_dir: process {jax.process_index()} does not see the files that process 0 has written to "
                f"{self}; give a folder that all machines share"
            )

    def _read_inputs(self) -> str:
        """Returns inputs.json as all processes should see it; nothing if there is none."""
        try:
            return self.inputs.read_text(encoding="utf-8")
        except OSError:
            return ""

    def create(self, settings: Settings, inputs: Mapping[str, str]) -> None:
        """Writes config.yaml and inputs.json, which identify the run."""
        content = {"inputs": dict(inputs), "exports": self._exports(), "id": secrets.token_hex(8)}
        write_json(self.inputs, {FORMAT_KEY: FORMAT_VERSION} | content)
        write_atomically(self.config, dump_settings(settings))

    def _read(self, path: Path) -> dict[str, Any]:
        """Reads a JSON file of the folder."""
        try:
            return read_json(path, dict)
        except UserError as error:
            raise UserError(str(error).replace(str(path), self.shown(path))) from error

    def publish_logs(self) -> None:
        """Makes the metrics of all steps so far visible in the folder. They are, unless it is remote."""

    def write_before(self, metrics: HeldOutMetrics) -> None:
        """Writes the metrics of the initial model."""
        write_json(self.evaluation, {"before": metrics})

    def _read_before(self) -> HeldOutMetrics:
        if not self.evaluation.exists():
            return {}
        fix = "restore the file, or remove it to continue without these metrics"
        try:
            before = self._read(self.evaluation).get("before")
        except UserError as error:
            raise UserError(f"{error}; {fix}") from error
        if not is_metrics(before):
            raise UserError(f"{self.shown(self.evaluation)}: has no valid metrics under `before`; {fix}")
        return before

    def write_after(self, metrics: HeldOutMetrics, step: int) -> HeldOutMetrics:
        """Writes the metrics of the trained model, after `step` steps, and returns those of the initial model."""
        before = self._read_before()
        write_json(self.evaluation, {"before": before, "after": metrics, "step": step})
        return before

    def write_export(self, write: Callable[[Path], None], use: Callable[[Path], None] | None = None) -> None:
        """Writes the export atomically, replacing an earlier export of this run.

        Args:
          write: Creates the export at the path that it is called with.
          use: Is called with the path of the complete export, if given.

        Raises:
          UserError: If there is another folder, or the earlier export was changed, or the export cannot be written.
        """
        for leftover in self.path.iterdir():
            if UNFINISHED_EXPORT.fullmatch(leftover.name) and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
        unfinished = self.path / f".export.{secrets.token_hex(4)}.unfinished"
        try:
            unfinished.mkdir()
            write(unfinished / self.export.name)
            # The digest is stored before the rename, so that a run killed in between recognizes its export.
            digest = folder_digest(unfinished / self.export.name)
            self._write_exports(list(dict.fromkeys([*self._exports(), digest])))
            self._check_export()
            if self.export.exists():
                self.export.rename(unfinished / "replaced")
            (unfinished / self.export.name).rename(self.export)
            self._write_exports([digest])
        except OSError as error:
            raise UserError(f"{self.export}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        if use is not None:
            use(self.export)

    def _check_export(self) -> None:
        if os.path.lexists(self.export) and folder_digest(self.export) not in self._exports():
            raise UserError(
                f"{self.export}: already exists, and was not written by this run or was changed since; move it away"
            )

    def _exports(self) -> list[str]:
        """Returns the digests of the exports that this run has written."""
        digests = self._read(self.inputs).get("exports") if self.inputs.exists() else []
        if not isinstance(digests, list) or not all(isinstance(digest, str) for digest in digests):
            raise UserError(
                f"{self.shown(self.inputs)}: exports: expected a list of strings; restore the file, or use another "
                "output_dir"
            )
        return digests

    @property
    def run_id(self) -> str:
        """Identifies the run outside this folder. Stays the same when it is continued."""
        found = self._read(self.inputs).get("id") if self.inputs.exists() else None
        if isinstance(found, str) and RUN_ID.fullmatch(found):
            return found
        return hashlib.sha256(str(self.location).encode()).hexdigest()[:16]

    def _write_exports(self, digests: list[str]) -> None:
        write_json(self.inputs, self._read(self.inputs) | {"exports": digests})


def newest_step(checkpoints: Location) -> int:
    """Returns the number of steps at the newest checkpoint in a folder, 0 if there is none."""
    return max(saved_steps(checkpoints), default=0)


def _resolve(path: Location) -> Location:
    return path.resolve() if isinstance(path, Path) else path


def _is_changeable(name: str) -> bool:
    return any(name == changeable or name.startswith(f"{changeable}.") for changeable in CHANGEABLE_SETTINGS)


def _describe_change(old: str | None, new: str | None) -> str:
    """Describes how an input of a run, which is a fingerprint or a number of devices, has changed."""
    if old is None or new is None:
        return "was added" if old is None else "was removed"
    return f"was {old}, now {new}" if len(new) < 8 else "its content, or how it is tokenized, has changed"


def _check_valid_path(path: Path) -> None:
    """Raises OSError if the file system does not allow a path."""
    with suppress(FileNotFoundError):
        path.lstat()


def folder_digest(folder: Path) -> str:
    """Returns the SHA-256 hash of the names and contents of everything in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\0{path.is_symlink()}\0{path.is_dir()}\0".encode(errors="replace"))
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def is_metrics(value: Any) -> TypeGuard[HeldOutMetrics]:
    """Whether a value read from a file is held-out metrics."""
    return isinstance(value, dict) and all(_is_number(number) for number in value.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by name, such as `data.packing`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
