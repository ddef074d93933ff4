"""Decoders of weights that are one expression of their code: sums of look-ups, and opaque steps.

A lane has several inputs that follow each other, because one code, or one word of bytes, stands for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from lowbit.ir.build import const, contract, merge, split
from lowbit.ir.call import LaneProgram, call_spec
from lowbit.ir.expr import Expr, Unpack
from lowbit.kernels.alu import AND, OR, Alu, Half, Register
from lowbit.kernels.codes import lane_words
from lowbit.kernels.decoders import COLUMNS, Decoder, SharedTable, Table, Tables
from lowbit.kernels.tables import Builder
from lowbit.passes.pointwise import BITCAST, CODE_BITS, Pointwise, UnsuitableError, code_width
from lowbit.passes.scalar import Element, Lookup, Node, Product, Scalar, Step, Sum

QUADS = 4
"""Lanes that share a row."""
VECTORS = (2, 4, 8, 16)
SHARED_TABLES = 96 << 10
"""Bytes of shared memory for tables."""
FEWEST = 4
"""Entries of a table there, so that its copies are whole rows of what is copied at once."""


class Books(Decoder):
    """Sums of vectors from tables in shared memory, times a scale: one load for the vector of a code."""

    shared = True

    def __init__(self, weights: Pointwise, columns: int) -> None:
        self.lookups, self.scale = _sum_of_lookups(weights.entries[0])
        self.bits, self.grain, self.columns, self.consecutive = weights.bits, weights.grain, columns, weights.grain
        if self.grain not in VECTORS:
            what = f"{self.lookups[0].table.name!r} is a table of all rows with vectors of {self.grain}"
            raise UnsuitableError(f"{what}, and a lane loads vectors of {', '.join(map(str, VECTORS))}")
        if self.bits > CODE_BITS * self.grain:
            raise UnsuitableError(f"{self.bits} bits for {self.grain} inputs are more than {CODE_BITS} for each")
        if self.bits * columns % (COLUMNS * self.grain):
            raise UnsuitableError(f"{self.bits} bits for {self.grain} inputs do not fill the words of a lane")
        self.widths = [sum(code_width(e) for e, _ in lookup.code) for lookup in self.lookups]
        self.shape = _shared_shape(self.lookups, self.grain)
        for lookup in self.lookups:
            _check_digits(lookup)
            _check_vector(lookup, self.grain)
        if self.scale is not None and self.scale.span % (QUADS * self.grain):
            raise UnsuitableError(f"a scale for {self.scale.span} inputs is not that of {QUADS} vectors together")

    def codes(self) -> Expr:
        words = lane_words(self.bits * self.columns // (COLUMNS * self.grain))
        flat = merge(Unpack(words, 1, "bit", 32), "word", "bit", into="f")
        fields = split(flat, "f", t=self.columns // (QUADS * self.grain), h=2, b=self.bits)
        code = contract((fields, const([1 << b for b in range(self.bits)], "i32", "b")), ("b",))
        return merge(merge(code, "warp", "h", "r", into="n"), "t", "q", into="k")

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        return () if self.scale is None else (builder.both((1, self.scale)),)

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        out: list[Register] = [None] * (self.columns // COLUMNS * 16)
        runs, spans, at = len(tables[0]), self.columns // (QUADS * self.grain), 0
        for t in range(spans):
            for h in range(2):
                vectors = []
                for table, width in zip(shared, self.widths, strict=True):
                    vectors.append(alu.load_vector(table, field(alu, words, at, width), self.grain))
                    at += width
                pairs = [reduce(lambda a, b: alu.half2("add", kind, a, b), pair) for pair in zip(*vectors, strict=True)]
                for s, pair in enumerate(pairs):
                    for scale in tables[h][t * runs // spans]:
                        pair = alu.half2("mul", kind, pair, scale)
                    out[2 * (t * len(pairs) + s) + h] = pair
        return out


class Bytes(Decoder):
    """A step that is made of whole bytes: four weights at a time, by its lane program. Bytes are not laid out anew: a
    lane has four of a row, as WGMMA has operands of 8 bits."""

    consecutive = 4

    def __init__(self, weights: Pointwise) -> None:
        (sign, step), self.bits = weights.entries[0], weights.bits
        if sign < 0 or not isinstance(step, Step) or any(code_width(e) != 8 for e in step.codes):
            raise UnsuitableError("a weight is not one step alone, of whole bytes")
        program = None if step.name.startswith(BITCAST) else call_spec(step.name).lanes
        if program is None:
            raise UnsuitableError(f"the step {step.name!r} has no lane program")
        self.program: LaneProgram = program

    def codes(self) -> Expr:
        words = split(lane_words(self.bits), "word", arg=self.bits // 8, t=COLUMNS // 16, h=2)
        code = contract(
            (Unpack(words, 8, "f", 4), const([1 << 8 * a for a in range(self.bits // 8)], "i32", "arg")), ("arg",)
        )
        return merge(merge(code, "warp", "h", "r", into="n"), "t", "q", "f", into="k")

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        return ()

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        out: list[Register] = [None] * 16
        for t in range(COLUMNS // 16):
            for h in range(2):
                pairs = self.program(alu, *words[2 * t + h :: 8])
                for s, pair in enumerate(pairs):
                    out[2 * (2 * t + s) + h] = pair if kind == "f16" else alu.to_bf16(pair)
        return out


def _shared_shape(lookups: Sequence[Lookup], grain: int) -> tuple[int, int, int, int]:
    """[look-up, entry, copy, vector]: with 128 bytes of copies no two lanes that load together meet in a bank."""
    entries = max(FEWEST, *(list(lookup.table.dims.values())[lookup.axis] for lookup in lookups))
    size, copies = 2 * grain * entries * len(lookups), max(1, 64 // grain)
    if size > SHARED_TABLES:
        raise UnsuitableError(f"its tables take {size} bytes, and shared memory has {SHARED_TABLES} for them")
    while size * copies > SHARED_TABLES:
        copies //= 2
    return len(lookups), entries, copies, grain


def _sum_of_lookups(weight: Scalar) -> tuple[list[Lookup], Element | None]:
    """The look-ups of scale * (a + b + ...), and the scale."""
    sign, node = weight
    terms = [_scaled(term) for term in _terms(node)]
    scales = {scale for _, scale in terms}
    if sign < 0 or len(scales) > 1:
        raise UnsuitableError("a weight is no sum of look-ups under one scale")
    return [lookup for lookup, _ in terms], scales.pop()


def _terms(node: Node) -> list[Node]:
    if isinstance(node, Sum) and not node.minus:
        return [*_terms(node.a), *_terms(node.b)]
    return [node]


def _scaled(term: Node) -> tuple[Lookup, Element | None]:
    match term:
        case Lookup():
            return term, None
        case Product(Lookup() as lookup, Element() as scale) | Product(Element() as scale, Lookup() as lookup):
            return lookup, scale
        case _:
            raise UnsuitableError("a weight is no sum of look-ups under one scale")


def _check_digits(lookup: Lookup) -> None:
    below = 0
    for e, place in lookup.code:
        if place != 1 << below:
            raise UnsuitableError(f"the fields of a code of {lookup.table.name!r} do not follow each other")
        below += code_width(e)
    if (entries := list(lookup.table.dims.values())[lookup.axis]) != 1 << below:
        raise UnsuitableError(f"{lookup.table.name!r} has {entries} entries for codes of {below} bits")


def _check_vector(lookup: Lookup, grain: int) -> None:
    """Input k is entry k mod grain of its vector."""
    *others, last = lookup.at
    every, size = last.shape[1], list(lookup.table.dims.values())[-1]
    if size != grain or every < grain or not np.array_equal(last.values[0], np.arange(every) % grain):
        raise UnsuitableError(f"the last dim of {lookup.table.name!r} is not that of {grain} inputs of a code")
    if any(where.shape[1] > 1 for where in others):
        raise UnsuitableError(f"which vectors of {lookup.table.name!r} are looked up depends on the input")


def field(alu: Alu, words: Sequence[Register], at: int, width: int) -> Register:
    """Bits of a lane's words, counted through."""
    word, shift = divmod(at, 32)
    if width == 8 and shift % 8 == 0:
        return alu.prmt(words[word], 0, 0x4440 + shift // 8)
    low = alu.shr(words[word], shift) if shift else words[word]
    if shift + width > 32:
        low = alu.lop3(low, alu.shl(words[word + 1], 32 - shift), 0, OR)
    return alu.lop3(low, (1 << width) - 1, 0, AND)
