"""sum_k x[k] * t[i[k]]  =  sum_c t[c] * bucket(x, i)[c]

The dual of commute_gather, for tables of scalars: add up the activations that share a code, then multiply once a code.
Entries that no code selects are multiplied by zero, so they must be finite.
"""

from __future__ import annotations

from lowbit.ir.build import const, contract
from lowbit.ir.dims import DimError, fresh_all
from lowbit.ir.expr import Bucket, Contract, Expr, Gather
from lowbit.ir.walk import rename


def bucket(e: Expr) -> Expr | None:
    """For any index."""
    return _first(e, everywhere=True)


def bucket_shared(e: Expr) -> Expr | None:
    """For an index that is summed over whole, so that all results share it: it moves to the activations."""
    return _first(e, everywhere=False)


def _first(e: Expr, everywhere: bool) -> Expr | None:
    if not isinstance(e, Contract) or e.ring != "real":
        return None
    for at, g in enumerate(e.factors):
        if isinstance(g, Gather):
            summed = e.over & (g.index.dims.keys() - g.table.dims.keys())
            if summed and (everywhere or summed == g.index.dims.keys()):
                try:
                    return _bucket(e, at, g, summed)
                except DimError:  # the bucket sums outgrow the accumulator
                    return None
    return None


def _bucket(e: Contract, at: int, g: Gather, summed: frozenset[str]) -> Expr:
    rest = e.factors[:at] + e.factors[at + 1 :]
    near = [f for f in rest if summed & f.dims.keys()]
    far = [f for f in rest if not summed & f.dims.keys()]
    new = fresh_all([g.dim], {*e.over, *(k for f in e.factors for k in f.dims)})
    dim = new.get(g.dim, g.dim)
    x = contract(near, (), acc=e.acc) if near else const(1, e.acc)
    sums = Bucket(x, g.index, dim, g.table.dims[g.dim], summed)
    return contract((*far, rename(g.table, new), sums), e.over - summed | {dim}, acc=e.acc)
