"""Lane programs on the GPU: registers are MLIR values, operations the PTX instructions of the same names.

Instructions are written out where the compiler would otherwise use two for one, or contract what must round twice.
"""

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

from lowbit.kernels.alu import HALVES, Bit, FloatOp, Half, HalfOp, Register
from lowbit.kernels.by_code import CodeSums
from lowbit.kernels.computed import Books
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.int8_lanes import Integers
from lowbit.kernels.lanes import LANES, Program, at_once

WORDS = {count: plgpu.Layout.WG_STRIDED((count, LANES), vec_size=at_once(count)) for count in range(1, 65)}
BYTES = plgpu.Layout.WGMMA_8BIT
ROW = plgpu.Layout.WGMMA.reduce(1)


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> Any:
    return utils.c(value if value < 1 << 31 else value - (1 << 32), i32())


def ptx(code: str, *operands: Register | int) -> Register:
    """One instruction: `code` with its operands $1, $2 and so on, into $0."""
    values = [constant(v) if isinstance(v, int) else v for v in operands]
    return llvm.inline_asm(i32(), values, code, "=r" + ",r" * len(values))


class GpuAlu:
    """The reading as PTX."""

    def __init__(self) -> None:
        # Zero, but the assembler cannot see it: a constant would be moved again for every use, and multiplying by a
        # power of two would become a shift.
        self.zero = ptx("{ .reg .b32 t; mov.u32 t, %dynamic_smem_size; shr.u32 $0, t, 31; }")
        self.held: dict[int, Register] = {}

    def register(self, value: int) -> Register:
        """A constant that stays in a register."""
        if value not in self.held:
            self.held[value] = ptx("add.u32 $0, $1, $2;", self.zero, value)
        return self.held[value]

    def shl(self, a: Register, n: int) -> Register:
        return arith.shli(a, constant(n)) if n else a

    def shr(self, a: Register, n: int) -> Register:
        return arith.shrui(a, constant(n)) if n else a

    def mul_shr(self, a: Register, n: int) -> Register:
        return ptx("mul.hi.u32 $0, $1, $2;", a, self.register(1 << 32 - n))

    def lop3(self, a: Register, b: Register | int, c: Register | int, table: int) -> Register:
        return ptx(f"lop3.b32 $0, $1, $2, $3, {table};", a, b, c)

    def prmt(self, a: Register | int, b: Register | int, selector: Register | int) -> Register:
        return ptx("prmt.b32 $0, $1, $2, $3;", a, b, selector)

    def shl_add(self, a: Register, n: int, c: Register) -> Register:
        return ptx("mad.lo.u32 $0, $1, $2, $3;", a, self.register(1 << n), c)

    def load(self, table: Any, index: Register) -> Register:
        address, stride = table
        where = ptx("mad.lo.u32 $0, $1, $2, $3;", index, stride, address)
        return ptx("{ .reg .b16 h; ld.shared.u16 h, [$1]; cvt.u32.u16 $0, h; }", where)

    def load_vector(self, table: Any, index: Register, size: int) -> list[Register]:
        address, stride = table
        where = ptx("mad.lo.u32 $0, $1, $2, $3;", index, stride, address)
        made = []
        for at in range(0, 2 * size, 16):
            words = min(size // 2, 4)
            made += _load_shared(arith.addi(where, constant(at)) if at else where, words)
        return made

    def load_words(self, memory: Any, address: Register, count: int, behind: int) -> list[Register]:
        del memory
        return _load_shared(arith.addi(address, constant(behind)), count)

    def store_words(self, memory: Any, address: Register, words: Sequence[Register], behind: int) -> None:
        del memory
        pointer = llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), arith.addi(address, constant(behind)))
        vector_type = ir.VectorType.get((len(words),), i32())
        llvm.store(vector.from_elements(vector_type, list(words)), pointer, alignment=4 * len(words))

    def across(self, a: Register, distance: int) -> Register:
        return utils.shfl_bfly(a, distance)

    def to_bf16(self, a: Register) -> Register:
        halves = (ptx(f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; cvt.f32.f16 $0, {half}; }}", a) for half in "lh")
        return self.pack2("bf16", *halves)

    def mad(self, a: Register, b: int, c: Register | int) -> Register:
        return ptx("mad.lo.u32 $0, $1, $2, $3;", a, b, c)

    def sub(self, a: Register, b: Register | int) -> Register:
        return arith.subi(a, constant(b) if isinstance(b, int) else b)

    def mad_high(self, a: Register, b: int, c: int) -> Register:
        return ptx("mad.hi.u32 $0, $1, $2, $3;", a, b, self.register(c))

    def half2(self, op: HalfOp, kind: Half, *operands: Register | int) -> Register:
        places = ", ".join(f"${i + 1}" for i in range(len(operands)))
        return ptx(f"{op}.rn.{kind}x2 $0, {places};", *operands)

    def f32(self, op: FloatOp, *operands: Register) -> Register:
        places = ", ".join(f"${i + 1}" for i in range(len(operands)))
        return ptx(f"{op}.rn.f32 $0, {places};", *operands)

    def add_sizes(self, a: Register, b: Register) -> Register:
        return ptx("{ .reg .b32 x, y; abs.f32 x, $1; abs.f32 y, $2; add.rn.f32 $0, x, y; }", a, b)

    def larger(self, a: Register, b: Register) -> Register:
        return ptx("max.NaN.f32 $0, $1, $2;", a, b)

    def number(self, value: float) -> Register:
        return constant(int(np.float32(value).view(np.uint32)))

    def widen(self, a: Register, dtype: str) -> Register:
        match dtype:
            case "f32":
                return a
            case "f16":
                return ptx("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }", a)
            case "bf16":
                return self.shl(a, 16)
            case _:  # an unsigned integer below 2^16: 2^23 + a as bits, less 2^23
                return self.f32("sub", self.lop3(a, 0x4B000000, 0, 0xFC), constant(0x4B000000))

    def pack2(self, kind: Half, low: Register, high: Register) -> Register:
        return ptx(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", high, low)

    def bit(self, a: Register, n: int) -> Bit:
        code = "{ .reg .b32 t; and.b32 t, $1, $2; setp.ne.u32 $0, t, 0; }"  # without the shift that LLVM would make
        return llvm.inline_asm(ir.IntegerType.get_signless(1), [a, constant(1 << n)], code, "=b,r,n")

    def where(self, bit: Bit, a: Register) -> Register:
        return arith.select(bit, a, constant(0))

    def add_where(self, bit: Bit, a: Register, b: Register) -> Register:
        return llvm.inline_asm(i32(), [a, b, bit], "@$3 add.rn.f32 $0, $0, $2;", "=r,0,r,b")


def _load_shared(address: Register, words: int) -> list[Register]:
    pointer = llvm.inttoptr(ir.Type.parse("!llvm.ptr<3>"), address)
    loaded = llvm.load(ir.VectorType.get((words,), i32()), pointer, alignment=4 * words)
    return [vector.extract(loaded, [], [i]) for i in range(words)]


def in_registers(program: Program, table: Any, words: Sequence[jax.Array], *stored: jax.Array) -> jax.Array:
    """The stage [ROWS, STAGE] of weights in WGMMA's layout; operands as for `lanes.in_numpy`, in WORDS and ROW.

    table: the shared one, a reference to halves [entries, ROWS and padding], or None.
    """
    shared = [] if table is None else [table]
    out = plgpu.ShapeDtypeStruct((ROWS, STAGE), HALVES[program.kind], layout=plgpu.Layout.WGMMA)

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
        registers = program(GpuAlu(), [raw(a) for a in arrays], *map(raw, rows), shared=tables)
        return _fragments(registers, program.kind)

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


def this_lane() -> Register:
    return ptx("{ .reg .b32 t; mov.u32 t, %tid.x; and.b32 $0, t, 127; }")


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


def _fragments(registers: list[Register], kind: Half) -> Any:
    element = ir.F16Type.get() if kind == "f16" else ir.BF16Type.get()
    return _in_layout(registers, fa.WGMMA_LAYOUT, (ROWS, STAGE), element)


def _in_layout(
    registers: Sequence[Register], layout: Any, shape: tuple[int, ...], element: Any, signed: bool | None = None
) -> Any:
    """An array of elements, as many in a register as fit."""
    made = np.empty(layout.registers_shape(shape), dtype=object)
    for register, at in zip(registers, np.ndindex(*made.shape), strict=True):
        one = vector.broadcast(ir.VectorType.get((1,), i32()), register)
        made[at] = utils.bitcast(one, ir.VectorType.get((32 // utils.bitwidth(element),), element))
    return fa.FragmentedArray(_registers=made, _layout=layout, _is_signed=signed)
