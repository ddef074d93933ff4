"""Lane programs of partial sums: tables of what x makes of whatever a code can say of some inputs, and the look-ups.

For a span of QUADS vectors of inputs, lane 4 r + q of a warp looks up vector q. Its place in the tables is

    float32 [span, book, entry, layer, q, WORD],      layer * WORD = copies * columns

for `columns` rows of x; a copy is read by every so many r. Where shared memory has room for two layers, lanes that load
together meet in no bank. With one, two of them share their banks, and meet there where their entries differ by an even
number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import ceil, prod
from typing import Any

import numpy as np

from lowbit.ir.dtypes import bits as dtype_bits
from lowbit.kernels.alu import AND, XOR, Alu, NumpyAlu, Register
from lowbit.kernels.computed import QUADS
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import LANES, Array, Program, by_leaf, groups_of, row_registers, row_values, words_of_lanes
from lowbit.kernels.layout import SMS, WARPGROUPS, Layout
from lowbit.kernels.looked_up import WORD, Source, added, loaded, source
from lowbit.kernels.memory import ALIGNED, SHARED
from lowbit.passes.pointwise import UnsuitableError
from lowbit.passes.scalar import Element

COLUMNS = (1, 2, 4)
"""Rows of x that share a table."""
BUILDING = 8
"""Steps that making its tables and filling its pipeline costs a block, about."""
STEPS = 64
"""Of a block at most, for one row of x: their results wait in shared memory."""
DEPTH = 4
"""Stages in flight, where they fit."""


@dataclass(frozen=True)
class Sums:
    """How one chunk of inputs is summed: that for which the tables fit, some words of a lane.

    Attributes:
      program: what the weights are.
      columns: rows of x, one of COLUMNS.
    """

    program: Program
    columns: int

    def __post_init__(self) -> None:
        if (size := self.fixed(self.layers) + 2 * self.stage) > SHARED:
            raise UnsuitableError(f"its tables and buffers take {size} bytes, and shared memory has {SHARED} for them")

    @staticmethod
    def of(program: Program, m: int) -> Sums:
        """For `m` rows of x. Raises UnsuitableError with the reason where there is none."""
        if m > max(COLUMNS):
            raise UnsuitableError(f"tables of sums serve at most {max(COLUMNS)} rows of x, and it has {m}")
        return Sums(program, next(c for c in COLUMNS if c >= m))

    @cached_property
    def source(self) -> Source:
        return source(self.program)

    @property
    def chunks(self) -> int:
        """Of a stage."""
        return self.program.words[0] // self.source.words

    @property
    def inputs(self) -> int:
        return STAGE // self.chunks

    @property
    def spans(self) -> int:
        return self.inputs // (QUADS * self.source.grain)

    def groups(self, e: Element) -> int:
        """Of a chunk, that a scale has a value for."""
        return max(1, groups_of(e) // self.chunks)

    @property
    def stored(self) -> tuple[tuple[Element, int], ...]:
        """The source's scales, each once for every group: (element, group)."""
        return tuple((e, g) for e in self.source.scales for g in range(self.groups(e)))

    @cached_property
    def layers(self) -> int:
        return 2 if self.fixed(2) + 2 * self.stage <= SHARED else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tables."""
        return self._shape(self.layers)

    def _shape(self, layers: int) -> tuple[int, ...]:
        return self.spans, self.source.books, self.source.entries, layers * QUADS * WORD

    def fixed(self, layers: int) -> int:
        """Bytes of shared memory for tables, what they are made of, and results on their way out."""
        buffers = self._shape(layers), self.source.vectors, (self.columns, self.inputs), (WARPGROUPS, STEPS, ROWS)
        return sum(4 * prod(shape) + ALIGNED for shape in buffers if shape)

    @property
    def stage(self) -> int:
        """Bytes of shared memory that are fetched for one step."""
        size = 4 * WARPGROUPS * self.source.words * LANES + ALIGNED
        for elements in by_leaf(self.program.weights).values():
            each = self.groups(elements[0]) * ROWS * dtype_bits(elements[0].leaf.dtype) // 8
            size += WARPGROUPS * len(elements) * each + ALIGNED
        return size

    @property
    def looks(self) -> int:
        """Look-ups of a lane for its two rows."""
        return 2 * self.spans * self.source.looks_a_vector

    @property
    def loaded(self) -> float:
        """Words of shared memory for a weight: with one layer, lanes that load together meet, and wait for two."""
        found = self.looks * self.columns * (3 - self.layers)
        return (found + self.source.words + 2 * len(self.stored) + 6 * self.columns) / self._weights

    @property
    def issued(self) -> float:
        """Instructions for a weight, about, as `make aot` counts them."""
        return (self.looks * (self.source.instructions + self.columns) + 16 * (1 + self.columns)) / self._weights

    @property
    def _weights(self) -> int:
        """Of a lane."""
        return self.inputs * ROWS // LANES

    def depth(self, steps: int) -> int:
        """Stages in flight: a power of two, for the loop divides by it."""
        fit = min(DEPTH, steps, (SHARED - self.fixed(self.layers)) // self.stage)
        return 1 << fit.bit_length() - 1

    def bands(self, of: Layout) -> int:
        """Into how many bands of rows blocks divide a weight: as few steps as possible of the SM that has most."""
        pairs, chunks = of.tiles // WARPGROUPS, of.stages * self.chunks

        def longest(count: int) -> int:
            return ceil(count * chunks / SMS) * (pairs // count + BUILDING)

        every = (b for b in range(1, pairs + 1) if pairs % b == 0 and pairs // b * self.columns <= STEPS)
        return min(every, key=longest)

    def fill(self, alu: Alu, lane: Register, x: Any, books: Any, table: Any) -> None:
        """Half of the spans of the tables, in each lane the sums of one vector of each with some entries.

        x: [columns, span, QUADS, grain], books: those of the source, all in float32.
        """
        grain, (_, count, entries, entry) = self.source.grain, self.shape
        quad, which = alu.lop3(lane, QUADS - 1, 0, AND), alu.shr(lane, 2)
        own = alu.mad(quad, 4 * grain, x[1])
        to = alu.mad(which, 4 * entry, alu.mad(quad, 4 * WORD, table[1]))
        places = [to]
        if self.layers == 2:  # the lanes of odd entries begin with the other layer, and so in the other banks
            odd = alu.lop3(which, 1, 0, AND)
            places = [alu.mad(bit, 4 * WORD * QUADS, to) for bit in (odd, alu.lop3(odd, 1, 0, XOR))]

        def part(t: int, m: int) -> list[Register]:
            return loaded(alu, x, own, grain, 4 * (m * self.inputs // 2 + t * QUADS * grain))

        for t, book, first, sums in self.source.made(alu, lane, part, self.spans // 2, self.columns, books):
            for place in places:
                behind = 4 * entry * ((t * count + book) * entries + first)
                alu.store_words(table, place, sums * (WORD // self.columns), behind)

    def total(
        self, alu: Alu, lane: Register, words: Sequence[Register], stored: Sequence[Sequence[Register]], table: Any
    ) -> list[list[Register]]:
        """For each row of x, that of the lane's two rows.

        stored: for each of `self.stored`, its value for the two rows.
        """
        (spans, count, entries, entry), own = self.shape, self.own(alu, lane, table)
        found: dict[tuple[int, int], dict[int, Register]] = {}
        groups = [self.groups(e) for e in self.source.scales] or [1]
        first = list(accumulate(groups, initial=0))
        for look in self.source.looks(alu, words):
            address = alu.mad(look.entry, 4 * entry, own)
            behind = 4 * entry * (look.span * count + look.book) * entries
            scale = first[look.scale] + look.span * groups[look.scale] // spans
            for m, value in enumerate(alu.load_words(table, address, self.columns, behind)):
                sums = found.setdefault((m, look.half), {})
                sums[scale] = _with(alu, sums.get(scale), value, look.sign)
        widened = [
            [alu.widen(row, e.leaf.dtype) for row in both] for (e, _), both in zip(self.stored, stored, strict=True)
        ]
        return [[_row(alu, found[m, h], [w[h] for w in widened]) for h in range(2)] for m in range(self.columns)]

    def own(self, alu: Alu, lane: Register, table: Any) -> Register:
        """Where the lane's copy of the first entry is."""
        in_layer = WORD // self.columns
        copy = alu.lop3(alu.shr(lane, 2), self.layers * in_layer - 1, 0, AND)
        own = alu.mad(alu.lop3(lane, QUADS - 1, 0, AND), 4 * WORD, table[1])
        own = alu.mad(alu.lop3(copy, in_layer - 1, 0, AND), 4 * self.columns, own)
        return alu.mad(alu.shr(copy, in_layer.bit_length() - 1), 4 * WORD * QUADS, own)


def _with(alu: Alu, total: Register | None, value: Register, sign: Register | None) -> Register:
    if sign is None:
        return value if total is None else alu.f32("add", total, value)
    return alu.f32("mul", value, sign) if total is None else alu.f32("fma", value, sign, total)


def _row(alu: Alu, sums: Mapping[int, Register], scales: Sequence[Register]) -> Register:
    """A row's, from what its lane found under each of the scales."""
    out = added(alu, [alu.f32("mul", part, scales[s]) if scales else part for s, part in sums.items()])
    for distance in (1, 2):  # the four lanes of a row
        out = alu.f32("add", out, alu.across(out, distance))
    return out


def own_in_numpy(sums: Sums) -> Array:
    """For each lane, how far behind the beginning of an entry it loads, in bytes."""
    return sums.own(NumpyAlu(), _lane(), (None, np.uint32(0)))


def filled_in_numpy(sums: Sums, x: Array, *books: Array) -> Array:
    """Half of the tables, from its half of x and the codebooks."""
    spans, *rest = sums.shape
    made = np.zeros((spans // 2, *rest), np.float32)
    sums.fill(NumpyAlu(), _lane(), _memory(x), _memory(books[0]) if books else None, _memory(made))
    return made


def total_in_numpy(sums: Sums, table: Array, words: Array, *scales: Array) -> list[Array]:
    """For each row of x, float32 [ROWS]; `scales`: [ROWS] for each of `sums.stored`."""
    pairs = [row_registers(s) for s in scales]
    totals = sums.total(NumpyAlu(), _lane(), list(words_of_lanes(words)), pairs, _memory(table))
    return [row_values(pair).view(np.float32).reshape(ROWS) for pair in totals]


def _memory(a: Array) -> tuple[Array, Any]:
    """Its words, and where they begin."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint32), np.uint32(0)


def _lane() -> Array:
    return np.arange(LANES, dtype=np.uint32)
