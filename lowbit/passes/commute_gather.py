"""sum_v a[v] * t[i][v]  =  (sum_v a[v] * t[v])[i]      for the dims v that the index i does not see

The partial sums of the activation with every row of the table are made once and looked up by the code: LUT-GEMM for
the table of all bytes, CodeGEMM's Psumbook for learned codebooks.
"""

from __future__ import annotations

from lowbit.ir.build import contract
from lowbit.ir.dims import fresh_all
from lowbit.ir.expr import Contract, Expr, Gather
from lowbit.ir.walk import rename


def commute_gather(e: Expr) -> Expr | None:
    """For any index."""
    return _first(e, everywhere=True)


def commute_gather_shared(e: Expr) -> Expr | None:
    """For an index that meets no other factor: it picks among the results, of which there are no more than before."""
    return _first(e, everywhere=False)


def _first(e: Expr, everywhere: bool) -> Expr | None:
    if not isinstance(e, Contract) or e.ring != "real":
        return None
    for at, g in enumerate(e.factors):  # by position: interned factors may repeat (x * x)
        if isinstance(g, Gather):
            inner = e.over & (g.table.dims.keys() - g.index.dims.keys())
            rest = (f for i, f in enumerate(e.factors) if i != at)
            if inner and (everywhere or not any(g.index.dims.keys() & f.dims.keys() for f in rest)):
                return _commute(e, at, g, inner)
    return None


def _commute(e: Contract, at: int, g: Gather, inner: frozenset[str]) -> Expr:
    rest = e.factors[:at] + e.factors[at + 1 :]
    near = [f for f in rest if inner & f.dims.keys()]
    far = [f for f in rest if not inner & f.dims.keys()]
    # The gathered dim is bound inside g; a neighbour may use its name for something else.
    new = fresh_all([g.dim], {*g.dims, *(k for f in near for k in f.dims)})
    dim = new.get(g.dim, g.dim)
    psum = contract((*near, rename(g.table, new)), inner, acc=e.acc)
    return contract((*far, Gather(psum, g.index, dim)), e.over - inner, acc=e.acc)
