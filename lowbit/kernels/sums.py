"""The schedule `table`: what x makes of every vector of the codebooks is summed first, and looked up for the weights.

CodeGEMM (NeurIPS 2025): a block keeps the partial sums of one chunk of inputs in shared memory, and serves many rows
of the weight from it. Each lane adds what its codes look up in float32, and scales it group by group. Chunks of k are
summed in order afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.kernels.decoders import ROWS
from lowbit.kernels.lanes import LANES
from lowbit.kernels.layout import WARPGROUPS
from lowbit.kernels.mma import SMS, Shape
from lowbit.kernels.sums import Sums
from lowbit.kernels.verbs import Gpu, Verbs

BUILDING = 8
"""Steps that filling its table and its pipeline costs a block, about."""
DEPTH = 4
"""Stages in flight."""
STEPS = 64
"""Of a block at most, for one row of x: their results wait in shared memory."""


def bands(shape: Shape, sums: Sums) -> int:
    """Into how many bands of rows blocks divide a weight: as few steps as possible of the SM that has most of them."""
    pairs, chunks = shape.rows // WARPGROUPS, shape.stages * sums.chunks * shape.m // sums.columns

    def longest(count: int) -> int:
        return ceil(count * chunks / SMS) * (pairs // count + BUILDING)

    return min((b for b in range(1, pairs + 1) if pairs % b == 0 and pairs // b * sums.columns <= STEPS), key=longest)


def table(sums: Sums, shape: Shape, count: int, verbs: Verbs | None = None) -> Callable[..., jax.Array]:
    """The product as a function (words, *scales, books, x) -> f32 [chunks, tiles, m, ROWS], of `count` bands.

    words and scales are those of `lowbit.kernels.layout`; books: f32 [book, entry, vector]; x: f32 [m, k], with m
    and k those of `shape`, and m a multiple of `sums.columns`.
    """
    return _launch(_Schedule(sums, shape, count, verbs or Gpu()))


@dataclass(frozen=True)
class _Schedule:
    sums: Sums
    shape: Shape
    bands: int
    verbs: Verbs

    @property
    def steps(self) -> int:
        return self.shape.rows // WARPGROUPS // self.bands

    @property
    def scratch(self) -> list[Any]:
        """The table; what it is made of; results on their way out; barriers for what is fetched, and for the table."""
        sums, f32 = self.sums, jnp.float32
        return [
            plgpu.SMEM((WARPGROUPS, sums.spans // WARPGROUPS, *sums.shape[1:]), f32),
            plgpu.SMEM(sums.vectors, f32),
            plgpu.SMEM((WARPGROUPS, sums.columns, sums.inputs // WARPGROUPS), f32),
            plgpu.SMEM((WARPGROUPS, self.steps, sums.columns, ROWS), f32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ]

    def body(self, *refs: Any) -> None:
        """The kernel."""
        *inputs, books_stored, x_stored, out, table, books, x, staging, fetched, filled = refs
        sums, verbs = self.sums, self.verbs
        band, chunk, column = (lax.axis_index(name) for name in ("band", "chunk", "column"))
        group = lax.axis_index("group")

        @pl.when(group == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(books_stored, books, fetched.at[0])
            plgpu.copy_gmem_to_smem(x_stored.at[column, chunk], x, fetched.at[1])

        def compute(pipeline: Callable[..., Any]) -> None:
            plgpu.barrier_wait(fetched.at[0])
            plgpu.barrier_wait(fetched.at[1])
            verbs.fill(sums, table.at[group], x.at[group], books)
            plgpu.commit_smem()
            plgpu.barrier_arrive(filled)
            plgpu.barrier_wait(filled)
            pipeline(jnp.int32(0))
            plgpu.commit_smem()
            steps = pl.ds(band * self.steps, self.steps)
            plgpu.copy_smem_to_gmem(staging.at[group], out.at[chunk, column, group, steps])
            plgpu.wait_smem_to_gmem(0)

        def step(_: Any, *args: Any) -> Any:
            words, *scales, done = args
            stored = [verbs.rows(ref.at[group, g, 0], True) for ref in scales for g in range(sums.groups)]
            for m, total in enumerate(verbs.total(sums, table, verbs.words(words.at[group, 0]), *stored)):
                staging[group, done, m] = total
            verbs.release()
            return done + 1

        plgpu.emit_pipeline_warp_specialized(
            step, grid=(self.steps,), in_specs=self.specs(band, chunk), wg_axis="group", num_compute_wgs=WARPGROUPS,
            memory_registers=40, max_concurrent_steps=min(DEPTH, self.steps), compute_context=compute,
        )(*inputs)  # fmt: skip

    def specs(self, band: jax.Array, chunk: jax.Array) -> list[plgpu.BlockSpec]:
        """What a step fetches: words, and scales where there are some."""
        sums, first = self.sums, band * self.steps
        stage, part = lax.div(chunk, sums.chunks), lax.rem(chunk, sums.chunks)
        words = plgpu.BlockSpec((WARPGROUPS, 1, sums.words, LANES), lambda i: (first + i, stage, part, 0))
        if (scale := sums.books.scale) is None:
            return [words]
        group = lax.div(chunk, max(1, scale.span // sums.inputs) if scale.span else self.shape.stages * sums.chunks)
        return [words, plgpu.BlockSpec((WARPGROUPS, sums.groups, 1, ROWS), lambda i: (first + i, group, 0, 0))]


def _launch(schedule: _Schedule) -> Callable[..., jax.Array]:
    sums, shape = schedule.sums, schedule.shape
    grid = schedule.bands, shape.stages * sums.chunks, shape.m // sums.columns
    chunks, columns = grid[1:]
    out = (chunks, columns, WARPGROUPS, shape.rows // WARPGROUPS, sums.columns, ROWS)
    run = plgpu.kernel(
        schedule.body,
        out_type=jax.ShapeDtypeStruct(out, jnp.float32),
        scratch_types=schedule.scratch,
        grid=grid,
        grid_names=("band", "chunk", "column"),
        num_threads=WARPGROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=schedule.verbs.interpret,
    )

    def product(*operands: jax.Array) -> jax.Array:
        *stored, x = operands
        inputs = sums.inputs // WARPGROUPS
        by_chunk = x.reshape(columns, sums.columns, chunks, WARPGROUPS, inputs).transpose(0, 2, 3, 1, 4)
        made: jax.Array = run(*stored, by_chunk)
        return made.transpose(0, 3, 2, 1, 4, 5).reshape(chunks, shape.rows, shape.m, ROWS)

    return product
