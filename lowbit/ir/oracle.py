"""Reading 2: what a term means, in numpy: exact integers, real numbers in float64, slow and obvious.

Only a Cast that says so rounds. Accumulation error belongs to a lowering and is bounded in its tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np

from lowbit.ir.call import call_spec
from lowbit.ir.dims import Dims, union
from lowbit.ir.dtypes import DType, bits, is_float, numpy_dtype
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

Array = np.ndarray[Any, Any]


def evaluate(root: Expr, env: Mapping[str, Any]) -> Array:
    """The value of a term, dims in the order of `root.dims`: float64 for float terms, int64 for integer ones.

    Raises KeyError for a leaf that `env` lacks and ValueError for an array that is not of the leaf's type.

    >>> import numpy as np
    >>> from lowbit.ir import Unpack, evaluate, param
    >>> evaluate(Unpack(param("w", "u8", n=2), 4, "v", 2), {"w": np.array([0x21, 0xF3])})
    array([[ 1,  2],
           [ 3, 15]])
    """
    val: dict[Expr, Array] = {}
    for e in topo(root):
        v = _wide(_value(e, env, val), e.dtype)
        assert v.shape == tuple(e.dims.values()), (e, v.shape)
        val[e] = v
    return val[root]


def _wide(v: Array, d: DType) -> Array:
    return v.astype(np.float64 if is_float(d) else np.int64)


def align(a: Array, have: Dims, want: Dims) -> Array:
    """`a` with its dims in the order of `want`, size 1 where it has none."""
    names = list(have)
    a = a.transpose([names.index(k) for k in want if k in have])
    return a.reshape([want[k] if k in have else 1 for k in want])


def _value(e: Expr, env: Mapping[str, Any], val: dict[Expr, Array]) -> Array:
    match e:
        case Param():
            return _leaf(e, env)
        case Const():
            return e.values
        case Unpack(x, width, _, count):
            return (val[x][..., None] >> (width * np.arange(count))) & ((1 << width) - 1)
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
        case Split(x, _, _):
            return val[x].reshape(list(e.dims.values()))
        case Merge(x, parts, _):
            order = {k: x.dims[k] for k in (*(k for k in x.dims if k not in parts), *parts)}
            return align(val[x], x.dims, order).reshape(list(e.dims.values()))
        case Cast(x, to, rounds):
            return val[x].astype(numpy_dtype(to)) if rounds else val[x]
        case Slice(x, dim, start, stop):
            return val[x][tuple(slice(start, stop) if k == dim else slice(None) for k in x.dims)]
        case Pad(x, dim, before, after):
            return np.pad(val[x], [(before, after) if k == dim else (0, 0) for k in x.dims])
        case Concat(parts, dim):
            first = parts[0].dims
            arrays = [align(val[p], p.dims, {**first, dim: p.dims[dim]}) for p in parts]
            return np.concatenate(arrays, [*first].index(dim))
        case Call(name, operands):
            return call_spec(name).oracle(*(_narrow(val[o], o.dtype) for o in operands))
        case _:
            assert_never(e)


def _narrow(v: Array, d: DType) -> Array:
    return v.astype(numpy_dtype(d))


def _leaf(e: Param, env: Mapping[str, Any]) -> Array:
    if e.name not in env:
        raise KeyError(f"no array for param {e.name!r}: {e.type}")
    v = np.asarray(env[e.name])
    if v.shape != tuple(e.dims.values()) or (v.dtype.kind in "iub") == is_float(e.dtype):
        raise ValueError(f"param {e.name!r} is {e.type}, but the array is {v.dtype}{list(v.shape)}")
    if e.bounds is not None and v.size and not (e.bounds[0] <= v.min() and v.max() <= e.bounds[1]):
        raise ValueError(f"param {e.name!r} ranges over {e.bounds}, but the array holds {v.min()}..{v.max()}")
    return v


def _bitcast(e: Bitcast, v: Array) -> Array:
    v, to = _narrow(v, e.x.dtype), numpy_dtype(e.to)
    if bits(e.x.dtype) < bits(e.to):  # the element of index 0 along the dim is the least significant
        v = np.moveaxis(v, list(e.x.dims).index(str(e.dim)), -1)
        return v.copy().view(to)[..., 0]
    if bits(e.x.dtype) > bits(e.to):
        return v[..., None].copy().view(to)
    return v.copy().view(to)


def _gather(e: Gather, table: Array, index: Array, dim: str) -> Array:
    at = tuple(
        align(index, e.index.dims, e.dims) if k == dim else align(np.arange(n), {k: n}, e.dims)
        for k, n in e.table.dims.items()
    )
    return np.broadcast_to(table[at], list(e.dims.values()))


def _bucket(e: Bucket, x: Array, index: Array) -> Array:
    full = union("bucket", e.x.dims, e.index.dims)
    shape = list(full.values())
    kept = {k: n for k, n in full.items() if k not in e.over}
    out = np.zeros([*kept.values(), e.size], x.dtype)
    places = [align(np.arange(n), {k: n}, full) for k, n in kept.items()]
    at = np.broadcast_to(align(index, e.index.dims, full), shape)
    np.add.at(out, (*places, at), np.broadcast_to(align(x, e.x.dims, full), shape))
    return out


def _contract(e: Contract, values: list[Array]) -> Array:
    full = union("contract", *(f.dims for f in e.factors))
    letter = {k: chr(97 + i) for i, k in enumerate(full)}
    terms = ",".join("".join(letter[k] for k in f.dims) for f in e.factors)
    spec = f"{terms}->{''.join(letter[k] for k in e.dims)}"
    out = np.einsum(spec, *(_wide(v, e.dtype) for v in values), optimize=True)
    return np.asarray(out & 1 if e.ring == "gf2" else out)
