"""The tokenizer that a checkpoint's folder holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowbit.io.error import CheckpointError
from lowbit.io.shards import read_json
from lowbit.models.hub import local

FILE = "tokenizer.json"


def tokenizer(path: str | os.PathLike[str], revision: str | None = None) -> Any:
    """The tokenizer of a model: the `tokenizers` library's Tokenizer of its tokenizer.json.

    Args:
      path: the folder, or a name on the Hugging Face hub, as `lb.models.load` takes it.
      revision: of a model of the hub.

    Raises CheckpointError for a folder without tokenizer.json, or with one that the library cannot read; ImportError
    without the package tokenizers; what `lb.models.load` raises for a path.

    >>> import lowbit as lb
    >>> tokens = lb.models.tokenizer("examples/tinylm/model").encode("def f():").ids
    >>> bytes(tokens)
    b'def f():'
    """
    file = local(path, revision) / FILE
    if not file.exists():
        raise CheckpointError(f"{path} holds no {FILE}: get it with the rest of the checkpoint")
    try:
        from tokenizers import Tokenizer
    except ImportError as err:
        raise ImportError(f"to read {file} needs the package tokenizers: pip install 'lowbit[models]'") from err
    try:
        return Tokenizer.from_file(str(file))
    except Exception as err:  # the library raises nothing more special
        raise CheckpointError(f"{file} is no tokenizer that the library tokenizers can read ({err})") from err


def stop_tokens(path: str | os.PathLike[str], revision: str | None = None) -> tuple[int, ...]:
    """The tokens that end a text, by generation_config.json, or else config.json: their `eos_token_id`. () for none.

    >>> import lowbit as lb
    >>> lb.models.stop_tokens("examples/tinylm/model")
    ()
    """
    return _stated(local(path, revision), "eos_token_id")


def start_token(path: str | os.PathLike[str], revision: str | None = None) -> int | None:
    """The token that begins a text, by the same files: their `bos_token_id`. None if there is none."""
    return next(iter(_stated(local(path, revision), "bos_token_id")), None)


def _stated(folder: Path, key: str) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists() and (stated := read_json(folder / name).get(key)) is not None:
            tokens = stated if isinstance(stated, list) else [stated]
            if not all(type(token) is int for token in tokens):
                raise CheckpointError(f"{folder / name} states {key} = {stated!r}: give an int or a list of them")
            return tuple(tokens)
    return ()
