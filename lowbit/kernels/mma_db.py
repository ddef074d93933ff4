"""The schedule `mma_db`: the gradients of tables of all rows, from dy^T x and the codes, without a dense gradient.

G = dy^T x is made tile by tile as in `lowbit.kernels.mma_dw`. Each warpgroup adds its tile, by the codes, to sums of
its own in shared memory (`lowbit.kernels.buckets`), and only these leave the block. Those of all tiles are added in
order afterwards, one band of rows after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.kernels.arrange import Fields
from lowbit.kernels.buckets import Buckets
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import by_leaf, groups_of
from lowbit.kernels.layout import WARPGROUPS, Layout
from lowbit.kernels.memory import STEP, db_beside
from lowbit.kernels.mma import started
from lowbit.kernels.mma_dw import AXES, kind_of, multiplied, padded, steps_in_flight
from lowbit.kernels.product import vectors
from lowbit.kernels.verbs import Gpu, Verbs
from lowbit.passes.scalar import Element


def table_gradients(
    of: Layout, x: jax.Array, dy: jax.Array, fields: Fields, at: int = 0, verbs: Verbs | None = None
) -> dict[str, jax.Array]:
    """The cotangents of the tables that all rows of weights share which `of` lays out, in their dtypes: of a product
    of x [m, k] whose cotangent is dy [m, n], both float16 or both bfloat16. Arguments as for
    `lowbit.kernels.mma_dw.parameter_gradients`."""
    buckets = Buckets(of.program(kind_of(x, dy), at))
    x, dy = padded(of, buckets.program, x, dy)
    bands, tiles = buckets.bands(of)
    more = bands * tiles - of.tiles
    dy = jnp.pad(dy, ((0, 0), (0, more * ROWS)))
    by_tile = [fields[name] for name in of.read(at) if name not in of.books]
    stored = [jnp.pad(a, ((0, more), *((0, 0) for _ in a.shape[1:]))) for a in by_tile]
    run = _Schedule(buckets, len(x) // STEP, tiles, of.stages, verbs or Gpu()).run

    def add(band: jax.Array, total: jax.Array) -> jax.Array:
        own = lax.dynamic_slice_in_dim(dy, band * tiles * ROWS, tiles * ROWS, 1)
        rows = [lax.dynamic_slice_in_dim(a, band * tiles, tiles) for a in stored]
        return total + lax.bitcast_convert_type(run(own, x, *rows), jnp.float32).sum((0, 1))

    zeros = jnp.zeros(buckets.table_shape[1:], jnp.float32)
    made = add(jnp.int32(0), zeros) if bands == 1 else lax.fori_loop(0, bands, add, zeros)
    sums = made.reshape(-1)[: prod(buckets.shape)].reshape(buckets.shape).swapaxes(1, 2)
    tables = {name: fields[name] for name in of.books}

    def looked_up(tables: Fields) -> jax.Array:
        """What the sums are the cotangent of."""
        return jnp.stack(vectors(buckets.decoder, tables, jnp.float32))

    (out,) = jax.vjp(looked_up, tables)[1](sums)
    return dict(out)


@dataclass(frozen=True)
class _Schedule:
    buckets: Buckets
    steps: int
    tiles: int
    stages: int
    verbs: Verbs

    @cached_property
    def run(self) -> Callable[..., jax.Array]:
        """(dy, x, words, *parameters) -> the sums of each tile, i32 [tile, stage, rows, TMA_ROW] whose bits are those
        of float32."""
        shape = self.buckets.table_shape
        out, scratch = (self.tiles, self.stages, *shape[1:]), [plgpu.SMEM((WARPGROUPS, *shape), jnp.int32)]
        grid = self.tiles // WARPGROUPS, self.stages
        return started(self.body, out, grid, scratch, self.verbs, AXES, jnp.int32)

    def body(self, dy: Any, x: Any, words: Any, *refs: Any) -> None:
        """The kernel."""
        *parameters, out, table = refs
        row, stage, group = at = [lax.axis_index(axis) for axis in AXES]
        verbs, tile = self.verbs, row * WARPGROUPS + group

        def summed(total: jax.Array) -> None:
            scales = self.scales(parameters, tile, stage)
            verbs.bucket(self.buckets, table.at[group], total, verbs.words(words.at[tile, stage], False), *scales)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(table.at[group, 0], out.at[tile, stage])
            plgpu.wait_smem_to_gmem(0)

        depth = steps_in_flight(db_beside(self.buckets.words), self.steps)
        multiplied(verbs, self.steps, depth, at, summed)(dy, x)

    def scales(self, parameters: list[Any], tile: jax.Array, stage: jax.Array) -> list[jax.Array]:
        leaves = by_leaf(self.buckets.program.weights)
        refs = dict(zip(leaves, parameters, strict=True))

        def of_stage(e: Element, group: int) -> jax.Array:
            many = groups_of(e)
            first = stage * many if many > 1 else lax.div(stage, self.stages if e.span == 0 else e.span // STAGE)
            where = tile, first + group, leaves[e.leaf.name].index(e)
            return self.verbs.rows(refs[e.leaf.name].at[where], False)

        return [of_stage(e, group) for e, group in self.buckets.stored]
