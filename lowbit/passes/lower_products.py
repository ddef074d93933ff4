"""Sums of products as jnp: dots, look-ups, and the loops that XLA is to fuse."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit.ir.dims import Dims
from lowbit.ir.dtypes import DType, is_float, numpy_dtype
from lowbit.ir.expr import Contract, Expr
from lowbit.ir.order import Step, contraction_order, has_vector
from lowbit.passes.lower_lookups import Operand, align, operand
from lowbit.passes.one_loop import added_up, one_loop, short_dim
from lowbit.passes.style import Style


def contract(e: Contract, val: Mapping[Expr, jax.Array], style: Style) -> jax.Array:
    """A `Contract`, given the values of its factors."""
    acc: DType = "i32" if e.ring == "gf2" else e.acc
    slots = [operand(f, val) for f in e.factors]
    if style.sums_as_dots and (whole := one_loop(e)):
        return align(_one_loop(whole, slots, acc), whole.out, e.dims)
    for step in contraction_order(e):
        slots.append(Operand(_product(step, [slots[s] for s in step.slots], acc, style), step.out))
    value = align(slots[-1].value.astype(numpy_dtype(acc)), slots[-1].dims, e.dims)
    return (value & 1).astype(numpy_dtype(e.dtype)) if e.ring == "gf2" else value


def _product(step: Step, operands: list[Operand], acc: DType, style: Style) -> jax.Array:
    """One or two operands multiplied and summed: a dot when each has dims of its own, else one fused loop."""
    dims = [o.dims for o in operands]
    if step.is_dot(dims) and not (style.vectors_as_loops and has_vector(*dims)):
        return _dot(step, operands, acc)
    gone = [i for i, k in enumerate(step.full) if k not in step.out]
    if len(gone) == 1 and (short := short_dim(step)):
        return _unrolled(short, step, operands, acc)
    value = _multiplied(operands, step.full, acc)
    return value.sum(axis=tuple(gone), dtype=numpy_dtype(acc)) if gone else value


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
