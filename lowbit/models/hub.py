"""The folder of a checkpoint: one on this machine, or one of the Hugging Face hub, downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lowbit.io.error import CheckpointError

PATTERNS = ["*.json", "*.safetensors"]
NO_PATTERNS = ["*/*", "consolidated*"]
"""Folders, and what some projects keep beside the same weights."""
TIMEOUT = 10.0
"""Seconds that the hub may take to answer."""


def local(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder itself, or the one that a name on the hub, "organization/model", was downloaded to.

    Raises CheckpointError for a file, FileNotFoundError for what is neither a folder nor such a name, OSError when the
    hub cannot be reached and the model was never downloaded, or has none of that name; ImportError without the package
    huggingface_hub.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{str(path)!r} is a file: name the folder that holds it and config.json")
    if not isinstance(path, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(f"there is no folder {str(path)!r}, and a model of the hub is 'organization/model'")
    return _downloaded(path, revision)


def _downloaded(name: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as err:
        raise ImportError(
            f"there is no folder {name!r}, and to download it from the hub needs the package huggingface_hub: "
            "pip install 'lowbit[models]'"
        ) from err
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=PATTERNS, ignore_patterns=NO_PATTERNS, etag_timeout=TIMEOUT
            )
        )
    except Exception as err:  # whatever the client makes of a network
        why = str(err).strip().partition("\n")[0] or type(err).__name__
        raise OSError(
            f"there is no folder {name!r}, and the hub does not give it ({why}): download the folder by other means "
            "and give its path"
        ) from err
