"""The order in which a product of several factors is summed: an exhaustive search, for factors are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from lowbit.ir.dims import Dims, drop, union
from lowbit.ir.expr import Contract

EXHAUSTIVE = 7
"""Factors up to which every order is tried; beyond, they are taken from left to right."""


@dataclass(frozen=True)
class Step:
    """One product: slots of its operands (one or two), its dims before and after summing.

    Slots 0..n-1 are the factors; each step appends its result as the next slot.
    """

    slots: tuple[int, ...]
    full: Dims
    out: Dims

    @property
    def fma(self) -> int:
        return prod(self.full.values())

    def is_dot(self, operands: Sequence[Dims]) -> bool:
        """Whether this is a matrix product: something is summed, and each operand has dims of its own."""
        if len(operands) != 2 or self.full.keys() == self.out.keys():
            return False
        a, b = operands[0].keys(), operands[1].keys()
        return bool(a - b) and bool(b - a)


def has_vector(a: Dims, b: Dims) -> bool:
    """Whether one operand of a matrix product has a single row."""
    return prod(drop(a, b).values()) == 1 or prod(drop(b, a).values()) == 1


def slot_dims(e: Contract) -> list[Dims]:
    """The dims of every slot: the factors, then the results of the steps."""
    return [*(f.dims for f in e.factors), *(step.out for step in contraction_order(e))]


@lru_cache(maxsize=4096)
def contraction_order(e: Contract) -> tuple[Step, ...]:
    """The cheapest sequence of pairwise products, each summing a dim as soon as nothing else needs it."""
    plan = _Plan(e)
    everything = (1 << len(e.factors)) - 1
    tree = plan.best(everything)[1] if len(e.factors) <= EXHAUSTIVE else plan.left_to_right()
    steps: list[Step] = []
    plan.emit(tree, steps)
    return tuple(steps)


def dots(e: Contract) -> dict[int, Step]:
    """The steps that are matrix products, by the slot of their result."""
    dims = slot_dims(e)
    steps = enumerate(contraction_order(e), len(e.factors))
    return {at: step for at, step in steps if step.is_dot([dims[s] for s in step.slots])}


Tree = int | tuple["Tree", "Tree"]


class _Plan:
    def __init__(self, e: Contract) -> None:
        self.factors = [f.dims for f in e.factors]
        self.narrow = [f.dtype in ("e4m3", "e5m2") for f in e.factors]
        self.result = e.dims
        self.memo: dict[int, tuple[int, Tree]] = {}

    def out(self, members: int) -> Dims:
        """What remains of the product of a subset: the dims that the result or another factor needs."""
        rest = [d for i, d in enumerate(self.factors) if not members >> i & 1]
        needed = {*self.result, *(k for d in rest for k in d)}
        full = union("sum", *(d for i, d in enumerate(self.factors) if members >> i & 1))
        return drop(full, full.keys() - needed)

    def alone(self, i: int) -> Step | None:
        full, out = self.factors[i], self.out(1 << i)
        return Step((i,), full, out) if out.keys() != full.keys() else None

    def best(self, members: int) -> tuple[int, Tree]:
        """The cheapest tree over a subset of the factors, and its multiply-adds: two floats of 8 bits are multiplied in
        half the time as long as no scale has made them wider."""
        if members not in self.memo:
            if members & (members - 1) == 0:
                i = members.bit_length() - 1
                step = self.alone(i)
                self.memo[members] = (step.fma if step else 0, i)
            else:
                self.memo[members] = min((self.pair(a, members ^ a) for a in _halves(members)), key=lambda t: t[0])
        return self.memo[members]

    def pair(self, a: int, b: int) -> tuple[int, Tree]:
        (cost_a, tree_a), (cost_b, tree_b) = self.best(a), self.best(b)
        work = prod(union("sum", self.out(a), self.out(b)).values())
        if all(isinstance(tree, int) and self.narrow[tree] for tree in (tree_a, tree_b)):
            work //= 2
        return cost_a + cost_b + work, (tree_a, tree_b)

    def left_to_right(self) -> Tree:
        tree: Tree = 0
        for i in range(1, len(self.factors)):
            tree = (tree, i)
        return tree

    def emit(self, tree: Tree, steps: list[Step]) -> tuple[int, int]:
        """Append the steps of a tree; returns the subset it covers and the slot of its result."""
        if isinstance(tree, int):
            step = self.alone(tree)
            if step is None:
                return 1 << tree, tree
            steps.append(step)
            return 1 << tree, len(self.factors) + len(steps) - 1
        (a, slot_a), (b, slot_b) = self.emit(tree[0], steps), self.emit(tree[1], steps)
        full, kept = union("sum", self.out(a), self.out(b)), self.out(a | b)
        steps.append(Step((slot_a, slot_b), full, drop(full, full.keys() - kept.keys())))
        return a | b, len(self.factors) + len(steps) - 1


def _halves(members: int) -> list[int]:
    """Every way to part a set in two, each once: the subsets that hold its lowest member, less the whole."""
    low = members & -members
    rest, out = members ^ low, []
    sub = rest
    while sub:
        sub = (sub - 1) & rest
        out.append(sub | low)
    return out
