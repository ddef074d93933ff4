"""Sums in shared memory on the GPU: `lowbit.kernels.partial` and `lowbit.kernels.buckets` over it and registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from lowbit.kernels.buckets import Buckets
from lowbit.kernels.decoders import ROWS
from lowbit.kernels.gpu_alu import GpuAlu, i32, this_lane
from lowbit.kernels.lane_gpu import ROW, WORDS, of_rows, raw
from lowbit.kernels.partial import Sums


def filled_in_shared(sums: Sums, table: Any, x: Any, *books: Any) -> None:
    """Half of the tables, from its half of x and the codebooks, all in shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (2 + len(books)))
    def filled(ctx: Any, *refs: Any) -> None:
        del ctx
        table, x, *books = map(_memory, refs)
        sums.fill(GpuAlu(), this_lane(), x, books[0] if books else None, table)

    filled(table, x, *books)


def total_in_registers(sums: Sums, table: Any, words: jax.Array, *scales: jax.Array) -> Sequence[jax.Array]:
    """For each row of x, float32 [ROWS] in ROW; `words` in WORDS, `scales` in ROW."""
    out = [plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW)] * sums.columns
    types = (plgpu.RefType(), WORDS[sums.source.words], *(ROW for _ in scales))

    @plgpu.inline_mgpu(arg_types=types, return_type=out)
    def totalled(ctx: Any, table: Any, words: Any, *scales: Any) -> Any:
        del ctx
        totals = sums.total(GpuAlu(), this_lane(), raw(words), [raw(s) for s in scales], _memory(table))
        return [of_rows(pair, ir.F32Type.get()) for pair in totals]

    made: Sequence[jax.Array] = totalled(table, words, *scales)
    return made


def bucketed_in_shared(buckets: Buckets, table: Any, total: jax.Array, words: jax.Array, *stored: jax.Array) -> None:
    """As `buckets.in_numpy`, in `table`; `total` in WGMMA's layout, `words` in WORDS, `stored` in ROW."""
    types = (plgpu.RefType(), plgpu.Layout.WGMMA, WORDS[len(words)], *(ROW for _ in stored))

    @plgpu.inline_mgpu(arg_types=types)
    def bucketed(ctx: Any, table: Any, total: Any, words: Any, *stored: Any) -> None:
        del ctx
        buckets(GpuAlu(), this_lane(), raw(total), raw(words), [raw(s) for s in stored], _memory(table))

    bucketed(table, total, words, *stored)


def _memory(ref: Any) -> tuple[Any, Any]:
    """What a lane program takes for shared memory: the numpy reading's array, here None, and where it begins."""
    return None, llvm.ptrtoint(i32(), utils.memref_ptr(ref))
