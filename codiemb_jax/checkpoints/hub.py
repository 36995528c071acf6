"""Uploads exports to the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codiemb_jax.errors import UserError


def create_repository(name: str) -> None:
    """Creates a private repository OWNER/NAME, unless it exists.

    Raises:
      UserError: If the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi  # slow, and not needed otherwise

    with _hub_errors(f"push_to_hub: {name} cannot be created", "log in with `hf auth login`, or set it to null"):
        HfApi().create_repo(name, private=True, exist_ok=True)


def upload_export(export: Path, name: str) -> None:
    """Uploads all files of an export to a repository, in one commit. Other files there stay.

    Raises:
      UserError: If the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    fix = f"{export} is complete; run the same command again to upload it"
    with _hub_errors(f"push_to_hub: {name} cannot be written", fix):
        HfApi().upload_folder(repo_id=name, folder_path=export, commit_message="Upload model")


@contextmanager
def _hub_errors(problem: str, fix: str) -> Iterator[None]:
    """Raises `UserError` for any error of the Hub in this block."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{problem} ({reason[-1].strip()}); {fix}") from error
