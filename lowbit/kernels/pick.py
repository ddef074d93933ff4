"""Which decoder a format's weights suit, by the shape of their term."""

from __future__ import annotations

from lowbit.ir.dtypes import is_float
from lowbit.kernels.computed import Books, Bytes
from lowbit.kernels.decoders import STAGE, Decoder, Eights, OneBit, ScaledIntegers, SignedTable, TwoBits, Wide
from lowbit.kernels.tables import is_odd
from lowbit.passes.pointwise import COMPUTED_BITS, Pointwise
from lowbit.passes.scalar import Number, Product, Scalar, Sum, elements, number, plus, times

LARGEST_ZERO = 240
"""So that a code of 4 bits plus a zero point is exact in either half."""


def pick(weights: Pointwise, first: int | None = None, shared: bool = False) -> Decoder:
    """The decoder with the fewest instructions.

    Args:
      first: bits of the code that are decoded alone too, at another width.
      shared: whether the tables of 16 entries and more are those of rows, to be held in shared memory.
    """
    if weights.computed:
        return Books(weights, STAGE) if weights.books else Bytes(weights)
    base = min(3 if first is None else first, 3)
    if weights.bits > COMPUTED_BITS:
        return Wide(weights.bits, base)
    if first is not None:
        return TwoBits() if weights.bits == base == 2 else Eights(weights.bits, base, shared)
    if weights.bits < 4:
        return OneBit() if weights.bits == 1 else TwoBits() if weights.bits == 2 else Eights(3)
    if (affine := scaled_integers(weights)) is not None:
        return ScaledIntegers(*affine)
    return SignedTable() if is_odd(weights.entries) else Eights(4, shared=shared)


def scaled_integers(weights: Pointwise) -> tuple[Scalar, Scalar] | None:
    """Scale and zero of entries scale * (code + zero) with a small integer zero; None for others."""
    for scale, value in _factors(weights.entries[1]):
        if (zero := _minus_one(value)) is None:
            continue
        made = [times(scale, plus(number(code), zero)) for code in range(len(weights.entries))]
        if tuple(made) == weights.entries:
            return scale, zero
    return None


def _factors(entry: Scalar) -> list[tuple[Scalar, Scalar]]:
    """Ways to see an entry as scale times value."""
    sign, node = entry
    if not isinstance(node, Product):
        return [((1, node), (sign, Number(1.0)))]
    if isinstance(node.a, Number):
        return [((1, node.b), (sign, node.a))]
    return [((1, node.a), (sign, node.b)), ((1, node.b), (sign, node.a))]


def _minus_one(value: Scalar) -> Scalar | None:
    """What was added to code 1 if that is a small integer: a number, or a stored one."""
    sign, node = value
    match node:
        case Number(size):
            zero = number(sign * size - 1)
        case Sum(Number(size), rest, minus):
            zero = plus(number(sign * size - 1), (-sign if minus else sign, rest))
        case _:
            return None
    return zero if _is_small_integer(zero) else None


def _is_small_integer(x: Scalar) -> bool:
    _, node = x
    if isinstance(node, Number):
        return node.value.is_integer() and node.value <= LARGEST_ZERO
    stored = elements(node)
    if len(stored) != 1 or node not in stored:
        return False
    (element,) = stored
    bounds = element.leaf.bounds
    return not is_float(element.leaf.dtype) and bounds is not None and 0 <= bounds[0] and bounds[1] <= 255
