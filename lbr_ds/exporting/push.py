"""Upload an exported folder to a model repository of the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lbr_ds.errors import ConfigError, EnvironmentProblem

log = logging.getLogger(__name__)

_NEEDED = ("lbr.json", "modules.json", "parity.json", "README.md")
_REFUSED = (401, 403, 404)  # the hub's answers to a token that is missing or may not write
_NEVER = (".*", "*.part", "*.tmp", "__pycache__")  # editors' and interrupted programs' files


def push(
    folder: Path,
    name: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str = "Upload a model exported by lbr-ds",
    endpoint: str | None = None,
) -> str:
    """Create the repository `name` if there is none, and upload `folder` to it in one commit.

    The token is the one that `hf auth login` stored, or HF_TOKEN; HF_ENDPOINT names another hub.
    Files that the repository has are not sent again, so a repeated command resumes an interrupted
    upload.

    Args:
        folder: A folder made by `lbr-ds export`.
        name: `OWNER/NAME`, or `NAME` for the token's own account.
        private: Whether a new repository is private; an existing one keeps its visibility.
        revision: A branch, created when it is missing; None is the main branch.
        message: Of the commit.
        endpoint: Address of the hub; None: the default, or HF_ENDPOINT.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: `folder` is not an export, or `name` is not a repository's name.
        EnvironmentProblem: The hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    missing = [file for file in _NEEDED if not (folder / file).is_file()]
    if missing:
        raise ConfigError(
            f"{folder}: has no {missing[0]}, so it is not an exported folder; "
            "make one with `lbr-ds export RUN FOLDER`"
        )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    log.info("uploading %s (%.1f MB) to %s", folder, size / 1e6, name)
    api = HfApi(library_name="lbr-ds")
    try:
        repository = str(api.create_repo(name, private=private, exist_ok=True).repo_id)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=list(_NEVER),
        )
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is not a repository's name: {_reason(error)}") from None
    except Exception as error:  # httpx, requests and huggingface_hub each raise their own
        raise EnvironmentProblem(
            f"cannot upload to {name}: {_reason(error)} ({_cure(error)})"
        ) from error
    return str(commit.commit_url)


def _cure(error: Exception) -> str:
    """Return what the user can do: log in if the hub refused the token, else try again."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _REFUSED or isinstance(error, LocalTokenNotFoundError):
        return (
            "log in with `hf auth login` or set HF_TOKEN to a token that may write there, then "
            "repeat the command"
        )
    return "check the network and repeat the command"


def _reason(error: Exception) -> str:
    """Return the first line of an error, or its class name if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
