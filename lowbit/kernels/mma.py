"""The schedule `mma`: weights are decoded in registers as WGMMA's operand A, activations are B.

out[m, n] = sum_k x[m, k] w[n, k] as tiles of out^T: ROWS outputs by up to COLUMNS_A_BLOCK rows of x for each warpgroup
that computes. One more warpgroup fetches words, parameters and x by TMA. Parts of k (split-k) are summed in order
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.kernels.alu import HALVES
from lowbit.kernels.computed import Bytes
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.lanes import LANES, Program, by_leaf, groups_of
from lowbit.kernels.layout import SMS, WARPGROUPS
from lowbit.kernels.memory import SHARED, looked_up, results, stage_bytes
from lowbit.kernels.verbs import Gpu, Verbs, table_size
from lowbit.passes.scalar import Element

AXES = ("row", "part", "column", "group")
"""Of a launch: tiles of rows, parts of k, columns, and the warpgroups of a block."""
COLUMNS_A_BLOCK = 64
"""Rows of x that a block multiplies at most."""
FILLING = 2
"""Steps that filling its pipeline costs a block, about."""
MOST_DEEP = 8
FETCHING = 56
"""Registers of a lane that fetches: with 40 jax 0.12's pipeline spills some of them."""
FEW = 16
"""Entries of a table that are fetched at a time."""
HALF, BYTES = ((plgpu.TilingTransform((8, count)), plgpu.SwizzleTransform(128)) for count in (64, 128))
"""How buffers of halves and of bytes lie in shared memory, for WGMMA and for lanes to read without bank conflicts."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a launch, after padding.

    Attributes:
      m: rows of x, a multiple of 8.
      rows: tiles of ROWS outputs, a multiple of WARPGROUPS.
      stages: steps of STAGE inputs.
    """

    m: int
    rows: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """Parameters of the schedule.

    Attributes:
      columns: rows of x a block, a multiple of 8, at most COLUMNS_A_BLOCK.
      parts: of k.
      depth: stages in flight.
    """

    columns: int
    parts: int
    depth: int


def deepest(shape: Shape, stage: Callable[[int], int], beside: int = 0) -> Tuning:
    """As few steps as possible of the SM that has most of them, and as many stages in flight as fit: so many columns
    that two do.

    Args:
      stage: bytes of a stage's buffers for so many columns.
      beside: bytes of shared memory that are taken otherwise.
    """

    def fit(columns: int) -> int:
        return (SHARED - results(columns) - beside) // stage(columns)

    most = min(shape.m, COLUMNS_A_BLOCK)
    columns = next(c for c in range(most, 0, -8) if shape.m % c == 0 and fit(c) >= 2)
    parts = parts_of_k(shape, columns, SMS)
    depth = max(2, min(MOST_DEEP, fit(columns), shape.stages // parts))
    return Tuning(columns, parts, 1 << depth.bit_length() - 1)  # a power of two: the loop divides by it


def parts_of_k(shape: Shape, columns: int, sms: int) -> int:
    """With the fewest steps of the SM that has most of them."""
    blocks = shape.rows // WARPGROUPS * ceil(shape.m / columns)

    def longest(parts: int) -> int:
        return ceil(blocks * parts / sms) * (shape.stages // parts + FILLING)

    return min((p for p in range(1, shape.stages + 1) if shape.stages % p == 0), key=longest)


def tuning(shape: Shape, program: Program) -> Tuning:
    """The schedule's parameters for a program."""
    return deepest(shape, partial(stage_bytes, program), looked_up(program))


def launch(
    body: Callable[..., None], shape: Shape, tuned: Tuning, verbs: Verbs, scratch: Sequence[Any] = ()
) -> Callable[..., jax.Array]:
    """A kernel `body(*inputs, out, staging, *scratch)` with a block for WARPGROUPS tiles of rows, a part of k and
    some columns: it gives f32 [parts, n, m]. `staging` is shared memory for `send`."""
    staging = plgpu.SMEM((WARPGROUPS, ROWS, tuned.columns), jnp.float32)
    grid = shape.rows // WARPGROUPS, tuned.parts, ceil(shape.m / tuned.columns)
    return started(body, (tuned.parts, shape.rows * ROWS, shape.m), grid, [staging, *scratch], verbs)


def started(
    body: Callable[..., None], out: tuple[int, ...], grid: tuple[int, ...], scratch: Sequence[Any], verbs: Verbs,
    axes: tuple[str, ...] = AXES, dtype: Any = jnp.float32,
) -> Callable[..., jax.Array]:  # fmt: skip
    """A kernel of blocks in a grid along axes, the last of which is that of warpgroups: it gives one array."""
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(out, dtype),
        scratch_types=scratch,
        grid=grid,
        grid_names=axes[:-1],
        num_threads=WARPGROUPS + 1,
        thread_name=axes[-1],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=verbs.interpret,
    )


def pipelined(
    step: Callable[..., Any], steps: int, specs: Sequence[Any], depth: int, compute: Callable[..., None]
) -> Callable[..., None]:
    """The steps of a block, their operands fetched by the last warpgroup while the others run `compute`."""
    run: Callable[..., None] = plgpu.emit_pipeline_warp_specialized(
        step, grid=(steps,), in_specs=specs, wg_axis=AXES[3], num_compute_wgs=WARPGROUPS, memory_registers=FETCHING,
        max_concurrent_steps=depth, compute_context=compute,
    )  # fmt: skip
    return run


def fetch_books(books: Sequence[Any], shared: Sequence[Any], group: jax.Array) -> None:
    """Starts the copy of the tables of all rows to where `shared` has them, with the barrier behind them."""
    for book in books:

        @pl.when(group == 0)
        def _(book: Any = book) -> None:
            plgpu.copy_gmem_to_smem(book, *shared)


def send(staging: Any, out: Any, tuned: Tuning, at: Sequence[jax.Array]) -> None:
    """A warpgroup's tile of the result, which is in `staging`, to its place: `at` along AXES."""
    row, part, column, group = at
    plgpu.commit_smem()
    n, m = (row * WARPGROUPS + group) * ROWS, column * tuned.columns
    plgpu.copy_smem_to_gmem(staging.at[group], out.at[part, pl.ds(n, ROWS), pl.ds(m, tuned.columns)])
    plgpu.wait_smem_to_gmem(0)


def mma(program: Program, shape: Shape, tuned: Tuning, verbs: Verbs | None = None) -> Callable[..., jax.Array]:
    """The product as a function (*words, *parameters, *tables, x) -> f32 [parts, n, m].

    words: u32 [rows, stages, words, LANES], as many as the program has; parameters: one array per stored leaf, [rows,
    groups, elements, ROWS], all as `lowbit.kernels.layout` has them; tables: where all rows share some, one array of
    `program.table_shape`; x: [m, k], inputs in the program's order. Tables and x are of the program's halves; m and k
    are those of `shape`.
    """
    schedule = Schedule(program, shape, tuned, verbs or Gpu())
    return launch(schedule.body, shape, tuned, schedule.verbs, schedule.scratch)


@dataclass(frozen=True)
class Schedule:
    """What a kernel that decodes stages is made of."""

    program: Program
    shape: Shape
    tuned: Tuning
    verbs: Verbs

    @property
    def scratch(self) -> list[Any]:
        """Shared memory for tables, and a barrier for those of all rows."""
        if not self.program.decoder.shared:
            return []
        shape, half = self.program.table_shape, HALVES[self.program.kind]
        if self.program.weights.books:
            return [plgpu.SMEM(shape, half), plgpu.Barrier()]
        return [plgpu.SMEM((WARPGROUPS, *shape), half)]

    @property
    def leaves(self) -> dict[str, list[Element]]:
        """Parameters by the array that holds them."""
        return by_leaf(self.program.weights)

    def body(self, *refs: Any) -> None:
        """The kernel."""
        count = 2 + len(self.scratch)
        inputs, (out, staging, *shared) = refs[:-count], refs[-count:]
        words, parameters, x = self.sorted(inputs)
        books = parameters[len(self.leaves) :]
        row, part, column, group = at = [lax.axis_index(axis) for axis in AXES]
        tuned, verbs = self.tuned, self.verbs
        steps = self.shape.stages // tuned.parts

        fetch_books(books, shared, group)
        table = (shared[0] if books else shared[0].at[group]) if shared else None

        def compute(pipeline: Callable[..., Any]) -> None:
            for _, barrier in [shared] if books else []:
                plgpu.barrier_wait(barrier)
            tile, own = row * WARPGROUPS + group, None if books else table
            tables = self.tables(parameters, tile, own, False) if self.program.of_rows else []  # made once, and kept
            verbs.accumulate(staging.at[group], lambda acc: pipeline((acc, *tables)))
            send(staging, out, tuned, at)

        def step(_: Any, *args: Any) -> Any:
            *stage, (acc, *tables) = args
            self.step(group, acc, table, tables, *stage)
            return acc, *tables

        staged = [] if self.program.of_rows else parameters[: len(self.leaves)]
        specs = self.specs(lambda k: (row, part * steps + k), bool(staged))
        specs.append(plgpu.BlockSpec((tuned.columns, STAGE), lambda k: (column, part * steps + k), transforms=HALF))
        pipelined(step, steps, specs, tuned.depth, compute)(*words, *staged, x)

    def sorted(self, refs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Any]:
        """Words; parameters, and tables of all rows; x."""
        count = len(self.program.words)
        return refs[:count], refs[count:-1], refs[-1]

    def stored(self, parameters: Sequence[Any], at: jax.Array | int, staged: bool) -> list[jax.Array]:
        """The program's inputs from its leaves, for one tile of rows: from a stage's buffers, or from where all are."""
        leaves = self.leaves
        refs = dict(zip(leaves, parameters, strict=False))
        places = [(refs[e.leaf.name], (at, g, leaves[e.leaf.name].index(e))) for e, g in self.program.inputs]
        return [self.verbs.rows(ref.at[place], staged) for ref, place in places]

    def tables(self, parameters: Sequence[Any], tile: jax.Array, shared: Any, staged: bool) -> Sequence[jax.Array]:
        """The tables of whole rows, in registers and, for `shared`, there."""
        kept = bool(table_size(self.program))
        stored = self.stored(parameters, tile, staged) if kept else []  # first: it is not loaded twice
        if shared is not None:
            self.fill(shared, parameters[0], tile, staged)
        return self.verbs.tables(self.program, *stored) if kept else []

    def fill(self, shared: Any, stored: Any, tile: jax.Array, staged: bool) -> None:
        """Copies a table to shared memory, in the program's halves."""

        @pl.loop(0, len(self.program.weights.entries) // FEW)
        def _(part: jax.Array) -> None:
            entries = [part * FEW + i for i in range(FEW)]
            values = [self.verbs.rows(stored.at[tile, 0, e], staged) for e in entries]  # all under way at once
            for e, value in zip(entries, values, strict=True):
                shared[e, pl.ds(0, ROWS)] = value.astype(shared.dtype)

        self.verbs.commit()

    def step(self, group: jax.Array, acc: Any, table: Any, tables: Sequence[jax.Array], *stage: Any) -> None:
        """One stage: decode, multiply."""
        words, parameters, x = self.sorted(stage)
        stored = tables if self.program.of_rows else self.stored(parameters, group, True)
        self.verbs.multiply(acc, self.weights(group, table, words, stored), x)
        self.verbs.release()

    def weights(self, group: jax.Array, table: Any, words: Sequence[Any], stored: Sequence[jax.Array]) -> jax.Array:
        """The weights of a stage, for a warpgroup."""
        loaded = [self.verbs.words(ref.at[group] if ref.dtype == jnp.uint8 else ref.at[group, 0]) for ref in words]
        return self.verbs.decode(self.program, table, loaded, *stored)

    def specs(self, at: Callable[[Any], tuple[Any, Any]], parameters: bool) -> list[plgpu.BlockSpec]:
        """What a step fetches of the weights and, perhaps, of their parameters: `at` gives its rows and stage."""
        if isinstance(self.program.decoder, Bytes):
            rows = plgpu.BlockSpec((WARPGROUPS, ROWS, STAGE), lambda k: (at(k)[0], 0, at(k)[1]), transforms=BYTES)
            words = [rows] * len(self.program.words)
        else:
            words = [
                plgpu.BlockSpec((WARPGROUPS, 1, count, LANES), lambda k: (*at(k), 0, 0)) for count in self.program.words
            ]
        staged = self.leaves.values() if parameters else []
        return [*words, *(self.parameter_spec(e, at) for e in staged)]

    def parameter_spec(self, elements: Sequence[Element], at: Callable[[Any], tuple[Any, Any]]) -> plgpu.BlockSpec:
        block = (WARPGROUPS, groups_of(elements[0]), len(elements), ROWS)
        wide = self.wide(elements[0])
        return plgpu.BlockSpec(block, lambda k: (at(k)[0], lax.div(at(k)[1], wide), 0, 0))

    def wide(self, e: Element) -> int:
        """Stages that share a group. The pipeline wants every index to depend on the step, also that of a whole row."""
        return max(1, e.span // STAGE) if e.span else self.shape.stages
