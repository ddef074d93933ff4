"""What clocks share, with jax or without: how many weights keep caches cold, and what is said of several times."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from statistics import median

ROTATED = 512 << 20
"""Bytes of weights that are read before one is read again: ten times the L2 cache of an H100."""
ROUNDS = 5


def copies(nbytes: int) -> int:
    """How many weights of a size are used in turn: at least two."""
    return max(2, ceil(ROTATED / nbytes))


def middle(times: Sequence[float]) -> dict[str, float]:
    """The median, and how far the others lie apart, as a share of it."""
    mid = median(times)
    return {"seconds": mid, "spread": (max(times) - min(times)) / mid}
