"""Statistics of activations that a layer may choose its width by, of each row in float32: NaN where it has a NaN."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Statistic = Literal["norm", "largest", "peak"]


def norm(rows: jax.Array) -> jax.Array:
    """||x||, with the gradient 0 at 0."""
    squares = jnp.square(rows.astype(jnp.float32)).sum(-1)
    return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))


def largest(rows: jax.Array) -> jax.Array:
    """max |x|."""
    return jnp.abs(rows).max(-1).astype(jnp.float32)


def peak(rows: jax.Array) -> jax.Array:
    """max |x| / rms x, from 1 to sqrt k, and 0 of zeros. NaN where an entry is infinite, inf where it is out of range.

    >>> import jax.numpy as jnp
    >>> peak(jnp.array([[1.0, -1, 1, -1], [0, 3, 0, 0], [0, 0, 0, 0]])).tolist()
    [1.0, 2.0, 0.0]
    """
    most = largest(rows)
    scaled = rows.astype(jnp.float32) / jnp.where(most == 0, 1, most)[..., None]  # whose squares are in range
    return jnp.where(most == 0, 0, jax.lax.rsqrt(jnp.square(scaled).mean(-1)))


STATISTICS: Mapping[str, Callable[[jax.Array], jax.Array]] = {"norm": norm, "largest": largest, "peak": peak}


def as_estimate(statistic: Statistic) -> dict[str, jax.Array]:
    """What a `lb.nn.Switch` has for this statistic. Raises ValueError for another name."""
    if statistic not in get_args(Statistic):
        raise ValueError(f"statistic={statistic!r} must be one of {', '.join(get_args(Statistic))}")
    one = jnp.float32(1)
    return {"slope": one, "offset": jnp.float32(0)} if statistic == "norm" else {statistic: one}
