"""Smart constructors: the normal forms that let a pass meet one shape only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

import numpy as np

from lowbit.ir.dims import DimError, Shape, fresh_all
from lowbit.ir.dtypes import DType, converts_exactly, exactly, is_float
from lowbit.ir.expr import CONST_LIMIT, Add, Cast, Const, Contract, Expr, Merge, Pad, Param, Ring, Slice, Split
from lowbit.ir.walk import rename


def param(name: str, dtype: DType, within: tuple[int, int] | None = None, /, **dims: int) -> Param:
    """A stored array, dims in storage order; `within` narrows the range of integers.

    >>> from lowbit.ir import param
    >>> param("codes", "u8", (0, 15), n=64, k=16).type
    Type(dims={'n': 64, 'k': 16}, dtype='u8', bounds=(0, 15))
    """
    return Param(name, tuple(dims.items()), dtype, within)


def const(values: Any, dtype: DType, *dims: str) -> Const:
    """A compile-time table of at most CONST_LIMIT entries; raises ValueError for a value that is not one of `dtype`.

    >>> from lowbit.ir import const
    >>> print(const([[1, -1], [0, 2]], "i8", "p", "c"))
    %0 = const {1, -1, 0, 2}         : i8[p=2 c=2]
    """
    array = exactly(values, dtype)
    if array.ndim != len(dims):
        raise DimError(f"const of shape {array.shape} over the dims {dims}: name one dim for each axis")
    shape = tuple(zip(dims, array.shape, strict=True))
    return Const(shape, dtype, array.astype(array.dtype.newbyteorder("<")).tobytes())


def lift(value: Expr | float, like: Expr) -> Expr:
    """A Python number as a scalar Const that suits `like`: i32 beside integers, its own dtype beside floats."""
    if not isinstance(value, int | float | np.number):
        return value
    return const(value, like.dtype if is_float(like.dtype) else "i32" if float(value).is_integer() else "f32")


def add(a: Expr, b: Expr) -> Add:
    """A sum; operands of different types meet in the first type that holds both exactly.

    >>> from lowbit.ir import add, param
    >>> add(param("a", "f16", n=3), param("b", "u8", k=2)).type
    Type(dims={'n': 3, 'k': 2}, dtype='f16', bounds=None)
    """
    if a.dtype != b.dtype:
        to = next((d for d in (a.dtype, b.dtype, *_MEET) if _exact(a, d) and _exact(b, d)), None)
        if to is not None:
            a, b = cast(a, to), cast(b, to)
    return Add(a, b)


_MEET: tuple[DType, ...] = ("i32", "f32", "f64")


def _exact(e: Expr, to: DType) -> bool:
    return converts_exactly(e.dtype, e.bounds, to)


def cast(x: Expr, to: DType) -> Expr:
    """A conversion, marked as rounding when it can lose values; `x` itself when there is nothing to do.

    >>> from lowbit.ir import cast, param
    >>> print(cast(param("x", "f32", k=2), "bf16"))
    %0 = param x                     : f32[k=2]
    %1 = cast %0 rounding            : bf16[k=2]
    """
    if x.dtype == to:
        return x
    return Cast(x, to, rounds=not _exact(x, to))


def contract(factors: Iterable[Expr], over: Iterable[str], ring: Ring = "real", acc: DType | None = None) -> Expr:
    """The one way to make a Contract: nested sums of products of one ring and accumulator flatten.

    Bound dims of a flattened factor that its neighbours use are renamed first, never captured. `acc` is float64 if a
    factor is, float32 beside any other float, and i32 for integers.

    >>> from lowbit.ir import contract, param
    >>> a, b = param("a", "f32", k=2), param("b", "f32", k=2)
    >>> print(contract((a.sum("k"), b), ("k",)))
    %0 = param a                     : f32[k=2]
    %1 = split %0 k -> k_1           : f32[k_1=2]
    %2 = param b                     : f32[k=2]
    %3 = sum[k k_1] %1 * %2          : f32[]
    """
    factors, over = tuple(factors), set(over)
    acc = acc or ("u8" if ring == "gf2" else _accumulator(factors))
    flat: list[Expr] = []
    for at, f in enumerate(factors):
        if not (isinstance(f, Contract) and f.ring == ring and f.acc == acc):
            flat.append(f)
            continue
        used = over.union(*(g.dims for g in flat), *(g.dims for g in factors[at:]))
        new = fresh_all(sorted(f.over), used)
        flat += [rename(g, new) for g in f.factors]
        over |= {new.get(d, d) for d in f.over}
    product = Contract(tuple(flat), frozenset(over), ring, acc)  # checks the factors, also of a product of one
    return flat[0] if len(flat) == 1 and not over and flat[0].dtype == acc else product


def _accumulator(factors: tuple[Expr, ...]) -> DType:
    kinds = {f.dtype for f in factors}
    return "f64" if "f64" in kinds else "f32" if any(map(is_float, kinds)) else "i32"


def slice_(x: Expr, dim: str, start: int, stop: int) -> Expr:
    return x if (start, stop) == (0, x.dims.get(dim)) else Slice(x, dim, start, stop)


def pad(x: Expr, dim: str, before: int, after: int) -> Expr:
    return x if before == after == 0 else Pad(x, dim, before, after)


def split(x: Expr, dim: str, **into: int) -> Expr:
    return Split(x, dim, tuple(into.items()))


def merge(x: Expr, *parts: str, into: str) -> Expr:
    return Merge(x, parts, into)


def in_order(e: Expr, dims: Iterable[str]) -> Expr:
    """The same array with its dims in that order; `e` itself if they are, or if they are other dims."""
    names = list(dims)
    if list(e.dims) == names or e.dims.keys() != set(names):
        return e
    for k in names:
        e = Merge(e, (k,), k)  # what is merged comes last
    return e


def ones(shape: Shape, dtype: DType) -> list[Expr]:
    """Factors whose product is all ones over `shape`: the one way to say 'constant along this dim'."""
    return [_ones(name, size, dtype) for name, size in shape]


def _ones(name: str, size: int, dtype: DType) -> Expr:
    if size <= CONST_LIMIT:
        return const(np.ones(size), dtype, name)
    inner = isqrt(size - 1) + 1
    outer = -(-size // inner)
    square = Contract((_ones("outer", outer, dtype), _ones("inner", inner, dtype)), frozenset(), "real", dtype)
    return slice_(Merge(square, ("outer", "inner"), name), name, 0, size)


def broadcast(e: Expr, dims: Mapping[str, int]) -> Expr:
    """`e` with every one of `dims`, repeated along those it lacks.

    >>> from lowbit.ir import broadcast, param
    >>> broadcast(param("scale", "f16", n=3), {"n": 3, "k": 2}).type
    Type(dims={'n': 3, 'k': 2}, dtype='f16', bounds=None)
    """
    missing = tuple((k, n) for k, n in dims.items() if k not in e.dims)
    return contract((e, *ones(missing, e.dtype)), (), acc=e.dtype) if missing else e
