"""The operations of a lane program, and their reading in numpy: a register of 128 lanes is one uint32[128].

A lane program is a function `program(alu, *inputs)` of lists of 32-bit registers. It is written once and read twice:
here, and as PTX in `lowbit.kernels.gpu_alu`. Operations are those of the PTX ISA, by the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import numpy as np

Register = Any
"""32 bits a lane: uint32[128] in numpy, an i32 value in MLIR."""
Bit = Any
"""A bit a lane: bool[128] in numpy, an i1 value in MLIR."""
Half = Literal["f16", "bf16"]
HalfOp = Literal["add", "mul", "fma"]
FloatOp = Literal["add", "sub", "mul", "fma"]
AND, OR, XOR = 0xC0, 0xFC, 0x3C
AND_OR, AND_XOR, SELECT = 0xEA, 0x6A, 0xCA
"""Truth tables of `lop3` over a = 0xF0, b = 0xCC, c = 0xAA: a & b, a | b, a ^ b; (a & b) | c, (a & b) ^ c,
a ? b : c."""


class Alu(Protocol):
    """What a lane can do. Where an int is allowed it is a constant."""

    def shl(self, a: Register, n: int) -> Register: ...
    def shr(self, a: Register, n: int) -> Register: ...
    def mul_shr(self, a: Register, n: int) -> Register:
        """a >> n for n > 0, as a multiplication, which the FMA pipe runs while the ALU is busy."""

    def lop3(self, a: Register, b: Register | int, c: Register | int, table: int) -> Register: ...
    def prmt(self, a: Register | int, b: Register | int, selector: Register | int) -> Register:
        """Four bytes of a (0 to 3) and b (4 to 7), by the nibbles of the selector; bit 3 replicates the byte's sign."""

    def mad(self, a: Register, b: int, c: Register | int) -> Register:
        """a b + c, the low 32 bits."""

    def shl_add(self, a: Register, n: int, c: Register) -> Register:
        """(a << n) + c, as a multiplication, like `mul_shr`."""

    def load(self, table: Any, index: Register) -> Register:
        """A half of a table in shared memory, in the low bits."""

    def load_vector(self, table: Any, index: Register, size: int) -> list[Register]:
        """A vector of `size` halves of one, two in a register."""

    def load_words(self, memory: Any, address: Register, count: int, behind: int) -> list[Register]:
        """Words of shared memory that follow each other, from so many bytes behind an address."""

    def store_words(self, memory: Any, address: Register, words: Sequence[Register], behind: int) -> None: ...
    def add_word(self, memory: Any, address: Register, value: Register, behind: int) -> None:
        """Adds an integer to a word of shared memory, whichever lanes do so at a time."""

    def barrier(self) -> None:
        """Waits until the whole warpgroup is here, and has done to shared memory what comes before."""

    def across(self, a: Register, distance: int) -> Register:
        """What the lane holds whose number differs by the bits of `distance`."""

    def to_bf16(self, a: Register) -> Register:
        """Two float16 as two bfloat16, rounded to nearest even."""

    def sub(self, a: Register, b: Register | int) -> Register: ...
    def mad_high(self, a: Register, b: int, c: int) -> Register:
        """The high 32 bits of a b, plus c."""

    def half2(self, op: HalfOp, kind: Half, *operands: Register | int) -> Register:
        """Two halves at once, a + b, a b or a b + c, rounded to nearest even."""

    def f32(self, op: FloatOp, *operands: Register) -> Register:
        """a + b, a - b, a b or a b + c."""

    def add_sizes(self, a: Register, b: Register) -> Register:
        """|a| + |b| in float32."""

    def larger(self, a: Register, b: Register) -> Register:
        """Of two float32, NaN if one of them is."""

    def larger_size(self, a: Register, b: Register) -> Register:
        """Of |a| and |b| in float32, NaN if one of them is."""

    def from_integer(self, a: Register) -> Register:
        """float32 of a signed integer, rounded to nearest even."""

    def number(self, value: float) -> Register:
        """A float32 constant."""

    def widen(self, a: Register, dtype: str) -> Register:
        """float32 of the stored element in the low bits of a register: f32, f16, bf16, or an unsigned integer."""

    def pack2(self, kind: Half, low: Register, high: Register) -> Register:
        """Two float32 rounded to halves, to nearest even."""

    def bit(self, a: Register, n: int) -> Bit:
        """Whether bit n is set."""

    def where(self, bit: Bit, a: Register) -> Register:
        """a or zero."""

    def add_where(self, bit: Bit, a: Register, b: Register) -> Register:
        """a + b in float32, or a."""


HALVES = {"f16": jnp.float16, "bf16": jnp.bfloat16}


class NumpyAlu:
    """The reading in numpy, from the definitions of the PTX ISA."""

    def shl(self, a: Register, n: int) -> Register:
        return a << np.uint32(n)

    def shr(self, a: Register, n: int) -> Register:
        return a >> np.uint32(n)

    def mul_shr(self, a: Register, n: int) -> Register:
        return self.shr(a, n)

    def lop3(self, a: Register, b: Register | int, c: Register | int, table: int) -> Register:
        operands = [np.uint32(v) for v in (a, b, c)]
        out = np.uint32(0)
        for row in range(8):
            if table >> row & 1:
                x, y, z = (v if row >> (2 - i) & 1 else ~v for i, v in enumerate(operands))
                out = out | (x & y & z)
        return out

    def prmt(self, a: Register | int, b: Register | int, selector: Register | int) -> Register:
        a, b, nibbles = np.broadcast_arrays(*(np.uint32(v) for v in (a, b, selector)))
        source = np.stack([a, b], -1).astype("<u4").view(np.uint8)  # [..., 8]
        nibbles = nibbles[..., None] >> np.arange(0, 16, 4, dtype=np.uint32)
        bytes_ = np.take_along_axis(source, (nibbles & 7).astype(np.int64), -1)
        sign = np.where(bytes_ >> 7, np.uint8(0xFF), np.uint8(0))
        return np.ascontiguousarray(np.where(nibbles & 8, sign, bytes_)).view("<u4")[..., 0]

    def shl_add(self, a: Register, n: int, c: Register) -> Register:
        return self.mad(a, 1 << n, c)

    def load(self, table: Any, index: Register) -> Register:
        return table[np.arange(len(table)), index].astype(np.uint32)  # of every lane its own [lane, entry]

    def load_vector(self, table: Any, index: Register, size: int) -> list[Register]:
        return list(np.ascontiguousarray(table[index]).view(np.uint32).reshape(-1, size // 2).T)

    def load_words(self, memory: Any, address: Register, count: int, behind: int) -> list[Register]:
        return [memory[0][(address + np.uint32(behind)) // 4 + np.uint32(i)] for i in range(count)]

    def store_words(self, memory: Any, address: Register, words: Sequence[Register], behind: int) -> None:
        for i, word in enumerate(words):
            memory[0][(address + np.uint32(behind)) // 4 + np.uint32(i)] = word

    def add_word(self, memory: Any, address: Register, value: Register, behind: int) -> None:
        np.add.at(memory[0], (address + np.uint32(behind)) // 4, value)

    def barrier(self) -> None:
        pass  # all lanes are one array

    def across(self, a: Register, distance: int) -> Register:
        return a[np.arange(len(a)) ^ distance]

    def to_bf16(self, a: Register) -> Register:
        return self.pack2("bf16", *map(_bits, _halves(a, "f16")))

    def mad(self, a: Register, b: int, c: Register | int) -> Register:
        return a * np.uint32(b) + np.uint32(c)

    def sub(self, a: Register, b: Register | int) -> Register:
        return a - np.uint32(b)

    def mad_high(self, a: Register, b: int, c: int) -> Register:
        return (a.astype(np.uint64) * np.uint64(b) >> np.uint64(32)).astype(np.uint32) + np.uint32(c)

    def half2(self, op: HalfOp, kind: Half, *operands: Register | int) -> Register:
        # float32 holds products of halves, and the integers that programs add, exactly: rounding happens once.
        pair = []
        for x, y, *z in zip(*(_halves(np.uint32(v), kind) for v in operands), strict=True):
            pair.append(x + y if op == "add" else x * y + z[0] if z else x * y)
        return self.pack2(kind, *map(_bits, pair))

    @np.errstate(invalid="ignore")  # of inf and NaN
    def f32(self, op: FloatOp, *operands: Register) -> Register:
        x, y, *z = map(_float, operands)
        if z:  # a product of two is exact in float64
            return _bits(x.astype(np.float64) * y + z[0])
        return _bits(x + y if op == "add" else x - y if op == "sub" else x * y)

    def add_sizes(self, a: Register, b: Register) -> Register:
        return _bits(abs(_float(a)) + abs(_float(b)))

    def larger(self, a: Register, b: Register) -> Register:
        return _bits(np.maximum(_float(a), _float(b)))

    def larger_size(self, a: Register, b: Register) -> Register:
        return _bits(np.maximum(abs(_float(a)), abs(_float(b))))

    def from_integer(self, a: Register) -> Register:
        return _bits(a.view(np.int32))

    def number(self, value: float) -> Register:
        return _bits(np.array([value], np.float32))

    def widen(self, a: Register, dtype: str) -> Register:
        if dtype == "f32":
            return a
        return _bits(_halves(a, dtype)[0] if dtype in HALVES else a.astype(np.float32))

    def pack2(self, kind: Half, low: Register, high: Register) -> Register:
        lo, hi = (_float(v).astype(HALVES[kind]).view(np.uint16).astype(np.uint32) for v in (low, high))
        return lo | hi << np.uint32(16)

    def bit(self, a: Register, n: int) -> Bit:
        return self.shr(a, n) & np.uint32(1) == 1

    def where(self, bit: Bit, a: Register) -> Register:
        return np.where(bit, a, np.uint32(0))

    def add_where(self, bit: Bit, a: Register, b: Register) -> Register:
        return np.where(bit, self.f32("add", a, b), a)


def _float(a: Register) -> Any:
    return np.atleast_1d(a).view(np.float32)


def _bits(a: Any) -> Register:
    return a.astype(np.float32).view(np.uint32)


def _halves(a: Register, kind: str) -> tuple[Any, Any]:
    both = np.atleast_1d(a)[..., None].astype("<u4").view(np.uint16).view(HALVES[kind]).astype(np.float32)
    return both[..., 0], both[..., 1]
