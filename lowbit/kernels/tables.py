"""Registers that hold what a code can mean: built in a lane from the stored parameters of its row and group.

Entries are computed in float32 and rounded once to the halves that the matrix unit multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

from lowbit.kernels.alu import XOR, Alu, Half, Register
from lowbit.passes.scalar import Element, Lookup, Node, Number, Product, Scalar, Step, Sum, negated

REVERSED = 0x0123
ONES: dict[Half, int] = {"f16": 0x3C003C00, "bf16": 0x3F803F80}


class Builder:
    """Scalars as float32 registers, each node once."""

    def __init__(self, alu: Alu, kind: Half, stored: Mapping[Element, Register]) -> None:
        self.alu, self.kind, self.stored = alu, kind, stored
        self.done: dict[Node, Register] = {}

    def node(self, node: Node) -> Register:
        if node not in self.done:
            self.done[node] = self._made(node)
        return self.done[node]

    def _made(self, node: Node) -> Register:
        match node:
            case Number(value):
                return self.alu.number(value)
            case Sum(a, b, minus):
                return self.alu.f32("sub" if minus else "add", self.node(a), self.node(b))
            case Product(a, b):
                return self.alu.f32("mul", self.node(a), self.node(b))
            case Element():
                return self.alu.widen(self.stored[node], node.leaf.dtype)
            case Step() | Lookup():
                raise AssertionError("no entry of a table is a step or a look-up")
            case _:
                assert_never(node)

    def both(self, x: Scalar) -> Register:
        """A half, twice."""
        sign, node = x
        pair = self._pair(node, node)
        return pair if sign > 0 else self.alu.lop3(pair, 0x80008000, 0, XOR)

    def four(self, entries: Sequence[Scalar]) -> tuple[Register, Register]:
        """A table of 4 halves as byte permutes read it: their low bytes, their high bytes."""
        a, b, c, d = (node for _, node in entries)
        first = self._pair(a, b)
        if (c, d) == (b, a):
            low, high = self.alu.prmt(first, 0, 0x0220), self.alu.prmt(first, 0, 0x1331)
        else:
            second = self._pair(c, d)
            low, high = self.alu.prmt(first, second, 0x6420), self.alu.prmt(first, second, 0x7531)
        signs = sum(0x80 << 8 * i for i, (sign, _) in enumerate(entries) if sign < 0)
        return low, self.alu.lop3(high, signs, 0, XOR) if signs else high

    def eight(self, entries: Sequence[Scalar]) -> tuple[Register, ...]:
        """A table of 8: low bytes of the first and second four, then high bytes."""
        low, high = self.four(entries[:4])
        if is_odd(entries):  # the second four are the first, from the back and negated
            low2 = self.alu.prmt(low, 0, REVERSED)
            high2 = self.alu.lop3(self.alu.prmt(high, 0, REVERSED), 0x80808080, 0, XOR)
        else:
            low2, high2 = self.four(entries[4:])
        return low, low2, high, high2

    def _pair(self, low: Node, high: Node) -> Register:
        """Two halves in a register."""
        match low, high:
            case Sum(Element() as a, Element() as b, minus), Sum(c, d, minus2) if (a, b) == (c, d):
                if a.leaf.dtype == b.leaf.dtype == self.kind:  # two stored halves: rounded once without float32 too
                    signs = ONES[self.kind] | 0x8000 * minus | 0x80000000 * minus2
                    return self.alu.half2("fma", self.kind, self._twice(b), signs, self._twice(a))
        return self.alu.pack2(self.kind, self.node(low), self.node(high))

    def _twice(self, stored: Element) -> Register:
        return self.alu.prmt(self.stored[stored], 0, 0x1010)


def is_odd(entries: Sequence[Scalar]) -> bool:
    """Whether the last entry is minus the first, and so on towards the middle."""
    return all(a == negated(b) for a, b in zip(entries, reversed(entries), strict=True))
