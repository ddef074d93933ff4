"""Lane programs over a stage of the pipeline: 64 rows by STAGE inputs, read in numpy.

A register of 128 lanes is one uint32[128]. Lane 32 warp + 4 r + q.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lowbit.kernels.alu import HALVES, Alu, Half, NumpyAlu, Register
from lowbit.kernels.decoders import COLUMNS, ROWS, RUN, Decoder, Table
from lowbit.kernels.pick import pick
from lowbit.kernels.tables import Builder
from lowbit.passes.pointwise import Pointwise
from lowbit.passes.scalar import Element

STAGE = 256
"""Inputs of a stage: 4 tiles, so that the words of a lane come in vectors of 4 for every width."""
LANES = 128
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Program:
    """How a stage is decoded: words and parameters of its rows to halves.

    Attributes:
      weights: what each weight is.
      kind: of the halves.
    """

    weights: Pointwise
    kind: Half

    @cached_property
    def decoder(self) -> Decoder:
        return pick(self.weights)

    @property
    def words(self) -> int:
        """Words a lane."""
        return self.decoder.bits * STAGE // COLUMNS

    @cached_property
    def inputs(self) -> tuple[tuple[Element, int], ...]:
        """Parameters, each once for every group of the stage that it has: (element, group)."""
        return tuple((e, g) for e in self.weights.parameters for g in range(groups_of(e)))

    def __call__(self, alu: Alu, words: Sequence[Register], *stored: Sequence[Register]) -> list[Register]:
        """The registers of the stage, in the order of WGMMA's fragments.

        Args:
          words: of the lane.
          stored: for each of `inputs`, its value for the lane's two rows.
        """
        tables: dict[tuple[int, ...], list[Table]] = {}

        def tables_at(column: int) -> list[Table]:
            groups = tuple(column * groups_of(e) // STAGE for e in self.weights.parameters)
            if groups not in tables:
                tables[groups] = [self._table(alu, h, groups, stored) for h in range(2)]
            return tables[groups]

        out = []
        for tile in range(STAGE // COLUMNS):
            by_run = [tables_at(COLUMNS * tile + RUN * jj) for jj in range(COLUMNS // RUN)]
            by_half = [[run[h] for run in by_run] for h in range(2)]
            bits = self.decoder.bits
            out += self.decoder.halves(alu, self.kind, words[tile * bits : (tile + 1) * bits], by_half)
        return out

    def _table(self, alu: Alu, h: int, groups: Sequence[int], stored: Sequence[Sequence[Register]]) -> Table:
        chosen = dict(zip(self.weights.parameters, groups, strict=True))
        held = {e: reg[h] for (e, g), reg in zip(self.inputs, stored, strict=True) if chosen[e] == g}
        return self.decoder.table(Builder(alu, self.kind, held), self.weights.entries)


def groups_of(e: Element) -> int:
    """Groups of a stage that a parameter has a value for."""
    return STAGE // e.span if 0 < e.span < STAGE else 1


def in_numpy(program: Program, words: Array, *stored: Array) -> Array:
    """The stage [ROWS, STAGE] of weights, in halves.

    Args:
      words: u32 [program.words, LANES], in memory order: vectors of 4 a lane.
      stored: for each of `program.inputs`, [ROWS].
    """
    lane_words = words.reshape(-1, LANES, 4).transpose(0, 2, 1).reshape(-1, LANES)
    registers = program(NumpyAlu(), list(lane_words), *(row_registers(s) for s in stored))
    return from_registers(np.stack([np.broadcast_to(r, LANES) for r in registers]), program.kind)


def row_registers(stored: Array) -> list[Array]:
    """A value for each of the rows, as the lanes of row halves 0 and 1 hold it."""
    raw = np.ascontiguousarray(stored).view(f"u{stored.dtype.itemsize}").astype(np.uint32)
    rows = raw.reshape(4, 2, 8)  # warp, h, r
    return [np.repeat(rows[:, h].reshape(-1), 4) for h in range(2)]


def from_registers(registers: Array, kind: Half) -> Array:
    """Registers [2 j + h, lane] of two halves as the matrix [ROWS, inputs]."""
    halves = np.stack([registers & 0xFFFF, registers >> 16], -1).astype(np.uint16)
    by_dim = halves.reshape(-1, 2, 4, 8, 4, 2)  # j, h, warp, r, q, e
    matrix = np.ascontiguousarray(by_dim.transpose(2, 1, 3, 0, 4, 5).reshape(ROWS, -1))
    return matrix.view(HALVES[kind])
