"""Products at a width that is chosen when they run: one compiled function, and only the work of that width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowbit.array import QuantArray


def at_width(
    product: Callable[[jax.Array, QuantArray], jax.Array], x: jax.Array, w: QuantArray, width: int | jax.Array
) -> jax.Array:
    """`product(x, w)` with w read at a width: one of its format's, or an integer in an array, the nearest of them, of
    two the lesser."""
    if isinstance(width, int):
        return product(x, QuantArray(w.fields, w.type.at(width)))
    if not (widths := w.type.format.widths):
        raise ValueError(f"{w.type.format} is read at one width only: leave width out")
    near = jnp.clip(one_integer(width), widths[0], widths[-1])
    index = _one_for_all(jnp.abs(jnp.asarray(widths) - near).argmin())

    def branch(b: int) -> Callable[..., jax.Array]:
        return lambda x, fields: product(x, QuantArray(fields, w.type.at(b)))

    out: jax.Array = jax.lax.switch(index, [branch(b) for b in widths], x, w.fields)
    return out


def one_integer(width: Any) -> jax.Array:
    """The width as an array without dims. Raises TypeError for what is no integer, or several."""
    width = jnp.asarray(width)
    if width.shape or not jnp.issubdtype(width.dtype, jnp.integer):
        raise TypeError(f"width is {width.dtype}{list(width.shape)}: give one integer")
    return width


@jax.custom_batching.custom_vmap
def _one_for_all(width: jax.Array) -> jax.Array:
    return width


@_one_for_all.def_vmap
def _no_batch(axis_size: int, in_batched: Any, width: jax.Array) -> Any:
    raise ValueError(
        f"matmul has {axis_size} widths under jax.vmap, and would compute every width for each of them: loop over them "
        "with jax.lax.map, or pass one width"
    )
