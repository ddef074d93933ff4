"""sum_k x[k] * (sum_p a[p] * b[p, k])  =  sum_kp x[k] * a[p] * b[p, k],  the inner sum over integers, the outer one not

Place values of bit planes become factors like the scales of binary coding, so that what holds for those holds here.
`contract` flattens what has one accumulator by itself.
"""

from __future__ import annotations

from lowbit.ir.build import contract
from lowbit.ir.dims import fresh_all
from lowbit.ir.dtypes import converts_exactly, is_float
from lowbit.ir.expr import Contract, Expr
from lowbit.ir.walk import rename


def flatten(e: Expr) -> Expr | None:
    if not isinstance(e, Contract) or not is_float(e.acc):
        return None
    for at, f in enumerate(e.factors):
        if isinstance(f, Contract) and f.ring == "real" and not is_float(f.acc) and f.over and _exact(f, e):
            others = e.factors[:at] + e.factors[at + 1 :]
            new = fresh_all(sorted(f.over), {*f.dims, *e.over, *(k for g in others for k in g.dims)})
            inner = [rename(g, new) for g in f.factors]
            over = e.over | {new.get(k, k) for k in f.over}
            return contract((*e.factors[:at], *inner, *e.factors[at + 1 :]), over, acc=e.acc)
    return None


def _exact(inner: Contract, outer: Contract) -> bool:
    return all(converts_exactly(f.dtype, f.bounds, outer.acc) for f in inner.factors)
