"""A stage of a pipeline as kernels decode it, in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowbit.kernels.alu import HALVES
from lowbit.kernels.lanes import Program, in_numpy, tables_in_numpy

Array = np.ndarray[Any, Any]


def staged(p: Program, words: Sequence[Array], *stored: Array, books: Array | None = None) -> Array:
    """A stage as the kernel decodes it, tables of whole rows made beforehand, its inputs in their order."""
    if p.decoder.shared and books is None:
        books = np.stack(stored).astype(HALVES[p.kind])
    made = in_numpy(p, words, *(tables_in_numpy(p, *stored) if p.of_rows else stored), table=books)
    turned = order(p.decoder.consecutive)
    blocks = made.reshape(len(made), -1, len(turned))
    return blocks[..., np.argsort(turned)].reshape(made.shape)


def order(consecutive: int) -> Array:
    """Which input WGMMA's k-th one is where a lane has so many that follow each other: for a block of inputs."""
    return np.arange(4 * consecutive).reshape(4, consecutive // 2, 2).swapaxes(0, 1).reshape(-1)
