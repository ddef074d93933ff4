"""Texts as the tokens that a model of a folder is given."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.models import Decoder, tokenizer


def read(path: str) -> str:
    """The text of a file. Raises ValueError for one that is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(f"{path} is no UTF-8 text ({err}): convert it") from err


def encoded(folder: str, model: Decoder, text: str) -> np.ndarray:
    """int32 [tokens] by the folder's tokenizer. Raises ValueError for tokens that the model does not have."""
    ids = np.asarray(tokenizer(folder).encode(text).ids, np.int32)
    if ids.size and (largest := int(ids.max())) >= model.config.vocab:
        raise ValueError(
            f"{folder}: the tokenizer gives token {largest}, and the model has {model.config.vocab}: the two do not "
            "belong together"
        )
    return ids


def samples(ids: np.ndarray, count: int, length: int, what: str) -> list[jax.Array]:
    """`count` windows of a text, evenly spread, or fewer that do not overlap: int32 [1, length] each.

    Raises ValueError for a text shorter than one of them.
    """
    if len(ids) < length:
        raise ValueError(f"{what} has {len(ids)} tokens, and a window has {length}: give a longer text or --length")
    whole = min(count, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, whole).astype(int)
    return [jnp.asarray(ids[None, at : at + length]) for at in starts]
