"""Where a step that only moves elements takes the one at a position from: index arrays for all weights at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import numpy as np

from lowbit.ir.expr import Concat, Expr, Merge, Param, Slice, Split, Unpack
from lowbit.passes.scalar import Element, Index, Where

Position = Mapping[str, Index]


class UnsuitableError(ValueError):
    """Why weights cannot be decoded one by one from small codes."""


def field_of(x: Expr, shift: Index, width: int, here: Position) -> Element:
    """Bits of a stored word, seen through steps that move words and fields of fields."""
    match x:
        case Param():
            return Element(x, tuple(Where.of(here[d]) for d in x.dims), Where.of(shift), width)
        case Unpack(inner, outer, dim, _):
            return field_of(inner, shift + outer * here[dim], width, here)
        case Split() | Merge() | Slice() | Concat():
            inside, there = moved(x, here)
            return field_of(inside, shift, width, there)
        case _:
            raise UnsuitableError(f"fields are unpacked from a {type(x).__name__}, not from stored words")


def moved(e: Split | Merge | Slice | Concat, here: Position) -> tuple[Expr, Position]:
    """The operand and the position in it of a step that only moves."""
    there = dict(here)
    match e:
        case Split(x, dim, into):
            index = np.zeros((1, 1), np.int64)
            for name, size in into:
                index = index * size + there.pop(name)
            return x, {**there, dim: index}
        case Merge(x, parts, into):
            index = there.pop(into)
            for name in reversed(parts):
                index, there[name] = index // x.dims[name], index % x.dims[name]
            return x, there
        case Slice(x, dim, start, _):
            return x, {**there, dim: there[dim] + start}
        case Concat(parts, dim):
            start = 0
            for part in parts:
                inside = (there[dim] >= start) & (there[dim] < start + part.dims[dim])
                if inside.all():
                    return part, {**there, dim: there[dim] - start}
                start += part.dims[dim]
            raise UnsuitableError(f"its weights come from several arrays joined along {dim!r}")
        case _:
            assert_never(e)
