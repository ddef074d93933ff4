"""What a schedule says in two back ends: the verbs that Pallas' interpreter lacks, for the GPU and for its twin.

The pipeline, index maps, barriers and everything else of a schedule is shared, so interpreting the twin checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.compat import load, transposed
from lowbit.ir.dtypes import numpy_dtype
from lowbit.kernels import int8_lanes
from lowbit.kernels.alu import HALVES
from lowbit.kernels.buckets import Buckets
from lowbit.kernels.buckets import in_numpy as buckets_in_numpy
from lowbit.kernels.by_code import CodeSums
from lowbit.kernels.by_code import in_numpy as sums_in_numpy
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.int8_lanes import Integers
from lowbit.kernels.lane_gpu import (
    BYTES,
    ROW,
    WORDS,
    in_registers,
    integers_in_registers,
    sums_in_registers,
    tables_in_registers,
)
from lowbit.kernels.lanes import Program, in_numpy, tables_in_numpy
from lowbit.kernels.partial import Sums, filled_in_numpy, total_in_numpy
from lowbit.kernels.partial_gpu import bucketed_in_shared, filled_in_shared, total_in_registers

Ref = Any
IntegersOfStage = tuple[Sequence[jax.Array], Sequence[jax.Array]]


def table_size(program: Program) -> int:
    """Registers of a row's table."""
    zeros = (np.zeros(ROWS, numpy_dtype(e.leaf.dtype)) for e, _ in program.inputs)
    return len(tables_in_numpy(program, *zeros))


class Verbs(Protocol):
    interpret: Any

    def accumulate(self, out: Ref, run: Callable[[Ref], Any]) -> None:
        """out = what `run` adds to an accumulator of its shape, which is zero at first."""

    def words(self, ref: Ref, staged: bool = True) -> jax.Array:
        """Those of a stage, u32 [word, LANES] or bytes [ROWS, STAGE]: from its buffers or where they are stored."""

    def rows(self, ref: Ref, staged: bool) -> jax.Array:
        """A value for each of the ROWS, from a stage's buffers or from where it is stored."""

    def tables(self, program: Program, *stored: jax.Array) -> Sequence[jax.Array]:
        """What a program whose tables are those of whole rows takes in place of `stored`."""

    def decode(self, program: Program, table: Ref, words: Sequence[jax.Array], *stored: jax.Array) -> jax.Array:
        """`table`: the shared one, [entries, ROWS and padding], or None."""

    def integers(self, program: Integers, words: Sequence[jax.Array], *stored: jax.Array) -> IntegersOfStage:
        """The integers [ROWS, span] of each group of a stage, and the factors [ROWS] of each, if it has any."""

    def multiply(self, acc: Ref, weights: jax.Array, x: Ref) -> None:
        """acc += weights [ROWS, k] @ x [columns, k]^T, finished when it returns."""

    def multiply_stored(self, acc: Ref, dy: Ref, weights: Ref) -> None:
        """acc += dy [m, n] @ weights [n, k] of two buffers, finished when it returns."""

    def zeros(self, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        """A sum in registers that products are added to."""

    def product(self, weights: Ref, x: Ref) -> jax.Array:
        """weights [ROWS, k] @ x [columns, k]^T of two buffers, in float32."""

    def commit(self) -> None:
        """Say that a table in shared memory was written."""

    def accumulated(self, shape: tuple[int, int], run: Callable[[Any], Any], dtype: Any = jnp.float32) -> jax.Array:
        """What `run` makes of a sum that is zero at first, and that only products are added to."""

    def add_outer(self, total: Any, dy: Ref, x: Ref) -> Any:
        """total + dy [m, ROWS]^T @ x [m, STAGE]."""

    def by_code(self, sums: CodeSums, at: int, total: jax.Array, words: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Those of one span of a stage by its codes, f32 [ROWS] each."""

    def bucket(self, buckets: Buckets, table: Ref, total: jax.Array, words: jax.Array, *stored: jax.Array) -> None:
        """table = the sums of a tile for each vector of some tables, in the first half, as bits of float32."""

    def fill(self, sums: Sums, table: Ref, x: Ref, *books: Ref) -> None:
        """Make half of the tables of partial sums, from its half of x and the codebooks."""

    def total(self, sums: Sums, table: Ref, words: jax.Array, *scales: jax.Array) -> Sequence[jax.Array]:
        """For each row of x, what the ROWS add up to: float32 [ROWS]."""

    def integer_product(self, weights: jax.Array, x: Ref) -> jax.Array:
        """weights [ROWS, k] @ x [columns, k]^T of integers of 8 bits, in int32."""

    def times_rows(self, factors: jax.Array, sums: jax.Array) -> jax.Array:
        """factors [ROWS] times sums [ROWS, columns] of integers, in float32."""

    def release(self) -> None:
        """Say that the stage's buffers were read."""


class Gpu:
    """Mosaic GPU."""

    interpret = False

    def accumulate(self, out: Ref, run: Callable[[Ref], Any]) -> None:
        out[...] = self.accumulated(out.shape, run)

    def words(self, ref: Ref, staged: bool = True) -> jax.Array:
        return load(ref, layout=BYTES if ref.dtype == jnp.uint8 else WORDS[ref.shape[0]], optimized=staged)

    def rows(self, ref: Ref, staged: bool) -> jax.Array:
        return load(ref, layout=ROW, optimized=staged)

    def tables(self, program: Program, *stored: jax.Array) -> Sequence[jax.Array]:
        return tables_in_registers(program, table_size(program), *stored)

    def decode(self, program: Program, table: Ref, words: Sequence[jax.Array], *stored: jax.Array) -> jax.Array:
        return in_registers(program, table, words, *stored)

    def integers(self, program: Integers, words: Sequence[jax.Array], *stored: jax.Array) -> IntegersOfStage:
        return integers_in_registers(program, words, *stored)

    def multiply(self, acc: Ref, weights: jax.Array, x: Ref) -> None:
        plgpu.wgmma(acc, weights, transposed(x))
        plgpu.wgmma_wait(0)

    def multiply_stored(self, acc: Ref, dy: Ref, weights: Ref) -> None:
        plgpu.wgmma(acc, dy, weights)
        plgpu.wgmma_wait(0)

    def zeros(self, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)

    def product(self, weights: Ref, x: Ref) -> jax.Array:
        return self.accumulated((weights.shape[0], x.shape[0]), lambda acc: self.multiply(acc, weights, x))

    def integer_product(self, weights: jax.Array, x: Ref) -> jax.Array:
        shape = weights.shape[0], x.shape[0]
        return self.accumulated(shape, lambda acc: self.multiply(acc, weights, x), jnp.int32)

    def accumulated(self, shape: tuple[int, int], run: Callable[[Any], Any], dtype: Any = jnp.float32) -> jax.Array:
        def scoped(acc: Ref) -> jax.Array:
            run(acc)
            return acc[...]

        out: jax.Array = pl.run_scoped(scoped, plgpu.ACC(shape, dtype))  # type: ignore[attr-defined]
        return out

    def commit(self) -> None:
        plgpu.commit_smem()

    def add_outer(self, total: Any, dy: Ref, x: Ref) -> Any:
        plgpu.wgmma(total, transposed(dy), x)
        plgpu.wgmma_wait(0)
        return total

    def by_code(self, sums: CodeSums, at: int, total: jax.Array, words: Sequence[jax.Array]) -> Sequence[jax.Array]:
        return sums_in_registers(sums, at, total, words)

    def bucket(self, buckets: Buckets, table: Ref, total: jax.Array, words: jax.Array, *stored: jax.Array) -> None:
        bucketed_in_shared(buckets, table, total, words, *stored)

    def fill(self, sums: Sums, table: Ref, x: Ref, *books: Ref) -> None:
        filled_in_shared(sums, table, x, *books)

    def total(self, sums: Sums, table: Ref, words: jax.Array, *scales: jax.Array) -> Sequence[jax.Array]:
        return total_in_registers(sums, table, words, *scales)

    def times_rows(self, factors: jax.Array, sums: jax.Array) -> jax.Array:
        return jax.lax.broadcast_in_dim(factors, sums.shape, (0,)) * sums.astype(jnp.float32)

    def release(self) -> None:
        pass


class Twin:
    """The interpreter: results accumulate in shared memory, decoding is numpy, the product jnp.

    Attributes:
      interpret: parameters of Pallas' Mosaic GPU interpreter.
    """

    def __init__(self, interpret: Any) -> None:
        self.interpret = interpret

    def accumulate(self, out: Ref, run: Callable[[Ref], Any]) -> None:
        out[...] = jnp.zeros(out.shape, jnp.float32)
        run(out)

    def words(self, ref: Ref, staged: bool = True) -> jax.Array:
        return ref[...]

    def rows(self, ref: Ref, staged: bool) -> jax.Array:
        return ref[...]

    def tables(self, program: Program, *stored: jax.Array) -> Sequence[jax.Array]:
        out = [jax.ShapeDtypeStruct((ROWS,), np.uint32)] * table_size(program)
        return jax.pure_callback(lambda *raw: tables_in_numpy(program, *map(np.asarray, raw)), out, *stored)

    def decode(self, program: Program, table: Ref, words: Sequence[jax.Array], *stored: jax.Array) -> jax.Array:
        def decoded(table: Any, words: Sequence[Any], *stored: Any) -> Any:
            shared = None if table is None else np.asarray(table)
            return in_numpy(program, [np.asarray(w) for w in words], *map(np.asarray, stored), table=shared)

        out = jax.ShapeDtypeStruct((ROWS, STAGE), HALVES[program.kind])
        return jax.pure_callback(decoded, out, None if table is None else table[...], list(words), *stored)

    def integers(self, program: Integers, words: Sequence[jax.Array], *stored: jax.Array) -> IntegersOfStage:
        def decoded(words: Sequence[Any], *stored: Any) -> Any:
            return int8_lanes.in_numpy(program, [np.asarray(w) for w in words], *map(np.asarray, stored))

        span, groups = program.span, STAGE // program.span
        out = jax.ShapeDtypeStruct((ROWS, STAGE), np.int8), jax.ShapeDtypeStruct((groups, ROWS), np.float32)
        whole, factors = jax.pure_callback(decoded, out, list(words), *stored)
        by_group = [whole[:, at : at + span] for at in range(0, STAGE, span)]
        return by_group, [] if program.of_rows else list(factors)

    def multiply(self, acc: Ref, weights: jax.Array, x: Ref) -> None:
        acc[...] += jnp.dot(weights.astype(jnp.float32), x[...].astype(jnp.float32).T)

    def multiply_stored(self, acc: Ref, dy: Ref, weights: Ref) -> None:
        acc[...] += jnp.dot(dy[...].astype(jnp.float32), weights[...].astype(jnp.float32))

    def zeros(self, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(shape, dtype)

    def product(self, weights: Ref, x: Ref) -> jax.Array:
        return jnp.dot(weights[...].astype(jnp.float32), x[...].astype(jnp.float32).T)

    def commit(self) -> None:
        plgpu.commit_smem()

    def accumulated(self, shape: tuple[int, int], run: Callable[[Any], Any], dtype: Any = jnp.float32) -> jax.Array:
        out: jax.Array = run(jnp.zeros(shape, dtype))
        return out

    def add_outer(self, total: Any, dy: Ref, x: Ref) -> Any:
        return total + jnp.dot(dy[...].astype(jnp.float32).T, x[...].astype(jnp.float32))

    def by_code(self, sums: CodeSums, at: int, total: jax.Array, words: Sequence[jax.Array]) -> Sequence[jax.Array]:
        def made(total: Any, *words: Any) -> Any:
            return sums_in_numpy(sums, at, np.asarray(total), [np.asarray(w) for w in words])

        out = [jax.ShapeDtypeStruct((ROWS,), jnp.float32)] * len(sums.subsets)
        return jax.pure_callback(made, out, total, *words)

    def bucket(self, buckets: Buckets, table: Ref, total: jax.Array, words: jax.Array, *stored: jax.Array) -> None:
        def made(*operands: Any) -> Any:
            return buckets_in_numpy(buckets, *map(np.asarray, operands))

        out = jax.ShapeDtypeStruct(buckets.table_shape, jnp.int32)
        table[...] = jax.pure_callback(made, out, total, words, *stored)

    def fill(self, sums: Sums, table: Ref, x: Ref, *books: Ref) -> None:
        def filled(*stored: Any) -> Any:
            return filled_in_numpy(sums, *map(np.asarray, stored))

        out = jax.ShapeDtypeStruct((sums.spans // 2, *sums.shape[1:]), jnp.float32)
        table[...] = jax.pure_callback(filled, out, x[...], *(book[...] for book in books))

    def total(self, sums: Sums, table: Ref, words: jax.Array, *scales: jax.Array) -> Sequence[jax.Array]:
        def totalled(halves: Sequence[Any], *stored: Any) -> Any:
            return total_in_numpy(sums, np.stack([np.asarray(h) for h in halves]), *map(np.asarray, stored))

        out = [jax.ShapeDtypeStruct((ROWS,), jnp.float32)] * sums.columns
        # By halves: XLA hands a callback what is above 100 KiB in a thread, and all of them may be in callbacks.
        made: Sequence[jax.Array] = jax.pure_callback(totalled, out, [table[0], table[1]], words, *scales)
        return made

    def integer_product(self, weights: jax.Array, x: Ref) -> jax.Array:
        return jnp.dot(weights.astype(jnp.int32), x[...].astype(jnp.int32).T)

    def times_rows(self, factors: jax.Array, sums: jax.Array) -> jax.Array:
        return factors[:, None] * sums.astype(jnp.float32)

    def release(self) -> None:
        plgpu.commit_smem()
