"""Which sums of looked-up terms a lowering writes as one loop.

Some compilers fuse look-ups, scales and a few additions into one loop that no memory is needed for, as long as the
terms are not summed step by step.
"""

from __future__ import annotations

from lowbit.ir.cost import is_select
from lowbit.ir.dims import Dims, union
from lowbit.ir.dtypes import is_float
from lowbit.ir.expr import Contract, Gather, Unpack
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
    # What is added up first is what a compiler knows the place of: fields of words, then planes and codebooks.
    looked_up = sorted(e.factors, key=lambda f: not isinstance(f, Gather))
    full = union("product", *(f.dims for f in looked_up))
    fields = {n.dim: full[n.dim] for n in topo(e) if isinstance(n, Unpack) and n.dim in e.over}
    return Step(tuple(range(len(e.factors))), {**fields, **full}, e.dims)


def _of_selects(e: Contract, step: Step) -> bool:
    """Whether it is the product of one vector and weights that are selected, one of two entries at a time."""
    return any(map(is_select, e.factors)) and has_vector(*(slot_dims(e)[s] for s in step.slots))


def short_dim(step: Step) -> str | None:
    """The first summed dim that is short enough for additions."""
    return next((k for k, n in step.full.items() if k not in step.out and n <= UNROLL), None)


def added_up(step: Step) -> Dims:
    """The dims of the terms of a step once those along its short dim are added."""
    short = short_dim(step)
    return {k: n for k, n in step.full.items() if k != short}
