"""Sums by the vectors that codes look up: what the gradients of tables of all rows are made of.

A weight is w[n, k] = s[n, k] sum_b t_b[code_b[n, j], e] for input k = j v + e. A table's gradient is the transpose of
its look-up, a bucket sum (`lowbit.passes.bucket`). With G = dy^T x, the gradient of the dense weight,

  dL/dt_b[c, e] = the sum of s[n, k] G[n, k] over all n and j whose code_b is c.

The lanes that have a tile of G add it to sums in shared memory, whichever comes first. Floats would come out otherwise
each time, integers do not. With p the power of two not above the largest |s G| of the tile, or LEAST,

  s G = p 2^(1 - L) (high + 2^-(L + 1) low),

integers that are each the nearest one. Neither is above 2^L, and L is so large that 32 bits hold the sum of all vectors
of a tile. So an entry is off by at most 2^-(2 L + 1) p, 2^-37 of the largest for vectors of 4, beside one rounding of
its own to float32. The sums of a tile go back to float32, and tiles are added in order. If an entry of a tile is not
finite, none of its sums is.

The other way is a product with ones where codes agree, [c, (n j)] times [(n j), e]: the former made in registers by
comparing two codes at a time, the latter from shared memory as two bfloat16. For 256 entries a lane compares 16 times
for 16 vectors, which are 32 instructions for a weight in vectors of 4, and 32 for one in two vectors of 8. `make aot`
counts 10 and 14 here. It would have 1,024 WGMMAs of 8 columns for a tile and a table of vectors of 4, 4,096 clocks at
the peak of the tensor cores, which so few columns do not reach, and keep 16 bits of an entry. Here it is two additions
to shared memory for a weight and table, of which 32 lanes with random codes take PASSES: 3,580 clocks. Additions of 64
bits, which would be one, are loops that try again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from math import ceil
from typing import Any

import numpy as np

from lowbit.kernels.alu import AND, Alu, NumpyAlu, Register
from lowbit.kernels.computed import QUADS, Books, field
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import LANES, TMA_ROW, Array, Program, row_registers, words_of_lanes
from lowbit.kernels.layout import WARPGROUPS, Layout
from lowbit.kernels.memory import too_much_for_db
from lowbit.passes.pointwise import UnsuitableError
from lowbit.passes.scalar import Element

WHOLE = 1.5 * 2**23
"""Added to a float32 below 2^22 it leaves the nearest integer in the low bits."""
LEAST = 2.0**-60
"""So that its inverse times any scale is finite."""
EXPONENT = 0x7F800000
AT_ONCE = 2
"""Words that a lane clears, and scales back, at a time."""
PARTS = 16 << 20
"""Bytes of the sums of all tiles of a launch."""
PASSES = 3.5
"""Of 32 lanes that add under random codes: in the fullest of 32 banks."""


@dataclass(frozen=True)
class Buckets:
    """The sums of a tile [ROWS, STAGE] for the vectors of a program's tables.

    Raises UnsuitableError where it has none, or shared memory has no room for them.
    """

    program: Program

    def __post_init__(self) -> None:
        if not isinstance(self.program.decoder, Books):
            raise UnsuitableError("none of its tables is one that all rows share")
        if (why := too_much_for_db(self.words)) is not None:
            raise UnsuitableError(f"its tables hold {self.words:,} numbers, each summed as two integers: {why}")

    @cached_property
    def decoder(self) -> Books:
        assert isinstance(self.program.decoder, Books)
        return self.program.decoder

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the sums: [table, input of a vector, entry]. Of the lanes that add together, each adds for the same input:
        neighbouring entries lie in neighbouring banks."""
        books, entries, _, grain = self.decoder.shape
        return books, grain, entries

    @property
    def words(self) -> int:
        """Of the sums, in whole rows of a copy."""
        books, grain, entries = self.shape
        return TMA_ROW * ceil(books * grain * entries / TMA_ROW)

    @property
    def table_shape(self) -> tuple[int, int, int]:
        """What is in shared memory for a tile: words [high and low, rows, TMA_ROW]."""
        return 2, self.words // TMA_ROW, TMA_ROW

    @property
    def most(self) -> int:
        """L: of the vectors of a tile, all under one code, the sum is at most 2^30."""
        return 30 - (ROWS * STAGE // self.decoder.grain - 1).bit_length()

    @property
    def stored(self) -> tuple[tuple[Element, int], ...]:
        """The scale, once for every group of the stage: (element, group)."""
        return self.program.inputs

    @property
    def issued(self) -> float:
        """Instructions for a weight, about, as `make aot` counts them: its size and two integers; for each table two
        additions and a share of finding the vector; and a share of what clears the sums and scales them."""
        books, grain, _ = self.shape
        return 7 + books * (2 + 3 / grain) + 6.5 * self.words / (ROWS * STAGE)

    @property
    def loaded(self) -> float:
        """Words of shared memory for a weight, as many as the passes could move."""
        return 2 * PASSES * self.shape[0]

    def bands(self, of: Layout) -> tuple[int, int]:
        """Into how many bands of rows a weight is divided, one after another so that their sums take PARTS bytes or
        are those of one pair of tiles; and the tiles of each, the last of which may have fewer."""
        pairs, each = of.tiles // WARPGROUPS, 4 * WARPGROUPS * of.stages * self.words
        bands = ceil(pairs / max(1, PARTS // each))
        in_band = ceil(pairs / bands)
        return ceil(pairs / in_band), WARPGROUPS * in_band

    def __call__(
        self, alu: Alu, lane: Register, g: Sequence[Register], words: Sequence[Register],
        stored: Sequence[Sequence[Register]], memory: Any,
    ) -> None:  # fmt: skip
        """Leaves the sums of a tile in the first half of `memory`, in float32.

        Args:
          g: accumulators in WGMMA's order, (2 j + h) 2 + e.
          words: the codes of the lane.
          stored: for each of `self.stored`, its value for the lane's two rows.
          memory: of `table_shape`, whatever is there.
        """
        scales = [[alu.widen(r, e.leaf.dtype) for r in rows] for (e, _), rows in zip(self.stored, stored, strict=True)]
        scales = scales or [[alu.number(1.0)] * 2]
        power = self._power(alu, lane, self._largest(alu, g, scales), memory)
        # 2^(L - 1) / p, by the difference of the exponents: they are 127 too large, the bias.
        up = alu.mad(power, (1 << 32) - 1, 253 + self.most << 23)
        factors = [[alu.f32("mul", scale, up) for scale in rows] for rows in scales]
        own = alu.mad(lane, 4 * AT_ONCE, memory[1])
        for at in range(0, 8 * self.words, 4 * AT_ONCE * LANES):
            alu.store_words(memory, own, [alu.number(0.0)] * AT_ONCE, at)
        alu.barrier()
        self._add(alu, g, words, factors, memory)
        alu.barrier()
        down = alu.f32("mul", power, alu.number(2.0 ** (1 - self.most)))
        for at in range(0, 4 * self.words, 4 * AT_ONCE * LANES):
            both = [alu.load_words(memory, own, AT_ONCE, half + at) for half in (0, 4 * self.words)]
            alu.store_words(
                memory, own, [self._value(alu, high, low, down) for high, low in zip(*both, strict=True)], at
            )

    def _vectors(self) -> Iterator[tuple[int, int, int, list[int]]]:
        """Of a lane, in the order of its codes: the number of the group, the row, the span and the accumulators."""
        grain = self.decoder.grain
        spans = STAGE // (QUADS * grain)
        groups = len(self.stored) or 1
        for t in range(spans):
            pairs = range(t * grain // 2, (t + 1) * grain // 2)
            for h in range(2):
                yield t * groups // spans, h, t, [2 * (2 * j + h) + e for j in pairs for e in range(2)]

    def _largest(self, alu: Alu, g: Sequence[Register], scales: Sequence[Sequence[Register]]) -> Register:
        """|s G| of a lane."""
        found: dict[tuple[int, int], list[Register]] = {}
        for group, h, _, places in self._vectors():
            found.setdefault((group, h), []).extend(g[place] for place in places)
        sizes = [
            alu.f32("mul", reduce(alu.larger_size, values), scales[group][h]) for (group, h), values in found.items()
        ]
        return reduce(alu.larger_size, [alu.number(0.0), *sizes])

    def _power(self, alu: Alu, lane: Register, largest: Register, memory: Any) -> Register:
        """p, from what the lanes of a warp have and then the four warps."""
        for distance in (1, 2, 4, 8, 16):
            largest = alu.larger(largest, alu.across(largest, distance))
        alu.store_words(memory, alu.mad(alu.shr(lane, 5), 4, memory[1]), [largest], 0)
        alu.barrier()
        largest = reduce(alu.larger, alu.load_words(memory, memory[1], 4, 0))
        alu.barrier()
        return alu.larger(alu.lop3(largest, EXPONENT, 0, AND), alu.number(LEAST))

    def _add(
        self, alu: Alu, g: Sequence[Register], words: Sequence[Register], factors: Sequence[Sequence[Register]],
        memory: Any,
    ) -> None:  # fmt: skip
        _, grain, entries = self.shape
        at = 0
        for group, h, _, places in self._vectors():
            both = [self._integers(alu, g[place], factors[group][h]) for place in places]
            for book, width in enumerate(self.decoder.widths):
                address = alu.mad(field(alu, words, at, width), 4, memory[1])
                at += width
                for e, pair in enumerate(both):
                    for half, value in enumerate(pair):
                        behind = half * self.words + (book * grain + e) * entries
                        alu.add_word(memory, address, value, 4 * behind)

    def _integers(self, alu: Alu, value: Register, factor: Register) -> tuple[Register, Register]:
        """high and low."""
        whole, bits = alu.number(WHOLE), int(np.float32(WHOLE).view(np.uint32))
        high = alu.f32("fma", value, factor, whole)
        rest = alu.f32("fma", value, factor, alu.f32("sub", whole, high))
        low = alu.f32("fma", rest, alu.number(2.0 ** (self.most + 1)), whole)
        return alu.sub(high, bits), alu.sub(low, bits)

    def _value(self, alu: Alu, high: Register, low: Register, down: Register) -> Register:
        less = alu.number(2.0 ** -(self.most + 1))
        return alu.f32("mul", alu.f32("fma", alu.from_integer(low), less, alu.from_integer(high)), down)


def in_numpy(buckets: Buckets, g: Array, words: Array, *stored: Array) -> Array:
    """What is in shared memory at the end, i32 of `table_shape`, of which the first half are float32.

    Args:
      g: f32 [ROWS, STAGE].
      words, stored: as `lanes.in_numpy` has them.
    """
    by_dim = (
        np.ascontiguousarray(g, np.float32).view(np.uint32).reshape(4, 2, 8, STAGE // 8, 4, 2)
    )  # warp, h, r, j, q, e
    registers = by_dim.transpose(3, 1, 5, 0, 2, 4).reshape(-1, LANES)
    memory = np.zeros(2 * buckets.words, np.uint32)
    lane, rows = np.arange(LANES, dtype=np.uint32), [row_registers(s) for s in stored]
    buckets(NumpyAlu(), lane, list(registers), list(words_of_lanes(words)), rows, (memory, np.uint32(0)))
    return memory.view(np.int32).reshape(buckets.table_shape)
