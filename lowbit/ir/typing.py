"""Reading 1: the type of a node, which is also the verifier, for a node that has no type cannot be built."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import assert_never

import numpy as np

from lowbit.ir.call import call_type
from lowbit.ir.dims import DimError, Dims, RangeError, Shape, check_ints, check_name, check_shape, drop, show, union
from lowbit.ir.dtypes import Bounds, DType, bits, converts_exactly, full_range, holds, is_float, numpy_dtype
from lowbit.ir.expr import (
    CONST_LIMIT,
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


@dataclass(frozen=True)
class Type:
    """Named sizes, the element type and, for integers, the inclusive range of the values."""

    dims: Dims
    dtype: DType
    bounds: Bounds | None

    def __str__(self) -> str:
        return f"{self.dtype}{show(self.dims)}"


def typeof(e: Expr) -> Type:
    match e:
        case Param(name, shape, dtype, within):
            return _param(name, shape, dtype, within)
        case Const():
            return _const(e)
        case Unpack():
            return _unpack(e)
        case Bitcast():
            return _bitcast(e)
        case Gather():
            return _gather(e)
        case Bucket():
            return _bucket(e)
        case Add(a, b):
            return _add(a.type, b.type)
        case Contract():
            return _contract(e)
        case Split(x, dim, into):
            return _split(x.type, dim, into)
        case Merge(x, parts, into):
            return _merge(x.type, parts, into)
        case Cast():
            return _cast(e)
        case Slice(x, dim, start, stop):
            size = _size("slice", x.type, dim)
            check_ints(f"slice {dim!r}", start, stop)
            if not 0 <= start < stop <= size:
                raise DimError(f"slice {dim!r} {start}..{stop} of {x.type}: needs 0 <= start < stop <= {size}")
            return Type({k: stop - start if k == dim else n for k, n in x.dims.items()}, x.dtype, x.bounds)
        case Pad(x, dim, before, after):
            return _pad(x.type, dim, before, after)
        case Concat(parts, dim):
            return _concat(tuple(p.type for p in parts), dim)
        case Call(name, operands):
            return call_type(name, *(o.type for o in operands))
        case _:
            assert_never(e)


def _size(what: str, t: Type, dim: str) -> int:
    if dim not in t.dims:
        raise DimError(f"{what} over {dim!r}: the operand is {t}, which has no such dim")
    return t.dims[dim]


def _param(name: str, shape: Shape, dtype: DType, within: Bounds | None) -> Type:
    check_name("param", name)
    check_shape(f"param {name}", shape)
    if is_float(dtype):
        if within is not None:
            raise DimError(f"param {name}: a {dtype} array has no value range, but {within} was given")
        return Type(dict(shape), dtype, None)
    bounds = full_range(dtype) if within is None else within
    check_ints(f"param {name} in a range", *bounds)
    if bounds[0] > bounds[1] or not holds(dtype, bounds):
        raise DimError(f"param {name}: range {bounds[0]}..{bounds[1]} is not one of {dtype}")
    return Type(dict(shape), dtype, bounds)


def _const(e: Const) -> Type:
    check_shape("const", e.shape)
    entries = prod(n for _, n in e.shape)
    if entries > CONST_LIMIT:
        raise DimError(f"const {show(dict(e.shape))} has {entries} entries, at most {CONST_LIMIT}: make it a Param")
    if len(e.data) != entries * numpy_dtype(e.element).itemsize:
        raise DimError(f"const {e.element}{show(dict(e.shape))}: {len(e.data)} bytes do not fill {entries} entries")
    bounds = None if is_float(e.element) else (int(e.values.min()), int(e.values.max()))
    return Type(dict(e.shape), e.element, bounds)


def _unpack(e: Unpack) -> Type:
    t = e.x.type
    check_ints("unpack", e.width, e.count)
    if t.bounds is None or not t.dtype.startswith("u"):
        raise DimError(f"unpack of {t}: words are unsigned integers")
    if e.width < 1 or e.count < 1 or e.width * e.count > bits(t.dtype):
        raise DimError(f"unpack {e.count} fields of {e.width} bits from {t}: the word has {bits(t.dtype)} bits")
    _new(t.dims, e.dim, "unpack")
    dtype: DType = "u8" if e.width <= 8 else "u16" if e.width <= 16 else "u32"
    return Type({**t.dims, e.dim: e.count}, dtype, (0, (1 << e.width) - 1))


def _new(dims: Dims, name: str, what: str) -> None:
    check_name("dim", name)
    if name in dims:
        raise DimError(f"{what} makes dim {name!r}, which {show(dims)} already has: rename one")


def _bitcast(e: Bitcast) -> Type:
    t, have, want, bounds = e.x.type, bits(e.x.dtype), bits(e.to), None if is_float(e.to) else full_range(e.to)
    if have == want and e.dim is None:
        return Type(t.dims, e.to, bounds)
    if e.dim is None or have == want:
        raise DimError(f"bitcast {t} to {e.to}: {have} and {want} bits need a dim exactly when they differ")
    if have > want:
        _new(t.dims, e.dim, "bitcast")
        return Type({**t.dims, e.dim: have // want}, e.to, bounds)
    if _size("bitcast", t, e.dim) * have != want:
        raise DimError(f"bitcast {t} to {e.to}: dim {e.dim!r} must be {want // have}, not {t.dims[e.dim]}")
    return Type(drop(t.dims, (e.dim,)), e.to, bounds)


def _index(what: str, index: Type, size: int, dim: str) -> None:
    if index.bounds is None:
        raise DimError(f"{what} over {dim!r}: the index is {index}, not an integer")
    if index.bounds[0] < 0 or index.bounds[1] >= size:
        span = f"{index.bounds[0]}..{index.bounds[1]}"
        raise DimError(f"{what} over {dim}={size}: the index ranges over {span}; it must stay in 0..{size - 1}")
    if dim in index.dims:
        raise DimError(f"{what} over {dim!r}: the index {index} has a dim of that name: rename it")


def _gather(e: Gather) -> Type:
    t = e.table.type
    _index("gather", e.index.type, _size("gather", t, e.dim), e.dim)
    return Type(union("gather", e.index.dims, drop(t.dims, (e.dim,))), t.dtype, t.bounds)


def _bucket(e: Bucket) -> Type:
    check_ints(f"bucket over {e.dim!r}", e.size)
    _index("bucket", e.index.type, e.size, e.dim)
    dims = union("bucket", e.x.dims, e.index.dims)
    if missing := e.over - dims.keys():
        raise DimError(f"bucket over {sorted(missing)}: the operands have dims {show(dims)}")
    kept = drop(dims, e.over)
    _new(kept, e.dim, "bucket")
    times = prod(dims[d] for d in e.over)
    dtype: DType = ("f64" if e.x.dtype == "f64" else "f32") if is_float(e.x.dtype) else "i32"
    bounds = None
    if e.x.bounds is not None:
        # A bucket may get none of the terms or all of them.
        bounds = min(0, e.x.bounds[0] * times), max(0, e.x.bounds[1] * times)
        _fits("bucket", bounds, dtype)
    return Type({**kept, e.dim: e.size}, dtype, bounds)


def _fits(what: str, bounds: Bounds, dtype: DType) -> None:
    if not holds(dtype, bounds):
        raise RangeError(f"{what} reaches {bounds[0]}..{bounds[1]}, more than {dtype} holds: use a wider type")


def _add(a: Type, b: Type) -> Type:
    if a.dtype != b.dtype:
        raise DimError(f"add of {a} and {b}: the element types differ, cast one")
    bounds = None
    if a.bounds is not None and b.bounds is not None:
        bounds = a.bounds[0] + b.bounds[0], a.bounds[1] + b.bounds[1]
        _fits("add", bounds, a.dtype)
    return Type(union("add", a.dims, b.dims), a.dtype, bounds)


def _contract(e: Contract) -> Type:
    what = "xor" if e.ring == "gf2" else "sum"
    if e.ring not in ("real", "gf2") or (e.ring == "gf2" and is_float(e.acc)):
        raise DimError(f"{what} over the ring {e.ring!r} in {e.acc}: use 'real', or 'gf2' with an integer type")
    if not e.factors:
        raise DimError(f"{what} of no factors")
    all_dims = union(what, *(f.dims for f in e.factors))
    if gone := e.over - all_dims.keys():
        raise DimError(f"{what} over {sorted(gone)}: the factors have dims {show(all_dims)}")
    dims = drop(all_dims, e.over)
    if e.ring == "gf2":
        for f in e.factors:
            if f.bounds is None or not (0 <= f.bounds[0] and f.bounds[1] <= 1):
                raise DimError(f"xor factor {f.type} is not a bit: its values must lie in 0..1")
        return Type(dims, e.acc, (0, 1))
    for f in e.factors:
        if not converts_exactly(f.dtype, f.bounds, e.acc):
            raise DimError(f"{what}: factor {f.type} is not exact in the accumulator {e.acc}: cast it, or widen")
    return Type(dims, e.acc, _product_bounds(e, all_dims))


def _product_bounds(e: Contract, all_dims: Dims) -> Bounds | None:
    """The interval of an integer sum; exact entries of Consts are used, so that joined digits stay tight."""
    if is_float(e.acc):
        return None
    tables: list[Const] = []
    lo, hi = 1, 1
    for f in e.factors:
        assert f.bounds is not None  # exact in an integer accumulator, hence an integer
        entries = prod(union("sum", *(t.dims for t in tables), f.dims).values())
        if isinstance(f, Const) and f.dims.keys() & e.over and entries <= CONST_LIMIT:
            tables.append(f)
        else:
            ends = [a * b for a in (lo, hi) for b in f.bounds]
            lo, hi = min(ends), max(ends)
    axis = {k: i for i, k in enumerate(union("sum", *(t.dims for t in tables)))}
    # Python's integers: a product of tables may leave int64.
    operands = [part for t in tables for part in (t.values.astype(object), [axis[k] for k in t.dims])]
    values = np.einsum(*operands, [*axis.values()]) if tables else np.array(1, object)
    summed = tuple(i for k, i in axis.items() if k in e.over)
    times = prod(n for k, n in all_dims.items() if k in e.over and k not in axis)
    least, most = (np.asarray(pick(values * lo, values * hi).sum(summed)) for pick in (np.minimum, np.maximum))
    bounds = int(least.min()) * times, int(most.max()) * times
    _fits("sum", bounds, e.acc)
    return bounds


def _split(t: Type, dim: str, into: Shape) -> Type:
    size = _size("split", t, dim)
    check_shape("split", into)
    if not into:
        raise DimError(f"split {dim}={size} into nothing: name at least one dim")
    if prod(n for _, n in into) != size:
        raise DimError(f"split {dim}={size} into {show(dict(into))}: the product is {prod(n for _, n in into)}")
    for name, _ in into:
        _new(drop(t.dims, (dim,)), name, "split")
    dims = {k: n for kk, nn in t.dims.items() for k, n in (into if kk == dim else ((kk, nn),))}
    return Type(dims, t.dtype, t.bounds)


def _merge(t: Type, parts: tuple[str, ...], into: str) -> Type:
    if not parts or len(set(parts)) != len(parts):
        raise DimError(f"merge of {parts}: name at least one dim, each once")
    size = prod(_size("merge", t, p) for p in parts)
    kept = drop(t.dims, parts)
    _new(kept, into, "merge")
    return Type({**kept, into: size}, t.dtype, t.bounds)


def _cast(e: Cast) -> Type:
    t = e.x.type
    exact = converts_exactly(t.dtype, t.bounds, e.to)
    if exact and e.rounds:
        raise DimError(f"cast {t} to {e.to} is exact: do not mark it as rounding")
    if not exact and not e.rounds:
        raise DimError(f"cast {t} to {e.to} can lose values: mark it as rounding")
    if not exact and not is_float(e.to):
        raise DimError(f"cast {t} to {e.to}: integers are never made by rounding inside a term")
    return Type(t.dims, e.to, None if is_float(e.to) else t.bounds)


def _pad(t: Type, dim: str, before: int, after: int) -> Type:
    size = _size("pad", t, dim)
    check_ints(f"pad {dim!r}", before, after)
    if before < 0 or after < 0 or before + after == 0:
        raise DimError(f"pad {dim!r} by {before} and {after}: neither may be negative, nor both zero")
    bounds = None if t.bounds is None else (min(0, t.bounds[0]), max(0, t.bounds[1]))
    return Type({k: before + size + after if k == dim else n for k, n in t.dims.items()}, t.dtype, bounds)


def _concat(parts: tuple[Type, ...], dim: str) -> Type:
    if not parts:
        raise DimError("concat of nothing")
    first, total = parts[0], 0
    for t in parts:
        total += _size("concat", t, dim)
        if t.dtype != first.dtype or drop(t.dims, (dim,)) != drop(first.dims, (dim,)):
            raise DimError(f"concat along {dim!r} of {first} and {t}: all else must be equal")
    ranges = [t.bounds for t in parts if t.bounds is not None]
    bounds = (min(lo for lo, _ in ranges), max(hi for _, hi in ranges)) if ranges else None
    return Type({k: total if k == dim else n for k, n in first.dims.items()}, first.dtype, bounds)
