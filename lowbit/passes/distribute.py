"""sum x * (a + b)  =  sum x * a + sum x * b

Zero points, offsets and low-rank residuals become terms of their own: an offset needs only the group sums of x.
"""

from __future__ import annotations

from math import prod

from lowbit.ir.build import add, const, contract
from lowbit.ir.dtypes import converts_exactly, holds
from lowbit.ir.expr import Add, Contract, Expr


def distribute(e: Expr) -> Expr | None:
    if not isinstance(e, Contract) or e.ring != "real":
        return None
    for at, f in enumerate(e.factors):
        if isinstance(f, Add) and all(converts_exactly(t.dtype, t.bounds, e.acc) for t in (f.a, f.b)):
            halves = [_half(e, at, term) for term in (f.a, f.b)]
            return add(*halves) if None not in halves else None  # type: ignore[arg-type]
    return None


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
