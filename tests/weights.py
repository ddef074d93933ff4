"""Weights from their reading one by one (`lowbit.passes.pointwise`), in numpy: what the reading says they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lowbit.passes.pointwise import Pointwise, code_width
from lowbit.passes.scalar import Element, Node, Number, Product, Scalar, Sum

Array = np.ndarray[Any, Any]


def value(x: Scalar, stored: Callable[[Element], Any]) -> Any:
    """What a scalar stands for, in whatever arithmetic the stored values have."""

    def of(node: Node) -> Any:
        match node:
            case Number(number):
                return number
            case Element():
                return stored(node)
            case Sum(a, b, minus):
                return of(a) - of(b) if minus else of(a) + of(b)
            case Product(a, b):
                return of(a) * of(b)

    return x[0] * of(x[1])


def element(e: Element, env: Mapping[str, Array]) -> Array:
    """A stored element, or its bits, for every weight [n or 1, k or 1]."""
    raw = env[e.leaf.name][tuple(w.values for w in e.at)]
    return raw if e.shift is None else raw >> e.shift.values.astype(raw.dtype) & (1 << e.width) - 1


def weights(of: Pointwise, env: Mapping[str, Array], n: int, k: int) -> Array:
    """The weights [n, k], in float64."""
    code, below = np.zeros((n, k), np.int64), 0
    for e in of.codes:
        code, below = code | element(e, env).astype(np.int64) << below, below + code_width(e)
    entries = [value(x, lambda e: element(e, env).astype(np.float64)) for x in of.entries]
    out: Array = np.choose(code, [np.broadcast_to(v, (n, k)) for v in entries])
    return out
