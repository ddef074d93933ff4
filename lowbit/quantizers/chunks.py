"""Rows in contiguous chunks of one size, each with what its errors cost: GuidedQuant's (Kim et al., ICML 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def by_chunk(solve: Callable[..., Any], gram: jax.Array, *rows: jax.Array) -> Any:
    """`solve(gram, *rows)` for arrays of n rows: with gram [k, k] at once, with gram [c, k, k] for each of c chunks.

    Raises ValueError unless c divides n.
    """
    if gram.ndim == 2:
        return solve(gram, *rows)
    _check(len(gram), n := len(rows[0]))
    size = n // len(gram)
    parts = [solve(one, *(a[i * size : (i + 1) * size] for a in rows)) for i, one in enumerate(gram)]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def in_chunks(values: jax.Array, n: int) -> jax.Array:
    """Values [k] as they are; [c, k] of chunks for each of n rows [n, k]. Raises ValueError unless c divides n."""
    if values.ndim == 1:
        return values
    _check(len(values), n)
    return jnp.repeat(values, n // len(values), 0)


def _check(chunks: int, n: int) -> None:
    if n % chunks:
        raise ValueError(
            f"the importance has {chunks} chunks of outputs, and the weight {n} outputs: they must divide it"
        )
