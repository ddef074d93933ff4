"""What lanes do on the GPU: registers are MLIR values, operations the PTX instructions of the same names.

Instructions are written out where the compiler would otherwise use two for one, or contract what must round twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from lowbit.kernels.alu import Bit, FloatOp, Half, HalfOp, Register


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

    def add_word(self, memory: Any, address: Register, value: Register, behind: int) -> None:
        del memory
        code = f"red.shared.add.u32 [$0 + {behind}], $1;"
        llvm.inline_asm(None, [address, value], code, "r,r,~{memory}", has_side_effects=True)

    def barrier(self) -> None:
        utils.warpgroup_barrier()

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

    def larger_size(self, a: Register, b: Register) -> Register:
        return ptx("{ .reg .b32 x, y; abs.f32 x, $1; abs.f32 y, $2; max.NaN.f32 $0, x, y; }", a, b)

    def from_integer(self, a: Register) -> Register:
        return ptx("cvt.rn.f32.s32 $0, $1;", a)

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


def this_lane() -> Register:
    return ptx("{ .reg .b32 t; mov.u32 t, %tid.x; and.b32 $0, t, 127; }")
