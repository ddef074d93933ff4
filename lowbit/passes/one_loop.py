"""Which sums of looked-up terms a lowering writes as one loop.

Some compilers fuse look-ups, scales and a few additions into one loop that no memory is needed for, as long as the
terms are not summed step by step.
"""

from __future__ import annotations

from lowbit.ir.dims import Dims, union
from lowbit.ir.dtypes import is_float
from lowbit.ir.expr import Const, Contract, Expr, Gather, Unpack
from lowbit.ir.order import Step, dots, has_vector, slot_dims
from lowbit.ir.walk import topo

UNROLL = 8
"""Terms up to which a sum over one dim is written as additions: planes are few."""


def one_loop(e: Contract) -> Step | None:
    """The whole product as one step, if a factor of it is looked up and no pair of factors makes a matrix product."""
    if not (e.over and is_float(e.acc) and any(isinstance(f, Gather) for f in e.factors)):
        return None
    if any(not _of_selects(e, step) for step in dots(e).values()):
        return None
    full = union("product", *(f.dims for f in e.factors))
    fields = {n.dim: full[n.dim] for n in topo(e) if isinstance(n, Unpack) and n.dim in e.over}
    return Step(tuple(range(len(e.factors))), {**fields, **full}, e.dims)  # a compiler knows where fields lie


def is_select(e: Expr) -> bool:
    """Whether it is a look-up of one of two entries, or of one that is known."""
    return isinstance(e, Gather) and (e.table.dims[e.dim] == 2 or (isinstance(e.index, Const) and not e.index.dims))


def _of_selects(e: Contract, step: Step) -> bool:
    """Whether it is the product of one vector and weights that are selected, one of two entries at a time."""
    return any(map(is_select, e.factors)) and has_vector(*(slot_dims(e)[s] for s in step.slots))


def short_dim(step: Step) -> str | None:
    """The first summed dim of several terms that is short enough for additions."""
    return next((k for k, n in step.full.items() if k not in step.out and 1 < n <= UNROLL), None)


def added_up(step: Step) -> Dims:
    """The dims of the terms of a step once those along its short dim are added."""
    short = short_dim(step)
    return {k: n for k, n in step.full.items() if k != short}
