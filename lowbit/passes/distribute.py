"""sum x * (a + b)  =  sum x * a + sum x * b

Zero points, offsets and low-rank residuals become terms of their own: an offset needs only the group sums of x.
"""

from __future__ import annotations

from math import prod

from lowbit.ir.build import add, const, contract
from lowbit.ir.dtypes import converts_exactly, holds
from lowbit.ir.expr import Add, Contract, Expr, Param
from lowbit.ir.walk import topo


def distribute(e: Expr) -> Expr | None:
    """Over any sum."""
    return _distribute(e, everywhere=True)


def distribute_stored(e: Expr) -> Expr | None:
    """Over a sum whose terms both hold stored floats: no table could take it in, and each term has its own layout."""
    return _distribute(e, everywhere=False)


def _distribute(e: Expr, everywhere: bool) -> Expr | None:
    if not isinstance(e, Contract) or e.ring != "real":
        return None
    for at, f in enumerate(e.factors):
        if not isinstance(f, Add) or not (everywhere or all(map(_holds_floats, (f.a, f.b)))):
            continue
        if all(converts_exactly(t.dtype, t.bounds, e.acc) for t in (f.a, f.b)):
            halves = [_half(e, at, term) for term in (f.a, f.b)]
            return add(*halves) if None not in halves else None  # type: ignore[arg-type]
    return None


def _holds_floats(e: Expr) -> bool:
    return any(isinstance(n, Param) and n.bounds is None for n in topo(e))


def _half(e: Contract, at: int, term: Expr) -> Expr | None:
    factors = [*e.factors[:at], term, *e.factors[at + 1 :]]
    have = {k for f in factors for k in f.dims}
    # A summed dim that only the other half had: this half is repeated along it.
    times = prod(e.factors[at].dims[d] for d in e.over - have)
    if times > 1:
        if not holds(e.acc, (times, times)):
            return None
        factors.append(const(times, e.acc))
    return contract(factors, e.over & have, e.ring, e.acc)
