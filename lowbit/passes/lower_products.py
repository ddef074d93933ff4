"""Sums of products as jnp: dots, look-ups, and the loops that XLA is to fuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit.ir.dims import Dims, drop
from lowbit.ir.dtypes import DType, is_float, numpy_dtype
from lowbit.ir.expr import Contract, Expr, Gather
from lowbit.ir.order import Step, contraction_order
from lowbit.passes.one_loop import added_up, one_loop, short_dim
from lowbit.passes.style import Style


@dataclass(frozen=True)
class Operand:
    """A factor of a product, or what some factors came to.

    Attributes:
      source: of a factor that is looked up, the table and the index with their dims, and the dim looked up.
    """

    value: jax.Array
    dims: Dims
    source: tuple[jax.Array, Dims, jax.Array, Dims, str] | None = None

    def at(self, dim: str, i: int) -> Operand:
        """At one index of a dim, without it. Of a look-up the index is cut, or XLA would look all of it up first."""
        if dim not in self.dims:
            return self
        if self.source is None:
            return Operand(*_cut(self.value, self.dims, dim, i))
        table, t, index, d, looked_up = self.source
        return Operand(*gather(*_cut(table, t, dim, i), *_cut(index, d, dim, i), looked_up))


def align(a: jax.Array, have: Dims, want: Dims) -> jax.Array:
    """`a` with its dims in the order of `want`, size 1 where it has none."""
    names = list(have)
    a = a.transpose([names.index(k) for k in want if k in have])
    return a.reshape([want[k] if k in have else 1 for k in want])


def gather(table: jax.Array, t: Dims, index: jax.Array, i: Dims, dim: str) -> tuple[jax.Array, Dims]:
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


def contract(e: Contract, val: Mapping[Expr, jax.Array], style: Style) -> jax.Array:
    """A `Contract`, given the values of its factors."""
    acc: DType = "i32" if e.ring == "gf2" else e.acc
    slots = [_operand(f, val) for f in e.factors]
    if style.sums_as_dots and (whole := one_loop(e)):
        return align(_one_loop(whole, slots, acc), whole.out, e.dims)
    for step in contraction_order(e):
        slots.append(Operand(_product(step, [slots[s] for s in step.slots], acc, style), step.out))
    value = align(slots[-1].value.astype(numpy_dtype(acc)), slots[-1].dims, e.dims)
    return (value & 1).astype(numpy_dtype(e.dtype)) if e.ring == "gf2" else value


def _operand(e: Expr, val: Mapping[Expr, jax.Array]) -> Operand:
    source = (val[e.table], e.table.dims, val[e.index], e.index.dims, e.dim) if isinstance(e, Gather) else None
    return Operand(val[e], e.dims, source)


def _product(step: Step, operands: list[Operand], acc: DType, style: Style) -> jax.Array:
    """One or two operands multiplied and summed: a dot when each has dims of its own, else one fused loop."""
    if step.is_dot([o.dims for o in operands]) and not (style.vectors_as_loops and _has_vector(*operands)):
        return _dot(step, operands, acc)
    gone = [i for i, k in enumerate(step.full) if k not in step.out]
    if len(gone) == 1 and (short := short_dim(step)):
        return _unrolled(short, step, operands, acc)
    value = _multiplied(operands, step.full, acc)
    return value.sum(axis=tuple(gone), dtype=numpy_dtype(acc)) if gone else value


def _has_vector(a: Operand, b: Operand) -> bool:
    return any(prod(drop(one.dims, other.dims).values()) == 1 for one, other in ((a, b), (b, a)))


def _multiplied(operands: list[Operand], full: Dims, acc: DType) -> jax.Array:
    return reduce(jnp.multiply, (align(o.value.astype(numpy_dtype(acc)), o.dims, full) for o in operands))


def _unrolled(dim: str, step: Step, operands: list[Operand], acc: DType) -> jax.Array:
    """A short sum as additions: XLA fuses them with what makes the terms, where a reduction would write them out."""
    each = ([o.at(dim, i) for o in operands] for i in range(step.full[dim]))
    return reduce(jnp.add, (_multiplied(operands, added_up(step), acc) for operands in each))


def _one_loop(step: Step, operands: list[Operand], acc: DType) -> jax.Array:
    """All of a product summed as a product with ones (see `Style.sums_as_dots`)."""
    short, left = short_dim(step), added_up(step)
    terms = _unrolled(short, step, operands, acc) if short else _multiplied(operands, left, acc)
    summed = {k: n for k, n in left.items() if k not in step.out}
    if not summed:
        return align(terms, left, step.out)
    rows = align(terms, left, {**step.out, **summed}).reshape(*step.out.values(), -1)
    return jnp.matmul(rows, jnp.ones(rows.shape[-1], rows.dtype), precision=lax.Precision.HIGHEST)


def _cut(a: jax.Array, dims: Dims, dim: str, i: int) -> tuple[jax.Array, Dims]:
    if dim not in dims:
        return a, dims
    return lax.index_in_dim(a, i, list(dims).index(dim), keepdims=False), drop(dims, {dim})


def _dot(step: Step, operands: list[Operand], acc: DType) -> jax.Array:
    # The larger operand on the left, with its rows as they are stored: a CPU multiplies that without a copy of it.
    a, b = sorted(operands, key=lambda o: -o.value.size)
    letter = {k: chr(97 + i) for i, k in enumerate(step.full)}
    spec = ",".join("".join(letter[k] for k in o.dims) for o in (a, b))
    same = a.value.dtype == b.value.dtype and is_float(acc)
    left, right = (o.value if same else o.value.astype(numpy_dtype(acc)) for o in (a, b))
    # Of float32 a GPU would round to TF32, of floats of 8 bits sum in fewer than 32.
    exact = left.dtype == np.float32 or (is_float(acc) and left.dtype.itemsize == 1)
    return jnp.einsum(
        f"{spec}->{''.join(letter[k] for k in step.out)}",
        left,
        right,
        preferred_element_type=numpy_dtype(acc),
        precision=lax.Precision.HIGHEST if exact else None,
    )
