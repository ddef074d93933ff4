"""The schedule `mma_dw`: the gradients of parameters, from dy^T x and the codes, without a dense gradient in memory.

G[n, k] = sum_m dy[m, n] x[m, k] as tiles of ROWS outputs by STAGE inputs for each warpgroup that computes, in its
registers; one more fetches dy and x by TMA. Then the tile's codes say which of its entries are summed
(`lowbit.kernels.by_code`), in an order that never changes, and only these sums leave the block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.ir.dtypes import is_float, short
from lowbit.kernels.alu import HALVES, Half
from lowbit.kernels.arrange import Fields
from lowbit.kernels.by_code import CodeSums
from lowbit.kernels.computed import Books
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import Program
from lowbit.kernels.layout import WARPGROUPS, Layout
from lowbit.kernels.memory import SHARED, STEP, dw_stage, looked_up
from lowbit.kernels.mma import HALF, fetch_books, pipelined, started
from lowbit.kernels.product import in_order, shared_tables
from lowbit.kernels.verbs import Gpu, Verbs
from lowbit.passes.scalar import Element

AXES = ("row", "stage", "group")
"""Of a launch: tiles of rows, stages of inputs, and the warpgroups of a block."""


def parameter_gradients(
    of: Layout, x: jax.Array, dy: jax.Array, fields: Fields, at: int = 0, verbs: Verbs | None = None
) -> dict[str, jax.Array]:
    """The cotangents of the float parameters of weights that `of` lays out, in their layout and dtypes: of a product of
    x [m, k] whose cotangent is dy [m, n], both float16 or both bfloat16.

    Args:
      at: which of its widths the weights were read at.
      verbs: what it runs on, the GPU if None.
    """
    sums = CodeSums(of.program(kind_of(x, dy), at))
    x, dy = padded(of, sums.program, x, dy)
    words = [fields[name] for name in of.words_read(at)]
    decoder = sums.program.decoder
    tables = [shared_tables(sums.program, decoder, fields)] if isinstance(decoder, Books) else []
    made = _Schedule(sums, len(x) // STEP, of.tiles, of.stages, verbs or Gpu()).run(dy, x, *words, *tables)
    floats = {name: fields[name] for name, own in of.leaves.items() if is_float(own[0].leaf.dtype)}

    def terms(floats: Fields) -> jax.Array:
        """What the sums are the cotangent of."""
        return jnp.stack(sums.terms(by_span(of, sums, {**fields, **floats})), 2)

    (out,) = jax.vjp(terms, floats)[1](made)
    return dict(out)


def kind_of(x: jax.Array, dy: jax.Array) -> Half:
    """Raises TypeError where they are not two of the same halves."""
    kind = short(x.dtype)
    if kind not in ("f16", "bf16") or dy.dtype != x.dtype:
        raise TypeError(f"x is {x.dtype} and dy {dy.dtype}: the matrix unit multiplies two float16 or two bfloat16")
    return kind


def padded(of: Layout, program: Program, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both with whole steps of rows and whole tiles, x in the program's order."""
    more = STEP * ceil(len(x) / STEP) - len(x)
    x = in_order(jnp.pad(x, ((0, more), (0, of.stages * STAGE - of.k))), program.decoder.consecutive)
    return x, jnp.pad(dy, ((0, more), (0, of.tiles * ROWS - of.n)))


def by_span(of: Layout, sums: CodeSums, fields: Fields) -> dict[Element, jax.Array]:
    """The parameters in float32, for every span of inputs: [tile, span, ROWS] each."""
    count = of.stages * sums.spans
    out = {}
    for e in sums.program.weights.parameters:
        values = fields[e.leaf.name][:, :, of.leaves[e.leaf.name].index(e)].astype(jnp.float32)
        out[e] = jnp.repeat(values, e.span // sums.span if e.span else count, axis=1)[:, :count]
    return out


@dataclass(frozen=True)
class _Schedule:
    sums: CodeSums
    steps: int
    tiles: int
    stages: int
    verbs: Verbs

    @cached_property
    def run(self) -> Callable[..., jax.Array]:
        """(dy, x, *words, *tables) -> the sums, f32 [tile, span, subset, ROWS]."""
        of_stage, program = (self.sums.spans, len(self.sums.subsets), ROWS), self.sums.program
        scratch: list[Any] = [plgpu.SMEM((WARPGROUPS, *of_stage), jnp.float32)]
        if self.sums.unscaled:
            scratch += [plgpu.SMEM(program.table_shape, HALVES[program.kind]), plgpu.Barrier()]
        out = self.tiles, self.stages * of_stage[0], *of_stage[1:]
        return started(self.body, out, (self.tiles // WARPGROUPS, self.stages), scratch, self.verbs, AXES)

    @property
    def depth(self) -> int:
        """Two fit beside the sums of any table, or beside books."""
        beside = 4 * WARPGROUPS * self.sums.spans * len(self.sums.subsets) * ROWS
        beside += looked_up(self.sums.program) if self.sums.unscaled else 0
        return steps_in_flight(beside, self.steps)

    def body(self, dy: Any, x: Any, *refs: Any) -> None:
        """The kernel."""
        count = len(self.sums.program.words)
        words, rest = refs[:count], refs[count:]
        books, (out, staging, *shared) = (rest[:1], rest[1:]) if self.sums.unscaled else ((), rest)
        row, stage, group = (lax.axis_index(axis) for axis in AXES)
        verbs, sums = self.verbs, self.sums
        tile = row * WARPGROUPS + group

        fetch_books(books, shared, group)

        def summed(total: jax.Array) -> None:
            loaded = [verbs.words(ref.at[tile, stage], False) for ref in words]
            if sums.unscaled:
                plgpu.barrier_wait(shared[1])
                total *= verbs.decode(sums.unscaled, shared[0], loaded).astype(jnp.float32)
                loaded = []
            for at in range(sums.spans):
                for i, value in enumerate(verbs.by_code(sums, at, total, loaded)):
                    staging[group, at, i] = value
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staging.at[group], out.at[tile, pl.ds(stage * sums.spans, sums.spans)])
            plgpu.wait_smem_to_gmem(0)

        multiplied(verbs, self.steps, self.depth, (row, stage, group), summed)(dy, x)


def steps_in_flight(beside: int, steps: int) -> int:
    """A power of two: four if they fit beside so many bytes, or two."""
    return 4 if min((SHARED - beside) // dw_stage(), steps) >= 4 else 2


def multiplied(
    verbs: Verbs, steps: int, depth: int, at: Sequence[jax.Array], then: Callable[[jax.Array], None]
) -> Callable[..., None]:
    """The tile of G at a place along AXES, from (dy, x): what computes goes on with it in `then`."""
    row, stage, group = at

    def step(_: Any, dy: Any, x: Any, total: Any) -> Any:
        total = verbs.add_outer(total, dy.at[:, pl.ds(group * ROWS, ROWS)], x)
        verbs.release()
        return total

    specs = [
        plgpu.BlockSpec((STEP, WARPGROUPS * ROWS), lambda m: (m, row), transforms=HALF),
        plgpu.BlockSpec((STEP, STAGE), lambda m: (m, stage), transforms=HALF),
    ]
    return pipelined(step, steps, specs, depth, lambda run: then(verbs.accumulated((ROWS, STAGE), run)))
