"""Lane programs of partial sums: a table of what x makes of every vector of a book of them, and its look-ups.

For a span of QUADS vectors of inputs, lane 4 r + q of a warp looks up vector q. Its place in the table is

    float32 [span, book, entry, q, SLOT],      SLOT = copies * columns

for `columns` rows of x. The copies are read by one r in `copies` each. Of the lanes that load together, two at most
share their banks, and meet there where their entries differ by an even number.

The formula is CodeGEMM's "Psumbook" (NeurIPS 2025): sum_v scale sum_c <x_v, book_c[code_c(v)]>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import numpy as np

from lowbit.kernels.alu import AND, Alu, NumpyAlu, Register
from lowbit.kernels.computed import QUADS, Books, field
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import LANES, Array, Program, at_once, by_row, lane_words, row_registers
from lowbit.passes.pointwise import UnsuitableError

SLOT = 4
"""Words that a lane stores at once, for one entry and vector."""
COLUMNS = (1, 2, 4)
"""Rows of x that share a slot."""
SHARED_SUMS = 160 << 10
"""Bytes of shared memory for a table and the vectors that it is made of."""
AT_ONCE = LANES // QUADS
"""Entries that a warpgroup makes at a time."""


@dataclass(frozen=True)
class Sums:
    """How one chunk of inputs is summed: that of the words which a lane loads at once.

    Attributes:
      program: what the weights are.
      columns: rows of x, one of COLUMNS.
    """

    program: Program
    columns: int

    def __post_init__(self) -> None:
        if 32 * self.words % (2 * self.books.bits) or self.spans % 2:
            what = f"{self.books.bits} bits for {self.books.grain} inputs"
            raise UnsuitableError(f"{what} do not fill {self.words} words of a lane with an even number of codes a row")
        if self.entries < AT_ONCE or self.books.grain < SLOT:
            shape = f"{self.entries} vectors of {self.books.grain}"
            raise UnsuitableError(f"tables of sums are for at least {AT_ONCE} vectors of {SLOT} and more, not {shape}")
        if (size := 4 * (prod(self.shape) + prod(self.vectors))) > SHARED_SUMS:
            what = f"a table of its sums and its vectors take {size} bytes"
            raise UnsuitableError(f"{what}, and shared memory has {SHARED_SUMS} for them")

    @property
    def books(self) -> Books:
        decoder = self.program.decoder
        if not isinstance(decoder, Books):
            raise UnsuitableError("its weights are no sums of vectors from codebooks")
        return decoder

    @property
    def words(self) -> int:
        """Of a lane."""
        return at_once(self.program.words[0])

    @property
    def chunks(self) -> int:
        """Of a stage."""
        return self.program.words[0] // self.words

    @property
    def inputs(self) -> int:
        return STAGE // self.chunks

    @property
    def spans(self) -> int:
        return self.inputs // (QUADS * self.books.grain)

    @property
    def entries(self) -> int:
        return self.books.shape[1]

    @property
    def vectors(self) -> tuple[int, int, int]:
        """Shape of those that are looked up."""
        return len(self.books.lookups), self.entries, self.books.grain

    @property
    def groups(self) -> int:
        """Scales of a row."""
        scale = self.books.scale
        return 0 if scale is None else self.inputs // scale.span if 0 < scale.span < self.inputs else 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the table."""
        return self.spans, len(self.books.lookups), self.entries, QUADS * SLOT

    def fill(self, alu: Alu, lane: Register, x: Any, books: Any, table: Any) -> None:
        """Half of the spans of a table, in each lane the sums of one vector of each with some entries.

        x: [columns, inputs of those spans], books: [book, entry, vector], all in float32.
        """
        grain, (spans, count, entries, _) = self.books.grain, self.shape
        inputs = self.inputs // 2
        own = alu.mad(alu.lop3(lane, QUADS - 1, 0, AND), 4 * grain, x[1])
        vectors = [
            [_loaded(alu, x, own, grain, 4 * (m * inputs + t * QUADS * grain)) for m in range(self.columns)]
            for t in range(spans // 2)
        ]
        entry = alu.mad(alu.shr(lane, 2), 4 * grain, books[1])
        to = alu.mad(lane, 4 * SLOT, table[1])
        for first in range(0, entries, AT_ONCE):
            for c in range(count):
                vector = _loaded(alu, books, entry, grain, 4 * grain * (c * entries + first))
                for t in range(spans // 2):
                    sums = [_dot(alu, part, vector) for part in vectors[t]] * (SLOT // self.columns)
                    alu.store_words(table, to, sums, 4 * SLOT * QUADS * ((t * count + c) * entries + first))

    def total(
        self, alu: Alu, lane: Register, words: Sequence[Register], scales: Sequence[Sequence[Register]], table: Any
    ) -> list[list[Register]]:
        """For each row of x, that of the lane's two rows.

        scales: for each group, those of the two rows.
        """
        (spans, count, entries, _), widths = self.shape, self.books.widths
        slot = alu.lop3(lane, QUADS - 1, 0, AND)
        copy = alu.lop3(alu.shr(lane, 2), SLOT // self.columns - 1, 0, AND)
        own = alu.mad(slot, 4 * SLOT, alu.mad(copy, 4 * self.columns, table[1]))
        found: dict[tuple[int, int, int], list[Register]] = {}
        at, groups = 0, max(self.groups, 1)
        for t in range(spans):
            for h in range(2):
                for c, width in enumerate(widths):
                    address = alu.mad(field(alu, words, at, width), 4 * SLOT * QUADS, own)
                    behind = 4 * SLOT * QUADS * (t * count + c) * entries
                    for m, value in enumerate(alu.load_words(table, address, self.columns, behind)):
                        found.setdefault((m, h, t * groups // spans), []).append(value)
                    at += width
        return [[self._scaled(alu, found, m, h, scales) for h in range(2)] for m in range(self.columns)]

    def _scaled(self, alu: Alu, found: Any, m: int, h: int, scales: Sequence[Sequence[Register]]) -> Register:
        parts = [_summed(alu, found[m, h, g]) for g in range(max(self.groups, 1))]
        if (scale := self.books.scale) is not None:
            widened = [alu.widen(both[h], scale.leaf.dtype) for both in scales]
            parts = [alu.f32("mul", part, by) for part, by in zip(parts, widened, strict=True)]
        out = _summed(alu, parts)
        for distance in (1, 2):  # the four lanes of a row
            out = alu.f32("add", out, alu.across(out, distance))
        return out


def _loaded(alu: Alu, memory: Any, address: Register, count: int, behind: int) -> list[Register]:
    parts = (alu.load_words(memory, address, SLOT, behind + 4 * i) for i in range(0, count, SLOT))
    return [word for part in parts for word in part]


def _dot(alu: Alu, a: Sequence[Register], b: Sequence[Register]) -> Register:
    return _summed(alu, [alu.f32("mul", x, y) for x, y in zip(a, b, strict=True)])


def _summed(alu: Alu, values: Sequence[Register]) -> Register:
    return reduce(lambda a, b: alu.f32("add", a, b), values)


def filled_in_numpy(sums: Sums, x: Array, books: Array) -> Array:
    """Half of a table, from its half of x and the codebooks."""
    spans, *rest = sums.shape
    made = np.zeros((spans // 2, *rest), np.float32)
    sums.fill(NumpyAlu(), _lane(), _memory(x), _memory(books), _memory(made))
    return made


def total_in_numpy(sums: Sums, table: Array, words: Array, *scales: Array) -> list[Array]:
    """For each row of x, float32 [ROWS]; `scales` [ROWS] for each group."""
    of_groups = [row_registers(s) for s in scales]
    totals = sums.total(NumpyAlu(), _lane(), list(lane_words(words)), of_groups, _memory(table))
    return [by_row(pair).view(np.float32).reshape(ROWS) for pair in totals]


def _memory(a: Array) -> tuple[Array, Any]:
    """Its words, and where they begin."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint32), np.uint32(0)


def _lane() -> Array:
    return np.arange(LANES, dtype=np.uint32)
