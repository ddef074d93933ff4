"""The schedule `mma_dx`: the gradient of a product's activations, by weights that are decoded to shared memory.

dx[m, k] = sum_n dy[m, n] w[n, k]. A warpgroup decodes a tile of ROWS outputs by STAGE inputs as in `mma`. But the sum
is over outputs, and those lie along a register operand's rows. So the tile is stored as halves where WGMMA reads it as
operand B, inputs side by side; dy is A, as it lies. A tile serves DY_ROWS rows of dy. Steps go over pairs of tiles, one
for each warpgroup that computes. Their sums, and those of parts of n, are added in order afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.ir.dtypes import short
from lowbit.kernels.alu import HALVES
from lowbit.kernels.arrange import Fields
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import Program
from lowbit.kernels.layout import SMS, WARPGROUPS, Layout
from lowbit.kernels.memory import DY_ROWS, SHARED, dx_beside, dx_stage
from lowbit.kernels.mma import HALF, MOST_DEEP, Schedule, Shape, Tuning, pipelined, started
from lowbit.kernels.product import operands
from lowbit.kernels.verbs import Gpu, Verbs

AXES = ("stage", "part", "column", "group")
"""Of a launch: stages of inputs, parts of n, rows of dy, and the warpgroups of a block."""
ENDING = 10
"""Steps that filling its pipeline, writing its sums and reading them again cost a block, about."""


def tuning(shape: Shape, program: Program) -> Tuning:
    """As few steps as possible of the SM that has most of them, and as many in flight as fit."""
    pairs, blocks = shape.rows // WARPGROUPS, shape.stages * shape.m // DY_ROWS

    def longest(parts: int) -> int:
        return ceil(blocks * parts / SMS) * (pairs // parts + ENDING)

    parts = min((p for p in range(1, pairs + 1) if pairs % p == 0), key=longest)
    depth = max(2, min(MOST_DEEP, (SHARED - dx_beside(program)) // dx_stage(program), pairs // parts))
    return Tuning(DY_ROWS, parts, 1 << depth.bit_length() - 1)


def mma_dx(program: Program, shape: Shape, tuned: Tuning, verbs: Verbs | None = None) -> Callable[..., jax.Array]:
    """The gradient as a function (*words, *parameters, *tables, dy) -> f32 [WARPGROUPS parts, m, k].

    Operands are those of `lowbit.kernels.mma.mma`, but for dy [m, n] in the program's halves, with m a multiple of
    DY_ROWS; k is in the program's order.
    """
    schedule = _Schedule(program, shape, tuned, verbs or Gpu())
    weights = plgpu.SMEM((WARPGROUPS, ROWS, STAGE), HALVES[program.kind], transforms=HALF)
    out = tuned.parts * WARPGROUPS, shape.m, shape.stages * STAGE
    grid = shape.stages, tuned.parts, shape.m // DY_ROWS
    return started(schedule.body, out, grid, [weights, *schedule.scratch], schedule.verbs, AXES)


class _Schedule(Schedule):
    def body(self, *refs: Any) -> None:
        """The kernel."""
        count = 2 + len(self.scratch)
        inputs, (out, decoded, *shared) = refs[:-count], refs[-count:]
        words, parameters, dy = self.sorted(inputs)
        stored, books = parameters[: len(self.leaves)], parameters[len(self.leaves) :]
        stage, part, column, group = [lax.axis_index(axis) for axis in AXES]
        steps = self.shape.rows // WARPGROUPS // self.tuned.parts
        self.fetch(books, shared, group)
        table = (shared[0] if books else shared[0].at[group]) if shared else None

        def compute(pipeline: Callable[..., Any]) -> None:
            for _, barrier in [shared] if books else []:
                plgpu.barrier_wait(barrier)
            place = pl.ds(column * DY_ROWS, DY_ROWS), pl.ds(stage * STAGE, STAGE)
            self.verbs.accumulate(out.at[part * WARPGROUPS + group, *place], lambda acc: pipeline((acc,)))

        def step(_: Any, *args: Any) -> Any:
            *fetched, (acc,) = args
            self.back(group, acc, table, decoded.at[group], *fetched)
            return (acc,)

        specs = self.specs(lambda i: (part * steps + i, stage), parameters=True)
        of_dy = (DY_ROWS, WARPGROUPS * ROWS)
        specs.append(plgpu.BlockSpec(of_dy, lambda i: (column, part * steps + i), transforms=HALF))
        pipelined(step, steps, specs, self.tuned.depth, compute)(*words, *stored, dy)

    def back(self, group: jax.Array, acc: Any, table: Any, decoded: Any, *fetched: Any) -> None:
        """One step: decode, store, multiply."""
        words, parameters, dy = self.sorted(fetched)
        if self.program.of_rows:
            own = None if self.program.weights.books else table
            stored = self.tables(parameters, group, own, True)
        else:
            stored = self.stored(parameters, group, True)
        weights = self.weights(group, table, words, stored)  # loads words last: no look-up goes before its table
        plgpu.commit_smem()  # all warps of the group have multiplied by the last tile, and looked up this one
        decoded[...] = weights
        plgpu.commit_smem()
        self.verbs.multiply_stored(acc, dy.at[:, pl.ds(group * ROWS, ROWS)], decoded)
        self.verbs.release()


def input_gradient(
    of: Layout, dy: jax.Array, fields: Fields, tuned: Tuning | None = None, verbs: Verbs | None = None, at: int = 0
) -> jax.Array:
    """dy [m, n] in float16 or bfloat16 by weights as `of` lays them out: dx [m, k], accumulated in float32, in dy's
    dtype. Further arguments as for `lowbit.kernels.product.product`."""
    m, kind = len(dy), short(dy.dtype)
    if kind not in ("f16", "bf16"):
        raise TypeError(f"dy is {dy.dtype}: the matrix unit multiplies float16 and bfloat16")
    program, shape = of.program(kind, at), Shape(DY_ROWS * ceil(m / DY_ROWS), of.tiles, of.stages)
    run = mma_dx(program, shape, tuned or tuning(shape, program), verbs)
    padded = jnp.pad(dy, ((0, shape.m - m), (0, of.tiles * ROWS - of.n)))
    dx = run(*operands(of, program, fields, at), padded).sum(0)[:m]
    logical = (
        dx.reshape(m, -1, program.decoder.consecutive // 2, 4, 2).swapaxes(2, 3).reshape(dx.shape)
    )  # as x was turned
    return logical[:, : of.k].astype(dy.dtype)
