"""The schedule `sums`: what x makes of all that codes can say is summed first, and looked up for the weights.

LUT-GEMM (ICLR 2024) and CodeGEMM (NeurIPS 2025): a block keeps the partial sums of one chunk of inputs in shared
memory, and serves many rows of the weight from them. Each lane adds what its codes look up in float32, and scales it
group by group. Chunks of k are summed in order afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.kernels.decoders import ROWS
from lowbit.kernels.lanes import LANES, by_leaf
from lowbit.kernels.layout import WARPGROUPS, Layout
from lowbit.kernels.mma import AXES, pipelined, started
from lowbit.kernels.partial import Sums
from lowbit.kernels.verbs import Gpu, Verbs
from lowbit.passes.scalar import Element


def sums(of: Layout, how: Sums, bands: int, verbs: Verbs | None = None) -> Callable[..., jax.Array]:
    """The product as a function (words, *scales, *books, x) -> f32 [chunks, tiles, columns, ROWS], of so many bands of
    rows.

    words and scales are those of `lowbit.kernels.layout`; books: where there are some, f32 [book, entry, vector]; x:
    f32 [columns, k], k that of whole stages, the inputs of a vector next to each other.
    """
    schedule = _Schedule(of, how, bands, verbs or Gpu())
    chunks, pairs = of.stages * how.chunks, of.tiles // WARPGROUPS
    out = chunks, WARPGROUPS, pairs, how.columns, ROWS
    run = started(schedule.body, out, (bands, chunks, 1), schedule.scratch, schedule.verbs)

    def product(*operands: jax.Array) -> jax.Array:
        *stored, x = operands
        by_chunk = x.reshape(how.columns, chunks, WARPGROUPS, -1).transpose(1, 2, 0, 3)
        return run(*stored, by_chunk).swapaxes(1, 2).reshape(chunks, of.tiles, how.columns, ROWS)

    return product


@dataclass(frozen=True)
class _Schedule:
    of: Layout
    how: Sums
    bands: int
    verbs: Verbs

    @property
    def steps(self) -> int:
        return self.of.tiles // WARPGROUPS // self.bands

    @property
    def leaves(self) -> dict[str, list[Element]]:
        return by_leaf(self.how.program.weights)

    @property
    def scratch(self) -> list[Any]:
        """The tables; x; results on their way out; barriers for what is fetched, and for the tables; codebooks."""
        how, f32 = self.how, jnp.float32
        return [
            plgpu.SMEM((WARPGROUPS, how.spans // WARPGROUPS, *how.shape[1:]), f32),
            plgpu.SMEM((WARPGROUPS, how.columns, how.inputs // WARPGROUPS), f32),
            plgpu.SMEM((WARPGROUPS, self.steps, how.columns, ROWS), f32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *([plgpu.SMEM(how.source.vectors, f32)] if how.source.vectors else []),
        ]

    def body(self, *refs: Any) -> None:
        """The kernel."""
        how, verbs, count = self.how, self.verbs, len(self.scratch)
        *inputs, out = refs[:-count]
        table, x, staging, fetched, filled, *books = refs[-count:]
        x_stored, books_stored = inputs.pop(), inputs[1 + len(self.leaves) :]  # behind words and scales
        band, chunk, _column, group = (lax.axis_index(axis) for axis in AXES)

        @pl.when(group == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(x_stored.at[chunk], x, fetched.at[0])
            for all_of, here in zip(books_stored, books, strict=True):
                plgpu.copy_gmem_to_smem(all_of, here, fetched.at[1])

        def compute(pipeline: Callable[..., Any]) -> None:
            for i in range(1 + len(books)):
                plgpu.barrier_wait(fetched.at[i])
            verbs.fill(how, table.at[group], x.at[group], *books)
            plgpu.commit_smem()
            plgpu.barrier_arrive(filled)
            plgpu.barrier_wait(filled)
            pipeline(jnp.int32(0))
            plgpu.commit_smem()
            steps = pl.ds(band * self.steps, self.steps)
            plgpu.copy_smem_to_gmem(staging.at[group], out.at[chunk, group, steps])
            plgpu.wait_smem_to_gmem(0)

        def step(_: Any, words: Any, *args: Any) -> Any:
            *leaves, done = args
            refs = dict(zip(self.leaves, leaves, strict=True))
            places = [(refs[e.leaf.name], (group, g, self.leaves[e.leaf.name].index(e))) for e, g in how.stored]
            scales = [verbs.rows(ref.at[place], True) for ref, place in places]
            for m, total in enumerate(verbs.total(how, table, verbs.words(words.at[group, 0]), *scales)):
                staging[group, done, m] = total
            verbs.release()
            return done + 1

        specs = self.specs(band * self.steps, chunk)
        pipelined(step, self.steps, specs, how.depth(self.steps), compute)(*inputs[: len(specs)])

    def specs(self, first: jax.Array, chunk: jax.Array) -> list[plgpu.BlockSpec]:
        """What a step fetches: words, and scales."""
        how = self.how
        stage, part = lax.div(chunk, how.chunks), lax.rem(chunk, how.chunks)
        block = WARPGROUPS, 1, how.source.words, LANES
        words = plgpu.BlockSpec(block, lambda i: (first + i, stage, part, 0))
        return [words, *(self.scale_spec(elements, first, chunk) for elements in self.leaves.values())]

    def scale_spec(self, elements: list[Element], first: jax.Array, chunk: jax.Array) -> plgpu.BlockSpec:
        e = elements[0]
        block = WARPGROUPS, self.how.groups(e), len(elements), ROWS
        # Chunks that share a group.
        wide = max(1, e.span // self.how.inputs) if e.span else self.of.stages * self.how.chunks
        return plgpu.BlockSpec(block, lambda i: (first + i, lax.div(chunk, wide), 0, 0))
