"""sum_k x[k] * slice(w)[k]  =  sum_k pad(x)[k] * w[k]

Slice and Pad are each other's transposes: a ragged last group costs the activation a few zeros instead of costing
the weight its shape. What `w` holds in the padding is multiplied by zero, so it must be finite; packers store zeros.
"""

from __future__ import annotations

from lowbit.ir.build import contract, ones, pad
from lowbit.ir.expr import Contract, Expr, Slice


def hoist_slice(e: Expr) -> Expr | None:
    if not isinstance(e, Contract) or e.ring != "real":
        return None
    for at, s in enumerate(e.factors):
        if isinstance(s, Slice):
            others = e.factors[:at] + e.factors[at + 1 :]
            shared = any(s.dim in f.dims for f in others)
            if s.dim in e.over:
                factors = others if shared else (*others, *ones(((s.dim, s.dims[s.dim]),), e.acc))
                after = s.x.dims[s.dim] - s.stop
                padded = [pad(f, s.dim, s.start, after) if s.dim in f.dims else f for f in factors]
                return contract((*padded[:at], s.x, *padded[at:]), e.over, e.ring, e.acc)
            if not shared:
                body = contract((*others[:at], s.x, *others[at:]), e.over, e.ring, e.acc)
                return Slice(body, s.dim, s.start, s.stop)
    return None
