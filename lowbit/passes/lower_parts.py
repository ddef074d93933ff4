"""A term in parts as a loop, for any platform XLA compiles to (see `tile` for why it is cut, and where).

XLA fuses a slice at a computed start, and a reshape, into what reads them, and on a CPU such a fusion does not
vectorize: it takes several times as long. What comes out of a loop's state is an array like any other. So the slices
of the next part, and the large array that is made of them, are made one turn ahead and wait in the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.ir.dims import fresh
from lowbit.ir.dtypes import numpy_dtype
from lowbit.ir.expr import Expr, Param
from lowbit.ir.walk import params, substitute
from lowbit.passes.tile import Tiles, largest_operand

Env = Mapping[str, jax.Array]
Emit = Callable[[Expr, Env], jax.Array]
Slices = Callable[[jax.Array | int], dict[str, jax.Array]]


def in_parts(tiles: Tiles, env: Env, emit: Emit) -> jax.Array:
    """The value of `tiles.term`: whole parts in a loop, then what remains when the part does not divide the whole."""
    count, rest = divmod(tiles.total, tiles.size)
    whole = count * tiles.size
    cut = {name: list(p.dims).index(tiles.dim) for name, p in params(tiles.term).items() if tiles.dim in p.dims}
    # A part is an index of a dim of its own, so that a slice is one piece of memory for each index before it.
    parted = {
        name: lax.slice_in_dim(env[name], 0, whole, axis=axis).reshape(
            *env[name].shape[:axis], count, tiles.size, *env[name].shape[axis + 1 :]
        )
        for name, axis in cut.items()
    }

    def slices(i: jax.Array | int) -> dict[str, jax.Array]:
        return {n: lax.dynamic_index_in_dim(parted[n], i, axis, keepdims=False) for n, axis in cut.items()}

    value = _loop(tiles, count, slices, env, emit)
    if not rest:
        return value
    last = {n: lax.slice_in_dim(env[n], whole, tiles.total, axis=axis) for n, axis in cut.items()}
    remaining = emit(tiles.part(rest), {**env, **last})
    if tiles.sums:
        return value + remaining
    return jnp.concatenate([value, remaining], list(tiles.term.dims).index(tiles.dim))


def _loop(tiles: Tiles, count: int, slices: Slices, env: Env, emit: Emit) -> jax.Array:
    """The whole parts, summed or side by side."""
    term = tiles.part(tiles.size)
    large = largest_operand(term)
    name = fresh("large", params(term))
    rest = term
    if large is not None:
        rest = substitute(term, {large: Param(name, tuple(large.dims.items()), large.dtype, large.bounds)})
    needed = params(rest).keys()

    def prepare(part: dict[str, jax.Array]) -> dict[str, jax.Array]:
        made = {} if large is None else {name: emit(large, {**env, **part})}
        return made | {n: v for n, v in part.items() if n in needed}

    def turn(state: tuple[Env, dict[str, jax.Array], jax.Array], i: jax.Array) -> tuple[Any, Any]:
        ready, ahead, total = state
        value = emit(rest, {**env, **ready})
        total = total + value if tiles.sums else total
        return (prepare(ahead), slices(i + 2), total), None if tiles.sums else value

    zero = jnp.zeros(list(term.dims.values()) if tiles.sums else (), numpy_dtype(term.dtype))
    first = (prepare(slices(0)), slices(1), zero)
    (ready, _, total), values = lax.scan(turn, first, jnp.arange(count - 1))
    last = emit(rest, {**env, **ready})
    if tiles.sums:
        return total + last
    axis = list(term.dims).index(tiles.dim)
    parts = jnp.moveaxis(jnp.concatenate([values, last[None]]), 0, axis)
    return parts.reshape(*parts.shape[:axis], count * tiles.size, *parts.shape[axis + 2 :])
