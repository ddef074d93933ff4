"""Reading 6: a term as a jnp program, for any platform XLA compiles to.

Float sums accumulate in the term's accumulator; integer steps are exact. Arrays are laid out in the order of each
node's dims, so a layout change appears as an XLA transpose only where the term asks for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from math import inf, prod
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit.ir.call import call_spec
from lowbit.ir.dims import Dims, drop, union
from lowbit.ir.dtypes import DType, is_float, numpy_dtype
from lowbit.ir.expr import (
    Add,
    Bitcast,
    Bucket,
    Call,
    Cast,
    Concat,
    Const,
    Contract,
    Expr,
    Gather,
    Merge,
    Pad,
    Param,
    Slice,
    Split,
    Unpack,
)
from lowbit.ir.order import Step, contraction_order
from lowbit.ir.walk import params, topo
from lowbit.passes.tile import Tiles, tile

UNROLL = 8
"""Terms up to which a sum over one dim is written as additions: planes are few."""
COMPARE = 16
"""Bucket counts up to which sums are made by comparing, in a fixed order; beyond, by scatter-add."""


def emit(root: Expr, env: Mapping[str, jax.Array], limit: float = inf) -> jax.Array:
    """The value of a term; call it under `jax.jit`. Dims in the order of `root.dims`, dtype that of `root`.

    With a `limit`, what would write larger arrays in between, in bytes, is made in a loop over parts (see `tile`).

    Raises KeyError for a leaf that `env` lacks, ValueError for one of another shape or dtype, and NotImplementedError
    for an opaque step without a jnp reading or for float64 without `jax_enable_x64`.
    """
    if (tiles := tile(root, limit)) is not None:
        outer = {name: emit(e, env, limit) for name, e in tiles.outer.items()}
        return _in_parts(tiles, {**env, **outer}, limit)
    val: dict[Expr, jax.Array] = {}
    for e in topo(root):
        if e.dtype == "f64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            raise NotImplementedError(f"{e.type}: float64 terms need jax_enable_x64")
        val[e] = _value(e, env, val)
    return val[root]


def _in_parts(tiles: Tiles, env: Mapping[str, jax.Array], limit: float) -> jax.Array:
    """One part after the other, and then what remains when the part does not divide the whole."""
    count, rest = divmod(tiles.total, tiles.size)
    term, whole = tiles.part(tiles.size), count * tiles.size
    cut = {name: list(p.dims).index(tiles.dim) for name, p in params(tiles.term).items() if tiles.dim in p.dims}
    # A part is an index of a dim of its own: a slice at a computed start would not vectorize where it is fused.
    parted = {
        name: lax.slice_in_dim(env[name], 0, whole, axis=axis).reshape(
            *env[name].shape[:axis], count, tiles.size, *env[name].shape[axis + 1 :]
        )
        for name, axis in cut.items()
    }

    def one(i: jax.Array) -> jax.Array:
        return emit(
            term, {**env, **{n: lax.dynamic_index_in_dim(parted[n], i, a, False) for n, a in cut.items()}}, limit
        )

    last = {n: lax.slice_in_dim(env[n], whole, tiles.total, axis=a) for n, a in cut.items()} if rest else {}
    if tiles.sums:
        zero = jnp.zeros(list(term.dims.values()), numpy_dtype(term.dtype))
        value: jax.Array = lax.fori_loop(0, count, lambda i, sum_: sum_ + one(i), zero)
        return value + emit(tiles.part(rest), {**env, **last}, limit) if rest else value
    axis = list(term.dims).index(tiles.dim)
    parts = jnp.moveaxis(lax.map(one, jnp.arange(count)), 0, axis)
    value = parts.reshape(*parts.shape[:axis], whole, *parts.shape[axis + 2 :])
    return jnp.concatenate([value, emit(tiles.part(rest), {**env, **last}, limit)], axis) if rest else value


def align(a: jax.Array, have: Dims, want: Dims) -> jax.Array:
    """`a` with its dims in the order of `want`, size 1 where it has none."""
    names = list(have)
    a = a.transpose([names.index(k) for k in want if k in have])
    return a.reshape([want[k] if k in have else 1 for k in want])


def _value(e: Expr, env: Mapping[str, jax.Array], val: dict[Expr, jax.Array]) -> jax.Array:
    match e:
        case Param():
            return _leaf(e, env)
        case Const():
            return jnp.asarray(e.values)
        case Unpack(x, width, _, count):
            return _unpack(val[x], width, count).astype(numpy_dtype(e.dtype))
        case Bitcast():
            return _bitcast(e, val[e.x])
        case Gather(table, index, dim):
            return _gather(e, val[table], val[index], dim)
        case Bucket():
            return _bucket(e, val[e.x], val[e.index])
        case Add(a, b):
            return align(val[a], a.dims, e.dims) + align(val[b], b.dims, e.dims)
        case Contract():
            return _contract(e, [val[f] for f in e.factors])
        case Split():
            return val[e.x].reshape(list(e.dims.values()))
        case Merge(x, parts, _):
            order = {k: x.dims[k] for k in (*(k for k in x.dims if k not in parts), *parts)}
            return align(val[x], x.dims, order).reshape(list(e.dims.values()))
        case Cast():
            return val[e.x].astype(numpy_dtype(e.to))
        case Slice(x, dim, start, stop):
            return jax.lax.slice_in_dim(val[x], start, stop, axis=list(x.dims).index(dim))
        case Pad(x, dim, before, after):
            return jnp.pad(val[x], [(before, after) if k == dim else (0, 0) for k in x.dims])
        case Concat(parts, dim):
            return _concat(dim, [(val[p], p.dims) for p in parts])
        case Call():
            return _call(e, [val[o] for o in e.operands])
        case _:
            assert_never(e)


def _call(e: Call, operands: list[jax.Array]) -> jax.Array:
    xla = call_spec(e.name).xla
    if xla is None:
        raise NotImplementedError(f"call {e.name!r} has no jnp reading: register it with `xla=`")
    v = jnp.asarray(xla(*operands))
    if v.shape != tuple(e.dims.values()) or v.dtype != numpy_dtype(e.dtype):
        raise ValueError(f"call {e.name!r} is {e.type}, but its jnp reading makes {v.dtype}{list(v.shape)}")
    return v


def _leaf(e: Param, env: Mapping[str, jax.Array]) -> jax.Array:
    if e.name not in env:
        raise KeyError(f"no array for param {e.name!r}: {e.type}")
    v = env[e.name]
    if v.shape != tuple(e.dims.values()) or v.dtype != numpy_dtype(e.dtype):
        raise ValueError(f"param {e.name!r} is {e.type}, but the array is {v.dtype}{list(v.shape)}")
    return v


def _unpack(word: jax.Array, width: int, count: int) -> jax.Array:
    shift = (jnp.arange(count, dtype=word.dtype) * width).astype(word.dtype).reshape([1] * word.ndim + [count])
    return (word[..., None] >> shift) & jnp.asarray((1 << width) - 1, word.dtype)


def _concat(dim: str, parts: list[tuple[jax.Array, Dims]]) -> jax.Array:
    first = parts[0][1]
    arrays = [align(a, dims, {**first, dim: dims[dim]}) for a, dims in parts]
    return jnp.concatenate(arrays, axis=list(first).index(dim))


def _bitcast(e: Bitcast, v: jax.Array) -> jax.Array:
    if e.dim in e.x.dims:  # elements join along the last axis, index 0 least significant
        v = jnp.moveaxis(v, list(e.x.dims).index(str(e.dim)), -1)
    return jax.lax.bitcast_convert_type(v, numpy_dtype(e.to))


def _gather(e: Gather, table: jax.Array, index: jax.Array, dim: str) -> jax.Array:
    """One row gather: shared dims and the looked-up dim number the rows, the table's own dims are the columns."""
    t, i = e.table.dims, e.index.dims
    batch = {k: n for k, n in t.items() if k in i}
    columns = {k: n for k, n in t.items() if k not in i and k != dim}
    rows = align(table, t, {**batch, dim: t[dim], **columns}).reshape(-1, prod(columns.values()))
    number = index.astype(jnp.int32)
    if batch:
        # Counted where it is used: a loop computes this faster than it loads it.
        first = lax.iota(np.int32, prod(batch.values())) * t[dim]
        number = number + align(first.reshape(list(batch.values())), batch, i)
    out = rows.at[number.reshape(-1)].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )  # proven by the index's range at birth
    have = {**i, **columns}
    return align(out.reshape(list(have.values())), have, e.dims)


def _bucket(e: Bucket, x: jax.Array, index: jax.Array) -> jax.Array:
    full = union("bucket", e.x.dims, e.index.dims)
    acc = numpy_dtype(e.dtype)
    if e.size <= COMPARE:
        hit = align(index, e.index.dims, full)[..., None] == jnp.arange(e.size, dtype=index.dtype).reshape(
            [1] * len(full) + [e.size]
        )
        picked = jnp.where(hit, align(x, e.x.dims, full).astype(acc)[..., None], jnp.zeros((), acc))
        return picked.sum(axis=tuple(a for a, k in enumerate(full) if k in e.over), dtype=acc)
    kept = drop(full, e.over)
    order = {**kept, **{k: full[k] for k in full if k in e.over}}
    summed = prod(full[k] for k in e.over)
    values = jnp.broadcast_to(align(x, e.x.dims, order), list(order.values())).reshape(-1, summed).astype(acc)
    number = jnp.broadcast_to(align(index, e.index.dims, order), list(order.values())).reshape(-1, summed)
    row = jnp.arange(values.shape[0])[:, None]
    sums = jnp.zeros((values.shape[0], e.size), acc).at[row, number].add(values)
    return sums.reshape([*kept.values(), e.size])


def _contract(e: Contract, factors: list[jax.Array]) -> jax.Array:
    acc: DType = "i32" if e.ring == "gf2" else e.acc
    slots = list(zip(factors, (f.dims for f in e.factors), strict=True))
    for step in contraction_order(e):
        slots.append((_product(step, [slots[s] for s in step.slots], acc), step.out))
    value, dims = slots[-1]
    value = align(value.astype(numpy_dtype(acc)), dims, e.dims)
    return (value & 1).astype(numpy_dtype(e.dtype)) if e.ring == "gf2" else value


def _product(step: Step, operands: list[tuple[jax.Array, Dims]], acc: DType) -> jax.Array:
    """One or two operands multiplied and summed: a dot when each has dims of its own, else one fused loop."""
    dtype = numpy_dtype(acc)
    if step.is_dot([d for _, d in operands]):
        return _dot(step, operands, acc)
    factors = [align(a.astype(dtype), d, step.full) for a, d in operands]
    gone = tuple(i for i, k in enumerate(step.full) if k not in step.out)
    if len(gone) == 1 and list(step.full.values())[gone[0]] <= UNROLL:
        return _unrolled(factors, gone[0], list(step.full.values())[gone[0]])
    value = reduce(jnp.multiply, factors)
    return value.sum(axis=gone, dtype=dtype) if gone else value


def _unrolled(factors: list[jax.Array], axis: int, size: int) -> jax.Array:
    """A short sum as additions: XLA fuses them with what makes the terms, where a reduction would write them out."""

    def term(i: int) -> jax.Array:
        at = [jax.lax.index_in_dim(f, min(i, f.shape[axis] - 1), axis, keepdims=False) for f in factors]
        return reduce(jnp.multiply, at)

    return reduce(jnp.add, map(term, range(size)))


def _dot(step: Step, operands: list[tuple[jax.Array, Dims]], acc: DType) -> jax.Array:
    # The larger operand on the left, with its rows as they are stored: a CPU multiplies that without a copy of it.
    (a, a_dims), (b, b_dims) = sorted(operands, key=lambda o: -o[0].size)
    letter = {k: chr(97 + i) for i, k in enumerate(step.full)}
    spec = ",".join("".join(letter[k] for k in d) for d in (a_dims, b_dims))
    same = a.dtype == b.dtype and is_float(acc)
    left, right = (a, b) if same else (a.astype(numpy_dtype(acc)), b.astype(numpy_dtype(acc)))
    return jnp.einsum(
        f"{spec}->{''.join(letter[k] for k in step.out)}",
        left,
        right,
        preferred_element_type=numpy_dtype(acc),
        precision=jax.lax.Precision.HIGHEST if left.dtype == np.float32 else None,  # a GPU would round to TF32
    )
