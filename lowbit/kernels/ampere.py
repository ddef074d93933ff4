"""The schedule `mma` for compute capability 8: `cp.async` in place of TMA, `mma.sync` in place of WGMMA.

A block is one warpgroup. It decodes and multiplies, one after another, the WARPGROUPS tiles of rows that as many
warpgroups share elsewhere, so that what it reads of x serves all. Words, parameters and x come through a ring in shared
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.ir.dtypes import numpy_dtype
from lowbit.kernels.alu import HALVES
from lowbit.kernels.ampere_verbs import Ampere, AmpereVerbs
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import LANES, Program, groups_of
from lowbit.kernels.layout import WARPGROUPS
from lowbit.kernels.memory import BEFORE_HOPPER, looked_up, stage_bytes
from lowbit.kernels.mma import AXES, HALF, MOST_DEEP, Schedule, Shape, Tuning, parts_of_k

COLUMNS_A_BLOCK = 32
"""Rows of x that a block multiplies at most: more do not fit in its registers."""
SMS = 108
"""Of an A100."""


def tuning(shape: Shape, program: Program) -> Tuning:
    """As many columns as two stages have room for, and as many stages as a block has room for, or two on an SM."""
    taken, stage = looked_up(program), partial(stage_bytes, program)
    most = min(shape.m, COLUMNS_A_BLOCK)
    columns = next(c for c in range(most, 0, -8) if shape.m % c == 0 and taken + 2 * stage(c) <= BEFORE_HOPPER)
    parts = parts_of_k(shape, columns, SMS)
    blocks = shape.rows // WARPGROUPS * ceil(shape.m / columns) * parts
    room = BEFORE_HOPPER if blocks <= SMS else BEFORE_HOPPER // 2
    depth = max(2, min(MOST_DEEP, (room - taken) // stage(columns), shape.stages // parts))
    return Tuning(columns, parts, 1 << depth.bit_length() - 1)  # a power of two: the loop divides by it


def mma(program: Program, shape: Shape, tuned: Tuning, verbs: AmpereVerbs | None = None) -> Callable[..., jax.Array]:
    """As `lowbit.kernels.mma.mma`."""
    schedule = AmpereSchedule(program, shape, tuned, verbs or Ampere())
    return plgpu.kernel(
        schedule.body,
        out_type=jax.ShapeDtypeStruct((tuned.parts, shape.rows * ROWS, shape.m), jnp.float32),
        scratch_types=[*schedule.ring, *schedule.scratch[:1]],
        grid=(shape.rows // WARPGROUPS, tuned.parts, ceil(shape.m / tuned.columns)),
        grid_names=AXES[:3],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=schedule.verbs.interpret,
    )


@dataclass(frozen=True)
class AmpereSchedule(Schedule):
    """What a block does."""

    verbs: AmpereVerbs

    @property
    def streams(self) -> list[tuple[int, tuple[int, ...], Any]]:
        """Of words, and of parameters that change from stage to stage: the stages that share what a tile fetches, its
        shape and its type."""
        words = [(1, (1, count, LANES), np.uint32) for count in self.program.words]
        leaves = [] if self.program.of_rows else self.leaves.values()
        return words + [
            (self.wide(of[0]), (groups_of(of[0]), len(of), ROWS), numpy_dtype(of[0].leaf.dtype)) for of in leaves
        ]

    @property
    def ring(self) -> list[Any]:
        """Shared memory for as many stages as are in flight: of each of `streams`, and of x."""
        depth, halves = self.tuned.depth, HALVES[self.program.kind]
        rows = [plgpu.SMEM((depth, WARPGROUPS, *block), dtype) for _, block, dtype in self.streams]
        return [*rows, plgpu.SMEM((depth, self.tuned.columns, STAGE), halves, transforms=HALF)]

    def body(self, *refs: Any) -> None:
        """The kernel."""
        held = len(self.ring) + len(self.scratch[:1])
        inputs, (out, *memory) = refs[: -1 - held], refs[-1 - held :]
        ring, shared = memory[: len(self.ring)], memory[len(self.ring) :]
        row, part, column = [lax.axis_index(axis) for axis in AXES[:3]]
        tiles = [row * WARPGROUPS + i for i in range(WARPGROUPS)]
        columns, steps = pl.ds(column * self.tuned.columns, self.tuned.columns), self.shape.stages // self.tuned.parts

        def fetch(step: Any) -> None:
            slot, stage = lax.rem(step, self.tuned.depth), part * steps + step
            copies = []
            for ref, (wide, (size, *_), _), buffer in zip(inputs, self.streams, ring, strict=False):
                here = pl.ds(lax.div(stage, wide) * size, size)
                copies += [(ref.at[tile, here], buffer.at[slot, i]) for i, tile in enumerate(tiles)]
            self.verbs.fetch([*copies, (inputs[-1].at[columns, pl.ds(stage * STAGE, STAGE)], ring[-1].at[slot])])

        for early in range(self.tuned.depth - 1):
            fetch(np.int32(early))
        tables = self.tables_of(inputs, tiles, shared)
        totals = self.steps(steps, fetch, ring, tables)
        for tile, total in zip(tiles, totals, strict=True):
            self.verbs.put(total, out.at[part, pl.ds(tile * ROWS, ROWS), columns])

    def steps(self, count: int, fetch: Callable[[Any], None], ring: Sequence[Any], tables: Any) -> Any:
        """The sums of the tiles over all steps, the first of which are being fetched."""
        ahead = self.tuned.depth - 1

        def step(k: jax.Array, totals: Any) -> Any:
            self.verbs.fetched(ahead - 1)
            if ahead > 1:  # behind the last fetches there are fewer, or none, that may be under way still
                pl.when(k + ahead > count)(lambda: self.verbs.fetched(0))
            pl.when(k + ahead < count)(lambda: fetch(k + ahead))  # to where step k - 1 has read
            slot = lax.rem(k, self.tuned.depth)
            return self.sums(totals, tables, [buffer.at[slot] for buffer in ring])

        return lax.fori_loop(0, count, step, [self.verbs.zeros((ROWS, self.tuned.columns))] * WARPGROUPS)

    def tables_of(self, inputs: Sequence[Any], tiles: Sequence[jax.Array], shared: Sequence[Any]) -> list[Any]:
        """For each tile its table in shared memory, or None, and those in registers that serve whole rows."""
        _, parameters, _ = self.sorted(inputs)
        of_rows = self.program.of_rows

        def made(tile: jax.Array, table: Any = None) -> Any:
            return self.tables(parameters, tile, table, False) if of_rows else []

        if not shared:
            return [(None, made(tile)) for tile in tiles]
        if self.program.weights.books:
            shared[0][...] = parameters[-1][...]
            self.verbs.commit()
            return [(shared[0], made(tile)) for tile in tiles]
        tables = [shared[0].at[i] for i in range(WARPGROUPS)]
        return [(table, made(tile, table)) for table, tile in zip(tables, tiles, strict=True)]

    def sums(self, totals: Sequence[jax.Array], tables: Sequence[Any], stage: Sequence[Any]) -> list[jax.Array]:
        """One stage: decode, multiply."""
        words, parameters, x = self.sorted(stage)
        operand, out = self.verbs.operand(x), []
        for i, (total, (shared, made)) in enumerate(zip(totals, tables, strict=True)):
            stored = made if self.program.of_rows else self.stored(parameters, i, True)
            loaded = [self.verbs.words(ref.at[i, 0]) for ref in words]
            out.append(self.verbs.plus(total, self.verbs.decode(self.program, shared, loaded, *stored), operand))
        self.verbs.release()
        return out
