"""Reading 6: a term as a jnp program, for any platform XLA compiles to.

Float sums accumulate in the term's accumulator; integer steps are exact. Arrays are laid out in the order of each
node's dims, so a layout change appears as an XLA transpose only where the term asks for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.ir.call import call_spec
from lowbit.ir.dims import Dims, drop, union
from lowbit.ir.dtypes import numpy_dtype
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
from lowbit.ir.walk import topo
from lowbit.passes.lower_lookups import align as align
from lowbit.passes.lower_lookups import operand
from lowbit.passes.lower_parts import in_parts
from lowbit.passes.lower_products import contract
from lowbit.passes.style import PLAIN, Style
from lowbit.passes.tile import tile

COMPARE = 16
"""Bucket counts up to which sums are made by comparing, in a fixed order; beyond, by scatter-add."""


def emit(root: Expr, env: Mapping[str, jax.Array], style: Style = PLAIN) -> jax.Array:
    """The value of a term; call it under `jax.jit`. Dims in the order of `root.dims`, dtype that of `root`.

    Args:
      env: the arrays of its leaves, by name.
      style: what the platform's XLA makes fast programs of; the value is the same up to rounding.

    Raises KeyError for a leaf that `env` lacks, ValueError for one of another shape or dtype, and NotImplementedError
    for an opaque step without a jnp reading or for float64 without `jax_enable_x64`.
    """
    if (tiles := tile(root, style.part)) is not None:
        outer = {name: emit(e, env, style) for name, e in tiles.outer.items()}
        return in_parts(tiles, {**env, **outer}, lambda e, values: emit(e, values, style))
    val: dict[Expr, jax.Array] = {}
    for e in topo(root):
        if e.dtype == "f64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            raise NotImplementedError(f"{e.type}: float64 terms need jax_enable_x64")
        val[e] = _value(e, env, val, style)
    return val[root]


def _value(e: Expr, env: Mapping[str, jax.Array], val: dict[Expr, jax.Array], style: Style) -> jax.Array:
    match e:
        case Param():
            return _leaf(e, env)
        case Const():
            return jnp.asarray(e.values)
        case Unpack() | Gather():
            found = operand(e, val)
            return align(found.value, found.dims, e.dims).astype(numpy_dtype(e.dtype))
        case Bitcast():
            return _bitcast(e, val[e.x])
        case Bucket():
            return _bucket(e, val[e.x], val[e.index])
        case Add(a, b):
            return align(val[a], a.dims, e.dims) + align(val[b], b.dims, e.dims)
        case Contract():
            return contract(e, val, style)
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


def _concat(dim: str, parts: list[tuple[jax.Array, Dims]]) -> jax.Array:
    first = parts[0][1]
    arrays = [align(a, dims, {**first, dim: dims[dim]}) for a, dims in parts]
    return jnp.concatenate(arrays, axis=list(first).index(dim))


def _bitcast(e: Bitcast, v: jax.Array) -> jax.Array:
    if e.dim in e.x.dims:  # elements join along the last axis, index 0 least significant
        v = jnp.moveaxis(v, list(e.x.dims).index(str(e.dim)), -1)
    return jax.lax.bitcast_convert_type(v, numpy_dtype(e.to))


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
