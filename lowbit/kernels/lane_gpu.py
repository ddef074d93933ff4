"""Lane programs on the GPU: arrays in registers and in shared memory as what `GpuAlu` works on, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from lowbit.kernels.alu import HALVES, Half, Register
from lowbit.kernels.by_code import CodeSums
from lowbit.kernels.computed import Books
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.gpu_alu import GpuAlu, constant, i32, ptx, this_lane
from lowbit.kernels.int8_lanes import Integers
from lowbit.kernels.lanes import LANES, Program, at_once

WORDS = {count: plgpu.Layout.WG_STRIDED((count, LANES), vec_size=at_once(count)) for count in range(1, 65)}
BYTES = plgpu.Layout.WGMMA_8BIT
ROW = plgpu.Layout.WGMMA.reduce(1)


def in_registers(
    program: Program, table: Any, words: Sequence[jax.Array], *stored: jax.Array,
    alu: type[GpuAlu] = GpuAlu, layout: Any = plgpu.Layout.WGMMA,
) -> jax.Array:  # fmt: skip
    """The stage [ROWS, STAGE] of weights in `layout`; operands as for `lanes.in_numpy`, in WORDS and ROW.

    table: the shared one, a reference to halves [entries, ROWS and padding], or None.
    layout: WGMMA's, or another with the registers of a lane in the same order.
    """
    shared = [] if table is None else [table]
    out = plgpu.ShapeDtypeStruct((ROWS, STAGE), HALVES[program.kind], layout=layout)

    held = [BYTES if a.dtype == jnp.uint8 else WORDS[len(a)] for a in words]
    types = (*(plgpu.RefType() for _ in shared), *held, *(ROW for _ in stored))

    @plgpu.inline_mgpu(arg_types=types, return_type=out)
    def decoded(ctx: Any, *operands: Any) -> Any:
        del ctx
        refs, operands = operands[: len(shared)], operands[len(shared) :]
        arrays, rows = operands[: len(words)], operands[len(words) :]
        tables = []
        for ref in refs:
            at = program.decoder
            tables += _tables_of_all(ref, at.shape) if isinstance(at, Books) else _tables_of_rows(ref)
        registers = program(alu(), [raw(a) for a in arrays], *map(raw, rows), shared=tables)
        return _fragments(registers, program.kind, layout.to_mgpu())

    return decoded(*shared, *words, *stored)


def integers_in_registers(
    program: Integers, words: Sequence[jax.Array], *stored: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each group of a stage, its integers i8 [ROWS, span] in WGMMA's layout and its factors f32 [ROWS] in ROW;
    operands as for `int8_lanes.in_numpy`, in WORDS and ROW."""
    groups, span = STAGE // program.span, program.span
    integers = [plgpu.ShapeDtypeStruct((ROWS, span), jnp.dtype(np.int8), layout=BYTES)] * groups
    factors = [plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(np.float32), layout=ROW)] * (groups * (not program.of_rows))
    types = (*(WORDS[len(a)] for a in words), *(ROW for _ in stored))

    @plgpu.inline_mgpu(arg_types=types, return_type=[*integers, *factors])
    def decoded(ctx: Any, *operands: Any) -> Any:
        del ctx
        arrays, rows = operands[: len(words)], operands[len(words) :]
        made, by_group = program(GpuAlu(), [raw(a) for a in arrays], *map(raw, rows))
        element = ir.IntegerType.get_signless(8)
        whole = [_in_layout(registers, fa.WGMMA_LAYOUT_8BIT, (ROWS, span), element, True) for registers in made]
        return [*whole, *(of_rows(f, ir.F32Type.get()) for f in by_group)]

    found = decoded(*words, *stored)
    return found[:groups], found[groups:]


def _tables_of_rows(ref: Any) -> list[tuple[Register, int]]:
    """Where the first entries of the lane's two rows are, and the bytes from an entry to the next."""
    stride = 2 * ir.MemRefType(ref.type).shape[1]
    first, lane = llvm.ptrtoint(i32(), utils.memref_ptr(ref)), this_lane()
    row = ptx("{ .reg .b32 w, r; shr.u32 w, $1, 5; bfe.u32 r, $1, 2, 3; mad.lo.u32 $0, w, 16, r; }", lane)
    return [(ptx("mad.lo.u32 $0, $1, 2, $2;", row, arith.addi(first, constant(16 * h))), stride) for h in range(2)]


def _tables_of_all(ref: Any, shape: tuple[int, int, int, int]) -> list[tuple[Register, int]]:
    """For each of some tables, where the first entry is in the copy that the lane reads; and the bytes of an entry."""
    count, entries, copies, size = shape
    first, lane = llvm.ptrtoint(i32(), utils.memref_ptr(ref)), this_lane()
    own = ptx("{ .reg .b32 c; and.b32 c, $1, $2; mad.lo.u32 $0, c, $3, $4; }", lane, copies - 1, 2 * size, first)
    stride = 2 * size * copies
    return [(arith.addi(own, constant(i * entries * stride)) if i else own, stride) for i in range(count)]


def tables_in_registers(program: Program, count: int, *stored: jax.Array) -> list[jax.Array]:
    """The `count` registers of the rows' tables, each u32 [ROWS] in ROW."""
    out = [plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(np.uint32), layout=ROW)] * count

    @plgpu.inline_mgpu(arg_types=tuple(ROW for _ in stored), return_type=out)
    def made(ctx: Any, *rows: Any) -> Any:
        del ctx
        return [of_rows(register) for register in program.tables(GpuAlu(), *map(raw, rows))]

    return made(*stored)


def sums_in_registers(sums: CodeSums, unit: int, total: jax.Array, words: Sequence[jax.Array]) -> list[jax.Array]:
    """As `by_code.in_numpy`, in ROW."""
    out = [plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW)] * len(sums.subsets)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, *(WORDS[len(a)] for a in words)), return_type=out)
    def made(ctx: Any, total: Any, *arrays: Any) -> Any:
        del ctx
        pairs = sums(GpuAlu(), unit, raw(total), list(map(raw, arrays)))
        return [of_rows(pair, ir.F32Type.get()) for pair in pairs]

    return made(total, *words)


def raw(array: Any) -> list[Register]:
    """A fragmented array's registers, each 32 bits: elements of 32, four bytes, or narrower ones of their own."""
    out: list[Register] = []
    for register in array.registers.flat:
        count = ir.VectorType(register.type).shape[0]
        bits = utils.bitwidth(array.mlir_dtype)
        if bits * count == 32:
            out.append(utils.bitcast(register, i32()))
        elif bits == 32:
            word = utils.bitcast(register, ir.VectorType.get((count,), i32()))
            out += [vector.extract(word, [], [i]) for i in range(count)]
        else:
            out.append(arith.extui(i32(), utils.bitcast(register, ir.IntegerType.get_signless(bits))))
    return out


def of_rows(register: Sequence[Register], element: Any = None) -> Any:
    """A word for each of the lane's two rows as an array in ROW, of `element` or of unsigned words."""
    return _in_layout(register, ROW.to_mgpu(), (ROWS,), element or i32(), None if element else False)


def _fragments(registers: list[Register], kind: Half, layout: Any) -> Any:
    element = ir.F16Type.get() if kind == "f16" else ir.BF16Type.get()
    return _in_layout(registers, layout, (ROWS, STAGE), element)


def _in_layout(
    registers: Sequence[Register], layout: Any, shape: tuple[int, ...], element: Any, signed: bool | None = None
) -> Any:
    """An array of elements, as many in a register as fit."""
    made = np.empty(layout.registers_shape(shape), dtype=object)
    for register, at in zip(registers, np.ndindex(*made.shape), strict=True):
        one = vector.broadcast(ir.VectorType.get((1,), i32()), register)
        made[at] = utils.bitcast(one, ir.VectorType.get((32 // utils.bitwidth(element),), element))
    return fa.FragmentedArray(_registers=made, _layout=layout, _is_signed=signed)
