"""Which sums of looked-up terms a lowering writes as one loop.

Some compilers fuse look-ups, scales and a few additions into one loop that no memory is needed for, as long as the
terms are not summed step by step.
"""

from __future__ import annotations

from lowbit.ir.dims import Dims, union
from lowbit.ir.dtypes import is_float
from lowbit.ir.expr import Contract, Gather
from lowbit.ir.order import Step, dots

UNROLL = 8
"""Terms up to which a sum over one dim is written as additions: planes are few."""


def one_loop(e: Contract) -> Step | None:
    """The whole product as one step, if a factor of it is looked up and no pair of factors makes a matrix product."""
    if not (e.over and is_float(e.acc) and any(isinstance(f, Gather) for f in e.factors)):
        return None
    if dots(e):
        return None
    return Step(tuple(range(len(e.factors))), union("product", *(f.dims for f in e.factors)), e.dims)


def short_dim(step: Step) -> str | None:
    """The first summed dim that is short enough for additions."""
    return next((k for k, n in step.full.items() if k not in step.out and n <= UNROLL), None)


def added_up(step: Step) -> Dims:
    """The dims of the terms of a step once those along its short dim are added."""
    short = short_dim(step)
    return {k: n for k, n in step.full.items() if k != short}
