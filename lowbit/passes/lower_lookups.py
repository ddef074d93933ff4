"""Look-ups and fields of words as jnp: a whole array, or no more of it than one index of a dim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit.ir.dims import Dims, drop, union
from lowbit.ir.dtypes import numpy_dtype
from lowbit.ir.expr import Const, Expr, Gather, Unpack


@dataclass(frozen=True)
class Operand:
    """A factor of a product, or what some factors came to.

    Attributes:
      cut: makes it anew at one index of a dim. A slice of the whole would have XLA write the whole first.
    """

    value: jax.Array
    dims: Dims
    cut: Callable[[str, int], Operand] | None = None

    def at(self, dim: str, i: int) -> Operand:
        """At one index of a dim, without it."""
        if dim not in self.dims:
            return self
        if self.cut is not None:
            return self.cut(dim, i)
        value = lax.index_in_dim(self.value, i, list(self.dims).index(dim), keepdims=False)
        return Operand(value, drop(self.dims, {dim}))


def operand(e: Expr, val: Mapping[Expr, jax.Array]) -> Operand:
    """A term, given the values of those that it is made of."""
    match e:
        case Gather(table, Const(shape=()) as index, dim):
            return operand(table, val).at(dim, int(index.values))
        case Gather(table, index, dim):
            return look_up(operand(table, val), operand(index, val), dim)
        case Unpack(x):
            return fields(operand(x, val), e)
        case _:
            return Operand(val[e], e.dims)


def look_up(table: Operand, index: Operand, dim: str) -> Operand:
    """A select for one of two entries, a gather for one of more."""
    if table.dims[dim] == 2:
        value, have = _select(table, index, dim)
    else:
        value, have = _gather(table.value, table.dims, index.value, index.dims, dim)
    return Operand(value, have, lambda d, i: look_up(table.at(d, i), index.at(d, i), dim))


def fields(word: Operand, e: Unpack) -> Operand:
    """The fields of `word` along `e.dim`, as `e` has them."""
    mask = jnp.asarray((1 << e.width) - 1, word.value.dtype)
    shift = (jnp.arange(e.count, dtype=word.value.dtype) * e.width).reshape([1] * word.value.ndim + [e.count])
    every = ((word.value[..., None] >> shift) & mask).astype(numpy_dtype(e.dtype))

    def cut(dim: str, i: int) -> Operand:
        if dim != e.dim:
            return fields(word.at(dim, i), e)
        return Operand(((word.value >> i * e.width) & mask).astype(numpy_dtype(e.dtype)), word.dims)

    return Operand(every, {**word.dims, e.dim: e.count}, cut)


def align(a: jax.Array, have: Dims, want: Dims) -> jax.Array:
    """`a` with its dims in the order of `want`, size 1 where it has none."""
    names = list(have)
    a = a.transpose([names.index(k) for k in want if k in have])
    return a.reshape([want[k] if k in have else 1 for k in want])


def _select(table: Operand, index: Operand, dim: str) -> tuple[jax.Array, Dims]:
    entries = [table.at(dim, i) for i in (0, 1)]
    have = union("select", index.dims, entries[0].dims)
    first, second = (align(_floats(entry.value), entry.dims, have) for entry in entries)
    return jnp.where(align(index.value != 0, index.dims, have), second, first), have


def _floats(entries: jax.Array) -> jax.Array:
    """Smaller floats as float32: there are fewer of them before they are selected than after."""
    small = jnp.issubdtype(entries.dtype, jnp.floating) and entries.dtype.itemsize < 4
    return entries.astype(np.float32) if small else entries


def _gather(table: jax.Array, t: Dims, index: jax.Array, i: Dims, dim: str) -> tuple[jax.Array, Dims]:
    """One row gather: shared dims and the looked-up dim number the rows, the table's own dims are the columns."""
    batch = {k: n for k, n in t.items() if k in i}
    columns = {k: n for k, n in t.items() if k not in i and k != dim}
    width = [prod(columns.values())] if prod(columns.values()) > 1 else []  # XLA is faster with entries than rows of 1
    rows = align(table, t, {**batch, dim: t[dim], **columns}).reshape(-1, *width)
    number = index.astype(jnp.int32)
    if batch:
        # Counted where it is used: a loop computes this faster than it loads it.
        first = lax.iota(np.int32, prod(batch.values())) * t[dim]
        number = number + align(first.reshape(list(batch.values())), batch, i)
    out = rows.at[number.reshape(-1)].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )  # proven by the index's range at birth
    have = {**i, **columns}
    return out.reshape(list(have.values())), have
