"""Lane programs over a stage of the pipeline: 64 rows by STAGE inputs, read in numpy.

A register of 128 lanes is one uint32[128]. Lane 32 warp + 4 r + q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any

import numpy as np

from lowbit.kernels.alu import HALVES, Alu, Half, NumpyAlu, Register
from lowbit.kernels.computed import Books
from lowbit.kernels.decoders import COLUMNS, ROWS, RUN, STAGE, Decoder, SharedTable, Table
from lowbit.kernels.pick import pick
from lowbit.kernels.tables import Builder
from lowbit.passes.pointwise import Pointwise
from lowbit.passes.scalar import Element

LANES = 128
PADDED = ROWS + 2
TMA_ROW = 256
"""Elements that a copy takes at most along a dim."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Program:
    """How a stage is decoded: words and parameters of its rows to halves.

    Attributes:
      weights: what each weight is.
      kind: of the halves.
      arrays: bits of a code in each array of words.
      nested: whether the first arrays are decoded alone too, at another width.
      shared: whether tables of 16 entries or more are stored ones of rows, which may be in shared memory.
    """

    weights: Pointwise
    kind: Half
    arrays: tuple[int, ...]
    nested: bool = False
    shared: bool = False

    @cached_property
    def decoder(self) -> Decoder:
        return pick(self.weights, self.arrays[0] if self.nested else None, self.shared)

    @property
    def words(self) -> tuple[int, ...]:
        """Words a lane, in each array."""
        return tuple(bits * STAGE // COLUMNS // self.weights.grain for bits in self.arrays)

    @cached_property
    def inputs(self) -> tuple[tuple[Element, int], ...]:
        """Parameters, each once for every group of the stage that it has: (element, group)."""
        return tuple((e, g) for e in self.weights.parameters for g in range(groups_of(e)))

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Of what is in shared memory, in halves: tables of all rows, flat, as TMA takes them; or those of a tile's
        rows [entry, row], PADDED so that the entries of a row lie in other banks."""
        if isinstance(self.decoder, Books):
            return prod(self.decoder.shape) // TMA_ROW, TMA_ROW
        return len(self.weights.entries), PADDED

    @property
    def of_rows(self) -> bool:
        """Whether one table serves a row from end to end."""
        return bool(self.inputs) and all(e.span == 0 for e, _ in self.inputs)

    def __call__(
        self,
        alu: Alu,
        words: Sequence[Sequence[Register]],
        *stored: Sequence[Register],
        shared: Sequence[SharedTable] = (),
    ) -> list[Register]:
        """The registers of the stage, in the order of WGMMA's fragments.

        Args:
          words: of the lane, array by array.
          stored: for each of `inputs`, its value for the lane's two rows; or what `tables` made of them.
          shared: the tables in shared memory, of a decoder that reads some.
        """
        made: dict[tuple[int, ...], list[Table]] = {}

        def tables_at(column: int) -> list[Table]:
            if self.of_rows or not self.inputs:
                return [[register[h] for register in stored] for h in range(2)]
            groups = tuple(column * groups_of(e) // STAGE for e in self.weights.parameters)
            if groups not in made:
                made[groups] = [self._table(alu, h, groups, stored) for h in range(2)]
            return made[groups]

        out = []
        columns = self.decoder.columns
        for tile in range(STAGE // columns):
            by_run = [tables_at(column) for column in range(columns * tile, columns * (tile + 1), RUN)]
            by_half = [[run[h] for run in by_run] for h in range(2)]
            counts = [len(array) * columns // STAGE for array in words]
            of_tile = [w for count, array in zip(counts, words, strict=True) for w in array[tile * count :][:count]]
            out += self.decoder.halves(alu, self.kind, of_tile, by_half, shared)
        return out

    def tables(self, alu: Alu, *stored: Sequence[Register]) -> list[list[Register]]:
        """Where `of_rows`: the registers of a row's table, each for the lane's two rows."""
        groups = (0,) * len(self.inputs)
        both = [self._table(alu, h, groups, stored) for h in range(2)]
        return [list(pair) for pair in zip(*both, strict=True)]

    def _table(self, alu: Alu, h: int, groups: Sequence[int], stored: Sequence[Sequence[Register]]) -> Table:
        chosen = dict(zip(self.weights.parameters, groups, strict=True))
        held = {e: reg[h] for (e, g), reg in zip(self.inputs, stored, strict=True) if chosen[e] == g}
        return self.decoder.table(Builder(alu, self.kind, held), self.weights.entries)


def by_leaf(weights: Pointwise) -> dict[str, list[Element]]:
    """Parameters by the array that stores them."""
    out: dict[str, list[Element]] = {}
    for e in weights.parameters:
        out.setdefault(e.leaf.name, []).append(e)
    return out


def groups_of(e: Element) -> int:
    """Groups of a stage that a parameter has a value for."""
    return STAGE // e.span if 0 < e.span < STAGE else 1


def in_numpy(program: Program, words: Sequence[Array], *stored: Array, table: Array | None = None) -> Array:
    """The stage [ROWS, STAGE] of weights, in halves.

    Args:
      words: array by array u32 [word, LANES], in memory order: vectors of 4 a lane; or bytes [ROWS, STAGE].
      stored: for each of `program.inputs`, [ROWS]; or what `tables_in_numpy` made of them.
      table: what is in shared memory, of `program.table_shape`.
    """
    tables = [] if table is None else _tables_of_lanes(program, table)
    of_lanes = [list(words_of_lanes(w)) for w in words]
    registers = program(NumpyAlu(), of_lanes, *map(row_registers, stored), shared=tables)
    return from_registers(np.stack([np.broadcast_to(r, LANES) for r in registers]), program.kind)


def tables_in_numpy(program: Program, *stored: Array) -> list[Array]:
    """The registers of the rows' tables, each u32 [ROWS]."""
    made = program.tables(NumpyAlu(), *map(row_registers, stored))
    return [row_values([np.broadcast_to(r, LANES) for r in register]) for register in made]


def at_once(words: int) -> int:
    """Words that a lane loads at once, of an array with so many for it."""
    return gcd(words, 4)


def words_of_lanes(words: Array) -> Array:
    """The registers u32 [word, LANES] of what a lane loads."""
    if words.dtype == np.uint8:  # [ROWS, STAGE], four inputs of a row in a word
        of_rows = np.ascontiguousarray(words).view("<u4").reshape(4, 2, 8, -1, 4)  # warp, h, r, slab, q
        return of_rows.transpose(3, 1, 0, 2, 4).reshape(-1, LANES)
    return words.reshape(-1, LANES, at_once(len(words))).transpose(0, 2, 1).reshape(-1, LANES)


def _tables_of_lanes(program: Program, table: Array) -> list[Array]:
    if isinstance(program.decoder, Books):
        return list(table.reshape(program.decoder.shape)[:, :, 0])  # the copies are alike
    return [np.stack(t, 1) for t in zip(*map(row_registers, table[:, :ROWS]), strict=True)]


def row_registers(stored: Array) -> list[Array]:
    """A value for each of the rows, as the lanes of row halves 0 and 1 hold it."""
    raw = np.ascontiguousarray(stored).view(f"u{stored.dtype.itemsize}").astype(np.uint32)
    rows = raw.reshape(4, 2, 8)  # warp, h, r
    return [np.repeat(rows[:, h].reshape(-1), 4) for h in range(2)]


def row_values(register: Sequence[Array]) -> Array:
    """The inverse of `row_registers`, for words."""
    lanes = np.stack(register).reshape(2, 4, 8, 4)[..., 0]  # h, warp, r
    return np.ascontiguousarray(lanes.transpose(1, 0, 2)).reshape(ROWS)


def from_registers(registers: Array, kind: Half) -> Array:
    """Registers [2 j + h, lane] of two halves as the matrix [ROWS, inputs]."""
    halves = np.stack([registers & 0xFFFF, registers >> 16], -1).astype(np.uint16)
    by_dim = halves.reshape(-1, 2, 4, 8, 4, 2)  # j, h, warp, r, q, e
    matrix = np.ascontiguousarray(by_dim.transpose(2, 1, 3, 0, 4, 5).reshape(ROWS, -1))
    return matrix.view(HALVES[kind])
