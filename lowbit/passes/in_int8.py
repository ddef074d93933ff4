"""sum_k x w  ~  s sum_g f[g] (sum_(k in g) x8 w8): a product of floats as sums of products of 8-bit integers

    x ~ s x8                         s for each row of activations
    table[code] ~ f table8[code]     f for each row of the table: for each output, or each output and group
    scale * integer                  exactly, f being the scale; a zero point, which is one too, by itself

Sums within a group are exact, in 32 bits: tensor cores multiply 8-bit integers. What is outside of them are floats. So
unlike the passes that forms are made of, this one does not keep a term's value; `lowbit.passes.int8_rows` says how far
off a rounded row is. A sum without integers, as that with a low-rank adapter, stays as it is.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from lowbit.ir.build import cast, const, contract, in_order
from lowbit.ir.dims import RangeError, fresh
from lowbit.ir.dtypes import DType, holds, is_float
from lowbit.ir.expr import Add, Contract, Expr, Gather, Param, Split
from lowbit.ir.walk import params, substitute, topo
from lowbit.passes.distribute import distribute
from lowbit.passes.int8_rows import COLUMN, rows
from lowbit.passes.pipeline import APART, HOIST, JOIN, Pass, run
from lowbit.passes.positions import UnsuitableError

Numerics = Literal["float", "int8", "int8x2"]
"""What products multiply: floats; or integers of 8 bits, one for each activation, or two."""
COLUMNS: dict[Numerics, int] = {"int8": 1, "int8x2": 2}
"""Integers that an activation is rounded to, of which the second counts 1/256."""


def checked_numerics(numerics: Any) -> Numerics:
    """Raises ValueError for what are none."""
    if numerics not in (known := get_args(Numerics)):
        raise ValueError(f"numerics must be one of {', '.join(map(repr, known))}, not {numerics!r}")
    checked: Numerics = numerics
    return checked


def _stored_apart(e: Expr) -> Expr | None:
    """`distribute`, where both terms of a sum are stored: zero points and offsets meet sums of activations alone."""
    factors = e.factors if isinstance(e, Contract) else ()
    stored = any(isinstance(f, Add) and params(f.a) and params(f.b) for f in factors)
    return distribute(e) if stored else None


STORED_APART = Pass("stored_apart", (_stored_apart,))


def activations_in_int8(x: Expr, numerics: Numerics) -> Expr:
    """What x [m, k] is rounded to, as floats."""
    codes, scales = _columns(x, numerics, COLUMN)
    return contract((codes, _place_values(numerics, COLUMN), scales), (COLUMN,))


def product_in_int8(x: Param, decode: Expr, numerics: Numerics) -> Expr:
    """The product of x [m, k] with a weight that decodes so. Raises UnsuitableError, with the reason, if it has none.

    >>> from lowbit.ir import param
    >>> x, scale, codes = param("x", "f32", m=2, k=8), param("scale", "f32", n=3), param("codes", "i8", n=3, k=8)
    >>> print(product_in_int8(x, scale * codes, "int8x2"))
    %0 = param x                       : f32[m=2 k=8]
    %1 = call int8x2_codes %0          : i8[column=2 m=2 k=8]
    %2 = param codes                   : i8[n=3 k=8]
    %3 = sum[k] %1 * %2                : i32[column=2 m=2 n=3]
    %4 = cast %3                       : f32[column=2 m=2 n=3]
    %5 = call int8_scale %0            : f32[m=2]
    %6 = const {1, 0.00390625}         : f32[column=2]
    %7 = param scale                   : f32[n=3]
    %8 = sum[column] %4 * %5 * %6 * %7 : f32[m=2 n=3]
    """
    whole = run(contract((x, run(decode, (JOIN,))), ("k",)), (APART, HOIST, STORED_APART))
    nodes = topo(whole)
    column = fresh(COLUMN, {k for e in nodes for k in e.dims})
    sums = [e for e in nodes if isinstance(e, Contract) and any(x in topo(f) for f in e.factors)]
    try:
        new: dict[Expr, Expr] = {e: made for e in sums if (made := _rounded(e, x, numerics, column)) is not None}
    except RangeError as err:
        raise UnsuitableError(f"its sums of 8-bit integers may outgrow 32 bits ({err})") from err
    if not new:
        raise UnsuitableError("its weights are no integers, and no entries of a small table, under a scale")
    return substitute(whole, new)


def _rounded(e: Contract, x: Param, numerics: Numerics, column: str) -> Expr | None:
    """One sum in integers; None if no dim of it is one of integers alone."""
    codes, scales = _columns(x, numerics, column)
    integers: list[Expr] = []
    floats: list[Expr] = [scales, _place_values(numerics, column)]
    for f in e.factors:
        match f:
            case _ if x in topo(f):
                integers.append(substitute(f, {x: codes}))
            case Gather(_, index, _) if index.dims and index.dims.keys() <= e.over:
                raise UnsuitableError("its inputs are stored in an order of their own")
            case Gather(table, index, dim) if is_float(f.dtype) and not is_float(index.dtype):
                entries, scale = rows(in_order(table, [*(k for k in table.dims if k != dim), dim]))
                integers.append(Gather(entries, index, dim))
                floats.append(scale)
            case _ if is_float(f.dtype):
                floats.append(f)
            case _:
                integers.append(_narrow(f))
    outer = {k for f in floats for k in f.dims}
    if not (inner := e.over - outer):
        return None
    total = contract(integers, inner, acc="i32")
    return contract((cast(total, "f32"), *floats), e.over - inner | {column})


def _columns(x: Expr, numerics: Numerics, column: str) -> tuple[Expr, Expr]:
    codes, scales = rows(x, COLUMNS[numerics])
    if COLUMN not in codes.dims:
        return Split(codes, "m", ((column, 1), ("m", codes.dims["m"]))), scales
    return codes if column == COLUMN else Split(codes, COLUMN, ((column, COLUMNS[numerics]),)), scales


def _place_values(numerics: Numerics, column: str) -> Expr:
    return const([2.0 ** (-8 * i) for i in range(COLUMNS[numerics])], "f32", column)


def _narrow(e: Expr) -> Expr:
    """In the least type that holds it, which also keeps a sum of its own apart."""
    narrow: tuple[DType, ...] = ("i8", "i16")
    return next((cast(e, to) for to in narrow if e.bounds is not None and holds(to, e.bounds)), e)
