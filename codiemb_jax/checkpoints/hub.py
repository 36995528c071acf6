"""Uploads exports to the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codiemb_jax.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
"""Files of weights. An older one of the first name would be loaded instead of new ones of the others."""


def create_repository(name: str) -> None:
    """Creates a private repository OWNER/NAME, unless it exists.

    Raises:
      UserError: If the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi  # slow, and not needed otherwise

    with _hub_errors(f"push_to_hub: {name} cannot be created", "log in with `hf auth login`, or set it to null"):
        HfApi().create_repo(name, private=True, exist_ok=True)


def upload_export(export: Path, name: str, shown: str) -> None:
    """Uploads all files of an export to a repository, in one commit.

    Weights there that the export does not replace are deleted, other files stay.

    Args:
      export: The export.
      name: The repository, OWNER/NAME.
      shown: The path of the export in messages.

    Raises:
      UserError: If the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    fix = f"{shown} is complete; run the same command again to upload it"
    with _hub_errors(f"push_to_hub: {name} cannot be written", fix):
        HfApi().upload_folder(
            repo_id=name, folder_path=export, commit_message="Upload model", delete_patterns=list(WEIGHTS)
        )


@contextmanager
def _hub_errors(problem: str, fix: str) -> Iterator[None]:
    """Raises `UserError` for any error of the Hub in this block."""
    try:
        yield
    except Exception as error:  # huggingface_hub raises many, among them RuntimeError if an upload fails
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = str(cause).strip().splitlines() or [type(cause).__name__]
        raise UserError(f"{problem} ({reason[-1].strip()}); {fix}") from error
