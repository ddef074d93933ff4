"""t[sum_p r**p d[p]]  =  split(t)[..., d[1], d[0]],  t split into one dim of r entries for each digit d[p]

A look-up by bits that are joined to an index becomes look-ups by the bits themselves. A look-up of one of two entries
is a select, so tables of a few entries need no memory, and no index is made.
"""

from __future__ import annotations

from lowbit.ir.build import const
from lowbit.ir.dims import fresh
from lowbit.ir.expr import Const, Contract, Expr, Gather, Split

ENTRIES = 32
"""Most entries of a table: one of n takes n - 1 selects, and the operands of more do not stay in registers."""


def split_index(e: Expr) -> Expr | None:
    if not isinstance(e, Gather) or e.table.dims[e.dim] > ENTRIES:
        return None
    match e.index:
        case Contract((a, b), over, "real") if len(over) == 1:
            (p,) = over
            for digits, values in ((a, b), (b, a)):
                if isinstance(values, Const) and [*values.dims] == [p] and digits.dims.get(p, 1) > 1:
                    return _by_digits(e, digits, p, [int(v) for v in values.values])
    return None


def _by_digits(e: Gather, digits: Expr, p: str, place_values: list[int]) -> Expr | None:
    assert digits.bounds is not None  # of an index
    base, count = digits.bounds[1] + 1, len(place_values)
    if sorted(place_values) != [base**i for i in range(count)] or base**count != e.table.dims[e.dim]:
        return None
    dims: list[str] = []
    for _ in place_values:
        dims.append(fresh(e.dim, {*e.table.dims, *digits.dims, *dims}))
    out: Expr = Split(e.table, e.dim, tuple((dim, base) for dim in dims))
    for dim, i in zip(dims, sorted(range(count), key=lambda i: -place_values[i]), strict=True):
        out = Gather(out, Gather(digits, const(i, "i32"), p), dim)
    return out
