"""Registers that hold what a code can mean: built in a lane from the stored parameters of its row and group.

Entries are computed in float32 and rounded once to the halves that the matrix unit multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

from lowbit.kernels.alu import XOR, Alu, Half, Register
from lowbit.passes.scalar import Element, Node, Number, Product, Scalar, Sum, negated

REVERSED = 0x0123
LOW_BYTES, HIGH_BYTES = 0x6420, 0x7531


class Builder:
    """Scalars as float32 registers, each node once."""

    def __init__(self, alu: Alu, kind: Half, stored: Mapping[Element, Register]) -> None:
        self.alu, self.kind = alu, kind
        self.done: dict[Node, Register] = {e: alu.widen(r, e.leaf.dtype) for e, r in stored.items()}

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
                raise KeyError(f"no register holds {node.leaf.name!r}")
            case _:
                assert_never(node)

    def scalar(self, x: Scalar) -> Register:
        sign, node = x
        return self.node(node) if sign > 0 else self.alu.lop3(self.node(node), 0x80000000, 0, XOR)

    def pair(self, low: Scalar, high: Scalar) -> Register:
        """Two halves in a register."""
        return self.alu.pack2(self.kind, self.scalar(low), self.scalar(high))

    def both(self, x: Scalar) -> Register:
        """The same half twice."""
        return self.pair(x, x)

    def four(self, entries: Sequence[Scalar]) -> tuple[Register, Register]:
        """A table of 4 halves as byte permutes read it: their low bytes, their high bytes."""
        a, b = self.pair(*entries[:2]), self.pair(*entries[2:])
        return self.alu.prmt(a, b, LOW_BYTES), self.alu.prmt(a, b, HIGH_BYTES)

    def eight(self, entries: Sequence[Scalar]) -> tuple[Register, ...]:
        """A table of 8: low bytes of the first and second four, then high bytes."""
        low, high = self.four(entries[:4])
        if is_odd(entries):  # the second four are the first, from the back and negated
            low2 = self.alu.prmt(low, 0, REVERSED)
            high2 = self.alu.lop3(self.alu.prmt(high, 0, REVERSED), 0x80808080, 0, XOR)
        else:
            low2, high2 = self.four(entries[4:])
        return low, low2, high, high2


def is_odd(entries: Sequence[Scalar]) -> bool:
    """Whether the last entry is minus the first, and so on towards the middle."""
    return all(a == negated(b) for a, b in zip(entries, reversed(entries), strict=True))
