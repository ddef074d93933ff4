"""The verbs of `lowbit.kernels.ampere`, for a GPU and for its twin."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from lowbit.compat import copy_matrix_async, load, mma, mma_layout, store, transposed, wait_async
from lowbit.kernels.alu import Half, HalfOp, Register
from lowbit.kernels.gpu_alu import GpuAlu, constant, i32, ptx, this_lane
from lowbit.kernels.lane_gpu import in_registers
from lowbit.kernels.lanes import LANES, Program
from lowbit.kernels.verbs import Gpu, Ref, Twin, Verbs

COPY = 16
"""Bytes that a lane copies at once."""


class AmpereVerbs(Verbs, Protocol):
    def fetch(self, copies: Sequence[tuple[Ref, Ref]]) -> None:
        """Begin to copy to shared memory: what is contiguous in memory, and last a part of a matrix."""

    def fetched(self, but: int) -> None:
        """Wait until all fetches, `but` the newest so many, are there, and every lane has come here."""

    def operand(self, x: Ref) -> jax.Array:
        """x [columns, k] of a buffer as `plus` takes it."""

    def plus(self, total: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
        """total + weights [ROWS, k] @ x^T, all in registers."""

    def put(self, total: jax.Array, out: Ref) -> None:
        """out = total, to memory."""


class Ampere(Gpu):
    """Mosaic GPU for compute capability 8: `cp.async`, and `mma.sync` with both operands and the sum in registers."""

    def zeros(self, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros(shape, dtype), mma_layout("ACC"))

    def decode(self, program: Program, table: Ref, words: Sequence[jax.Array], *stored: jax.Array) -> jax.Array:
        return in_registers(program, table, words, *stored, alu=AmpereAlu, layout=mma_layout("LHS"))

    def fetch(self, copies: Sequence[tuple[Ref, Ref]]) -> None:
        *rows, (matrix, buffer) = copies
        for source, target in rows:
            _copy_async(source, target)
        copy_matrix_async(matrix, buffer)

    def fetched(self, but: int) -> None:
        wait_async(but)

    def operand(self, x: Ref) -> jax.Array:
        return load(transposed(x), layout=mma_layout("RHS"))

    def plus(self, total: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
        return mma(total, weights, x)

    def put(self, total: jax.Array, out: Ref) -> None:
        store(out, total)

    def commit(self) -> None:
        plgpu.inline_mgpu()(lambda ctx: utils.warpgroup_barrier())()


class AmpereTwin(Twin):
    """The interpreter: a copy is there at once."""

    def fetch(self, copies: Sequence[tuple[Ref, Ref]]) -> None:
        for source, target in copies:
            target[...] = source[...]

    def fetched(self, but: int) -> None:
        pass

    def operand(self, x: Ref) -> jax.Array:
        return x[...]

    def plus(self, total: jax.Array, weights: jax.Array, x: jax.Array) -> jax.Array:
        return total + jnp.dot(weights.astype(jnp.float32), x.astype(jnp.float32).T)

    def put(self, total: jax.Array, out: Ref) -> None:
        out[...] = total


class AmpereAlu(GpuAlu):
    """Of arithmetic in pairs of bfloat16 it has fma alone."""

    def half2(self, op: HalfOp, kind: Half, *operands: Register | int) -> Register:
        if kind == "f16" or op == "fma":
            return super().half2(op, kind, *operands)
        a, b = operands
        one, minus_zero = 0x3F803F80, 0x80008000  # neither changes what is rounded, nor the sign of a zero
        return super().half2("fma", kind, *((a, one, b) if op == "add" else (a, b, minus_zero)))


def _copy_async(source: Ref, target: Ref) -> None:
    """Begins to copy an array that is contiguous in memory. jax's own copy takes half as many bytes a lane, none that
    are no multiple of them for 128 lanes, and any slice for contiguous."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def copied(ctx: Any, source: Any, target: Any) -> None:
        del ctx
        of, lane = ir.MemRefType(source.type), this_lane()
        copies = prod(of.shape) * utils.bitwidth(of.element_type) // (8 * COPY)
        wide = ir.IntegerType.get_signless(64)
        pointer = llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(source))
        begin = arith.addi(llvm.ptrtoint(wide, pointer), arith.extui(wide, ptx("mul.lo.u32 $0, $1, $2;", lane, COPY)))
        to = ptx("mad.lo.u32 $0, $1, $2, $3;", lane, COPY, llvm.ptrtoint(i32(), utils.memref_ptr(target)))
        for first in range(0, copies, LANES):
            here = [arith.addi(to, constant(COPY * first)), arith.addi(begin, utils.c(COPY * first, wide))]
            code = f"cp.async.cg.shared.global [$0], [$1], {COPY};"
            if copies - first < LANES:
                code = f"{{ .reg .pred p; setp.lt.u32 p, $2, {copies - first}; @p {code} }}"
                here.append(lane)
            bound = "r,l,r" if len(here) == 3 else "r,l"
            llvm.inline_asm(None, here, code, f"{bound},~{{memory}}", has_side_effects=True)

    copied(source, target)
