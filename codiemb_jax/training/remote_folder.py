"""The output folder of a run at a remote address."""

import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
from etils import epath
from filelock import FileLock, Timeout

from codiemb_jax.config import Settings
from codiemb_jax.errors import UserError
from codiemb_jax.files import write_json
from codiemb_jax.remote import (
    Location,
    download,
    find_file,
    list_files,
    list_names,
    read_text,
    remove_folder,
    upload,
    upload_folder,
    write_text,
)
from codiemb_jax.training.run_folder import HeldOutMetrics, RunFolder, newest_step

OWNER = ".owner"
"""Name of the file that identifies the process that writes to the folder: the one that started last."""

ENTRY_FILES = ("config.json", "modules.json")
"""An export cannot be loaded without these files, so they are uploaded last."""

UNFINISHED = "unfinished_export"
"""Key in inputs.json while an export is being uploaded: what is there then belongs to this run."""


def open_run_folder(location: Location, cache: Path) -> RunFolder:
    """Opens the output folder of a run, which need not exist.

    Raises:
      UserError: If it is remote and cannot be read, or a run on this machine uses it.
    """
    if isinstance(location, Path):
        try:
            done = newest_step(location / "checkpoints")
        except OSError:
            done = 0  # `check_location` says what is wrong
        return RunFolder(location, done)
    # The cache may be shared, and processes of one host have a folder each.
    name = f"{sha256(str(location).encode()).hexdigest()[:16]}-{socket.gethostname()}-{jax.process_index()}"
    local = cache / "runs" / name
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(local.with_name(f"{name}.lock"))
        lock.acquire(blocking=False)
        if local.exists():
            shutil.rmtree(local)
        local.mkdir()
        # First the checkpoints: the files may be newer, but not older.
        folder = RemoteRunFolder(local, newest_step(location / "checkpoints"), location, lock)
        folder.pull()
    except Timeout as error:
        raise UserError(
            f"output_dir: {location} is in use by another run; wait until it ends, or use another output_dir"
        ) from error
    except OSError as error:
        raise UserError(f"the cache {cache} cannot be written ({error}); set CODIEMB_JAX_CACHE") from error
    return folder


@dataclass(frozen=True)
class RemoteRunFolder(RunFolder):
    """The remote `output_dir` of a run.

    Checkpoints are written to the remote folder directly. All other files are written to a local folder first, because
    remote files can neither be appended to nor renamed.
    """

    address: epath.Path
    lock: FileLock
    """Held as long as this object exists, to refuse a second run on this machine."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def location(self) -> Location:
        return self.address

    @property
    def checkpoints(self) -> Location:
        return self.address / "checkpoints"

    def pull(self) -> None:
        """Copies the files of the remote folder that a run reads to the local one.

        Raises:
          UserError: If they cannot be copied.
        """
        names = [file.name for file in (self.config, self.inputs, self.metrics, self.evaluation)]
        present = set(list_names(self.address)) & set(names)
        download(self.address, {name: find_file(self.address / name) for name in present}, self.path)

    def _names(self) -> list[str]:
        return [name for name in list_names(self.address) if name != OWNER]

    @contextmanager
    def locked(self) -> Iterator[None]:
        self._check_unchanged()
        write_text(self.address / OWNER, self.token)
        yield
        shutil.rmtree(self.path, ignore_errors=True)  # all of it has been published

    def _check_owner(self) -> None:
        """Raises UserError if another run has started in the folder, on another machine."""
        if read_text(self.address / OWNER) != self.token:
            raise UserError(f"output_dir: another run has started in {self}; this one stops")

    def _read_inputs(self) -> str:
        return read_text(self.address / self.inputs.name) or ""

    def create(self, settings: Settings, inputs: Mapping[str, str]) -> None:
        super().create(settings, inputs)
        self._publish(self.inputs)
        self._publish(self.config)

    def publish_logs(self) -> None:
        self._publish(self.metrics)
        if self.tensorboard.exists():
            for file in sorted(self.tensorboard.iterdir()):  # only those of this start
                self._publish(file)

    def write_before(self, metrics: HeldOutMetrics) -> None:
        super().write_before(metrics)
        self._publish(self.evaluation)

    def write_after(self, metrics: HeldOutMetrics, step: int) -> HeldOutMetrics:
        before = super().write_after(metrics, step)
        self._publish(self.evaluation)
        return before

    def write_export(self, write: Callable[[Path], None], use: Callable[[Path], None] | None = None) -> None:
        self._check_owner()
        super().write_export(write)
        self._check_owner()
        target = self.address / self.export.name
        self._update_inputs({UNFINISHED: True})
        remove_folder(target)
        upload_folder(self.export, target, last=ENTRY_FILES)
        self._update_inputs({UNFINISHED: False, "exports": [_digest(target)]})
        if use is not None:
            use(self.export)
        shutil.rmtree(self.export, ignore_errors=True)  # as large as the model

    def _check_export(self) -> None:
        target = self.address / self.export.name
        if not list_files(target) or (self.inputs.exists() and self._read(self.inputs).get(UNFINISHED)):
            return
        if _digest(target) not in self._exports():
            raise UserError(
                f"{target}: already exists, and was not written by this run or was changed since; move it away"
            )

    def _publish(self, file: Path) -> None:
        self._check_owner()
        upload(file, self.address / file.relative_to(self.path).as_posix())

    def _update_inputs(self, changes: dict[str, Any]) -> None:
        write_json(self.inputs, self._read(self.inputs) | changes)
        self._publish(self.inputs)


def _digest(folder: epath.Path) -> str:
    """Returns a hash of the names and contents of all files in a remote folder."""
    contents = {name: (file.size, file.checksum) for name, file in list_files(folder).items()}
    return sha256(repr(contents).encode()).hexdigest()
