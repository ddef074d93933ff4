"""Scalars over stored elements, in a normal form: what one weight is made of.

Signs are kept outside, so x and -x are one node; numbers are folded; sums are binary and in order, so the entries of
a table share their beginnings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, assert_never

import numpy as np

from lowbit.ir.expr import Param

Index = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Where:
    """Positions along one dim of a leaf, for every weight: an index array [rows or 1, inputs or 1]."""

    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(index: Index) -> Where:
        for axis in (0, 1):  # one entry says it all where nothing varies
            first = index.take([0], axis)
            index = first if index.shape[axis] > 1 and bool((index == first).all()) else index
        return Where(index.shape, np.ascontiguousarray(index, dtype=np.int64).tobytes())

    @property
    def values(self) -> Index:
        return np.frombuffer(self.data, dtype=np.int64).reshape(self.shape)


@dataclass(frozen=True)
class Element:
    """A stored element, or `width` bits of it from bit `shift`, for every weight.

    Attributes:
      at: the position along each dim of the leaf, in storage order.
    """

    leaf: Param
    at: tuple[Where, ...]
    shift: Where | None = None
    width: int = 0

    @property
    def varies(self) -> tuple[bool, bool]:
        """Whether the position depends on the row, and on the input."""
        every = self.at if self.shift is None else (*self.at, self.shift)
        return any(w.shape[0] > 1 for w in every), any(w.shape[1] > 1 for w in every)

    @cached_property
    def span(self) -> int:
        """Inputs that see the same element: every aligned run of so many. 0 if all of a row do."""
        every = self.at if self.shift is None else (*self.at, self.shift)
        changes = [np.flatnonzero(np.diff(w.values, axis=1).any(0)) + 1 for w in every]
        return int(np.gcd.reduce(np.concatenate([np.zeros(1, np.int64), *changes])))


@dataclass(frozen=True)
class Number:
    """A number, not negative."""

    value: float


@dataclass(frozen=True)
class Sum:
    """`a + b`, or `a - b`."""

    a: Node
    b: Node
    minus: bool


@dataclass(frozen=True)
class Product:
    a: Node
    b: Node


@dataclass(frozen=True)
class Step:
    """An opaque step of the weight's code fields: a `Call`."""

    name: str
    codes: tuple[Element, ...]


@dataclass(frozen=True)
class Lookup:
    """An entry of a stored table that all rows share.

    Attributes:
      at: the position along each dim of the table, where the code is zero.
      code: the fields that it is made of, and what one of each counts along `axis`.
    """

    table: Param
    at: tuple[Where, ...]
    axis: int
    code: tuple[tuple[Element, int], ...]


Node = Number | Element | Sum | Product | Step | Lookup
Scalar = tuple[int, Node]
"""A sign (1 or -1) and what it applies to."""


def number(value: float) -> Scalar:
    return (-1 if value < 0 else 1, Number(abs(float(value))))


def negated(x: Scalar) -> Scalar:
    return (-x[0], x[1])


def plus(x: Scalar, y: Scalar) -> Scalar:
    """x + y, numbers folded."""
    (s, a), (t, b) = x, y
    if isinstance(a, Number) and isinstance(b, Number):
        return number(s * a.value + t * b.value)
    if isinstance(a, Number) and a.value == 0:
        return y
    if isinstance(b, Number) and b.value == 0:
        return x
    return s, Sum(a, b, s != t)


def times(x: Scalar, y: Scalar) -> Scalar:
    """x y, numbers folded and in front. A product with zero stays one: zero times a NaN is a NaN."""
    (s, a), (t, b) = x, y
    sign = s * t
    if isinstance(b, Number) and not isinstance(a, Number):
        a, b = b, a
    if isinstance(a, Number):
        if isinstance(b, Number):
            return sign, Number(a.value * b.value)
        if a.value == 1:
            return sign, b
        if isinstance(b, Product) and isinstance(b.a, Number):
            return times((sign, Number(a.value * b.a.value)), (1, b.b))
        return sign, Product(a, b)
    if isinstance(a, Product) and isinstance(a.a, Number):
        return times((sign, a.a), times((1, a.b), (1, b)))
    if isinstance(b, Product) and isinstance(b.a, Number):
        return times((sign, b.a), times((1, a), (1, b.b)))
    return sign, Product(a, b)


def evaluated(x: Scalar, stored: Callable[[Element], Any], number: Callable[[float], Any] = float) -> Any:
    """Its value, in whatever arithmetic `stored` and `number` give values of."""
    sign, node = x
    match node:
        case Number(value):
            out = number(value)
        case Element():
            out = stored(node)
        case Sum(a, b, minus):
            left, right = (evaluated((1, e), stored, number) for e in (a, b))
            out = left - right if minus else left + right
        case Product(a, b):
            out = evaluated((1, a), stored, number) * evaluated((1, b), stored, number)
        case Step() | Lookup():
            raise AssertionError("a step or a look-up has no value without a code")
        case _:
            assert_never(node)
    return out if sign > 0 else -out


def leaves(node: Node) -> list[Node]:
    """What an expression is made of, from the left."""
    return [*leaves(node.a), *leaves(node.b)] if isinstance(node, Sum | Product) else [node]


def elements(*nodes: Node) -> dict[Element, None]:
    """The stored elements below that are no code, in order, each once."""
    out: dict[Element, None] = {}
    for node in nodes:
        match node:
            case Element():
                out[node] = None
            case Sum(a, b) | Product(a, b):
                out |= elements(a, b)
            case Number() | Step() | Lookup():
                pass
    return out
