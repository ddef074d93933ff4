"""sum_k x[k] * merge(w)[k]  =  sum_jv split(x)[j, v] * w[j, v]

Layout moves from the weight to the activation, where it is free, and the factors of the weight meet those of the sum.
A merged dim that is not summed is merged after the product instead.
"""

from __future__ import annotations

from lowbit.ir.build import contract
from lowbit.ir.dims import fresh_all
from lowbit.ir.expr import Contract, Expr, Merge, Split
from lowbit.ir.walk import rename


def hoist_merge(e: Expr) -> Expr | None:
    if not isinstance(e, Contract):
        return None
    for at, m in enumerate(e.factors):
        if isinstance(m, Merge):
            return _hoist(e, at, m)
    return None


def _hoist(e: Contract, at: int, m: Merge) -> Expr:
    others = e.factors[:at] + e.factors[at + 1 :]
    taken = {*e.over, *(k for f in e.factors for k in f.dims)} - {m.into}
    new = fresh_all([k for k in m.x.dims if k in m.parts], taken)
    x, parts = rename(m.x, new), tuple(new.get(p, p) for p in m.parts)
    into = tuple((p, x.dims[p]) for p in parts)
    factors = [Split(f, m.into, into) if m.into in f.dims else f for f in others]
    factors.insert(at, x)
    if m.into in e.over:
        return contract(factors, e.over - {m.into} | set(parts), e.ring, e.acc)
    return Merge(contract(factors, e.over, e.ring, e.acc), parts, m.into)
