"""f(constants)  =  one constant, filled by the oracle."""

from __future__ import annotations

from math import prod

from lowbit.ir.build import const
from lowbit.ir.expr import CONST_LIMIT, Call, Const, Expr
from lowbit.ir.oracle import evaluate
from lowbit.ir.walk import params


def fold(e: Expr) -> Expr | None:
    return None if isinstance(e, Const | Call) or params(e) else constant(e)


def constant(e: Expr) -> Const | None:
    """A term without leaves as a Const; None if it is too large, or if its dtype would round it."""
    if prod(e.dims.values()) > CONST_LIMIT:
        return None
    try:
        return const(evaluate(e, {}), e.dtype, *e.dims)
    except (ValueError, TypeError):
        return None
