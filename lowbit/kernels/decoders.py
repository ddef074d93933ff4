"""Ways to decode codes in registers, each a lane program: from words of codes to halves as WGMMA's A operand.

A tile is 64 rows by 64 inputs: 128 lanes with 32 weights each. Lane l of warp w holds, in register 2 j + h as halves
e = 0, 1, the weight of row 16 w + 8 h + l / 4 and input 8 j + 2 (l % 4) + e (PTX ISA, wgmma fragments). Its codes of b
bits lie in b words. Which bit of which word holds which code is stated as a term, the code's own decode expression.
In these terms a lane is (warp, r, q), an input (jj, j, q, e) with jj = 32 inputs, and s = (h, jj) one of four runs of
8 weights of a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lowbit.ir.build import merge, split
from lowbit.ir.expr import Expr, Slice, Unpack
from lowbit.kernels.alu import AND, AND_OR, AND_XOR, SELECT, XOR, Alu, Half, Register
from lowbit.kernels.codes import (
    fourth_bit,
    in_tile,
    lane_words,
    moved,
    nested,
    nibbles,
    of_registers,
    pairs,
    selector,
    threes,
    word_bits,
)
from lowbit.kernels.tables import Builder, is_odd
from lowbit.passes.scalar import Scalar, number, plus

ROWS = COLUMNS = 64
STAGE = 256
"""Inputs of a stage: 4 tiles, so that the words of a lane come in vectors of 4 for every width."""
RUN = 32
"""Inputs that share a table at the least."""
Table = Sequence[Register]
Tables = Sequence[Sequence[Table]]
"""By row half, then by run of 32 inputs."""
SharedTable = Any
"""A table in shared memory, as `Alu.load` takes it: that of each of the lane's two rows, or one for all rows."""


class Decoder(Protocol):
    """One way to decode.

    Attributes:
      bits: of a code.
      meaning: what a stored code stands for; itself if None.
      columns: inputs of a tile, whose words are decoded together: 64 rows of `columns / grain` codes.
      grain: inputs that have one code.
      consecutive: inputs of a lane that follow each other, a multiple of 2. WGMMA gives a lane two and two: with more,
        the inputs of both operands are in another order (`lowbit.kernels.product` turns x).
      shared: whether it reads tables in shared memory.
    """

    bits: int
    meaning: tuple[int, ...] | None = None
    columns: int = COLUMNS
    grain: int = 1
    consecutive: int = 2
    shared: bool = False

    def codes(self) -> Expr:
        """The stored codes [n, k] of a tile, as a term over its words u32 [word, warp, r, q]."""

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        """The registers in which a row's weights of one group are looked up."""

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        """The registers of a tile, 16 for 64 inputs. `shared`: the tables there."""


class OneBit(Decoder):
    """Two values: the bit, spread over a half, picks one. Of +a and -a it is the sign."""

    bits = 1

    def codes(self) -> Expr:
        return in_tile(of_registers(word_bits(1, 0)))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        zero = builder.both(entries[0])
        return (zero,) if is_odd(entries) else (zero, builder.alu.lop3(zero, builder.both(entries[1]), 0, XOR))

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        out = []
        for at in range(16):
            bit = alu.shl(words[0], 15 - at)
            zero, *difference = tables[at % 2][at // 8]
            if difference:
                out.append(alu.lop3(alu.prmt(bit, 0, 0xBB99), difference[0], zero, AND_XOR))
            else:
                out.append(alu.lop3(bit, 0x80008000, zero, AND_XOR))
        return out


class TwoBits(Decoder):
    """Four values: one permute finishes a pair of weights, its selector made by one multiplication for four."""

    bits = 2

    def codes(self) -> Expr:
        return in_tile(pairs(lane_words(2)))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        return builder.four(entries)

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        out: list[Register] = [None] * 16
        for h in range(2):
            for t in range(4):
                low, high = tables[h][t % 2]
                # For each code c the nibbles c and c + 4: from bits 0 and 1 of a byte, or from 6 and 7.
                if t == 0:
                    selector = alu.mad(alu.lop3(words[h], 0x03030303, 0, AND), 0x11, 0x40404040)
                else:
                    codes = alu.lop3(alu.shl(words[h], 6 - 2 * t), 0xC0C0C0C0, 0, AND)
                    selector = alu.mad_high(codes, 0x11 << 26, 0x40404040)
                at = 8 * (t % 2) + 4 * (t // 2) + h
                out[at] = alu.prmt(low, high, selector)
                out[at + 2] = alu.prmt(low, high, alu.mul_shr(selector, 16))
        return out


class Eights(Decoder):
    """Any values of up to 4 bits: a permute looks up one byte of four weights in a table of eight. A fourth bit picks
    one of two tables, spread over the bytes of the look-ups.

    The first `base` words of a lane are those of a decoder of as many bits; every further word has one bit of each of
    its weights, so that a code is read at several widths. With a `shared` table of its row, one run in four is looked
    up there, which keeps the ALU, busy with permutes, below what memory delivers.
    """

    def __init__(self, bits: int, base: int = 3, shared: bool = False) -> None:
        self.bits, self.base, self.shared = bits, base, shared and bits == 4

    def codes(self) -> Expr:
        return in_tile(nested(self.bits, self.base, self.shared))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        eights = (list(entries[i : i + 8]) for i in range(0, len(entries), 8))
        return tuple(reg for eight in eights for reg in builder.eight([*eight, *eight[:1] * (8 - len(eight))]))

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        out: list[Register] = [None] * 16
        for s in range(4):
            codes = selector(alu, words, s, self.base, min(self.bits, 3))
            if shared and s == 3:
                codes = alu.lop3(words[3], 0x88888888, codes, AND_OR)
                apart = [alu.mul_shr(alu.shl(codes, 28 - 4 * i), 28) for i in range(8)]
                _put_loaded(alu, out, s, shared[s // 2], apart)
                continue
            for j0, four in enumerate((codes, alu.mul_shr(codes, 16))):
                pairs = _two_of_eight(alu, four, words[3:], s, j0, tables[s // 2][s % 2], self.shared)
                _put(out, s, j0, pairs)
        return out


class Wide(Decoder):
    """Any values of 5 bits and more: each is looked up by itself, in a table of its row in shared memory."""

    shared = True

    def __init__(self, bits: int, base: int) -> None:
        self.bits, self.base = bits, base

    def codes(self) -> Expr:
        return in_tile(nested(self.bits, self.base, True))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        return ()

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        out: list[Register] = [None] * 16
        for s in range(4):
            low, high = selector(alu, words, s, self.base, 3), nibbles(alu, words[4:], s)
            codes = []
            for i in range(8):
                code = alu.lop3(moved(alu, low, 4 * i, 0), 7, 0, AND)
                code = alu.lop3(moved(alu, words[3], fourth_bit(s, i, True), 3), 8, code, AND_OR)
                codes.append(alu.lop3(moved(alu, high, 4 * i, 4), 0xF0, code, AND_OR))
            _put_loaded(alu, out, s, shared[s // 2], codes)
        return out


class SignedTable(Decoder):
    """Sixteen values, half of them the negatives of the others: a table of eight, and a sign."""

    bits = 4
    meaning = (*range(8, 16), *range(7, -1, -1))
    """With the sign: the code whose weight is the negative."""

    def codes(self) -> Expr:
        return in_tile(threes(Slice(lane_words(4), "word", 0, 3)) + of_registers(word_bits(4, 3)) * 8)

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        return builder.eight(entries[8:])

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        sizes = Eights(3).halves(alu, kind, words[:3], tables)
        return [alu.lop3(alu.shl(words[3], 15 - at), 0x80008000, size, AND_XOR) for at, size in enumerate(sizes)]


class ScaledIntegers(Decoder):
    """scale (code + zero): a code set into the low bits of a half is an integer there, and only the scaling rounds."""

    bits = 4

    def __init__(self, scale: Scalar, zero: Scalar) -> None:
        self.scale, self.zero = scale, zero

    def codes(self) -> Expr:
        code = split(Unpack(split(lane_words(4), "word", jj=2, j1=2), 4, "f", 8), "f", e=2, j0=2, h=2)
        return in_tile(merge(code, "j1", "j0", into="j"))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        shifted = [builder.both(plus(number(by), self.zero)) for by in _OFFSETS[builder.kind]]
        return (builder.both(self.scale), *shifted)

    def halves(
        self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables, shared: Sequence[SharedTable] = ()
    ) -> list[Register]:
        integers = _integers_f16 if kind == "f16" else _integers_bf16
        out = []
        for at in range(16):
            scale, *zeros = tables[at % 2][at // 8]
            out.append(alu.half2("mul", kind, integers(alu, words[at // 4], at % 4, zeros), scale))
        return out


_OFFSETS: dict[Half, tuple[float, ...]] = {"f16": (-1024, -64), "bf16": (0,)}
"""What is added to the zero point, so that adding it also takes off what the code was set into. In bfloat16 the sum
would not be exact."""


def _integers_f16(alu: Alu, word: Register, at: int, zeros: Table) -> Register:
    word = alu.shr(word, 8) if at >= 2 else word
    if at % 2 == 0:
        return alu.half2("add", "f16", alu.lop3(word, 0x000F000F, 0x64006400, AND_OR), zeros[0])
    sixteenfold = alu.lop3(word, 0x00F000F0, 0x64006400, AND_OR)  # 1024 + 16 code
    return alu.half2("fma", "f16", sixteenfold, 0x2C002C00, zeros[1])


def _integers_bf16(alu: Alu, word: Register, at: int, zeros: Table) -> Register:
    code = alu.lop3(alu.shr(word, 4 * at), 0x000F000F, 0x43004300, AND_OR)  # 128 + code
    return alu.half2("add", "bf16", alu.half2("add", "bf16", code, 0xC300C300), zeros[0])


def _two_of_eight(
    alu: Alu, four: Register, fourth: Sequence[Register], s: int, j0: int, table: Table, shared: bool
) -> tuple[Register, Register]:
    """Two registers of weights, from four selectors and, for a table of 16, the word of fourth bits."""
    low, low2, high, high2, *other = table
    lows, highs = alu.prmt(low, low2, four), alu.prmt(high, high2, four)
    if other:
        low3, low4, high3, high4 = other
        upper = alu.prmt(alu.shl(fourth[0], 7 - fourth_bit(s, 4 * j0, shared)), 0, 0xBA98)
        lows = alu.lop3(upper, alu.prmt(low3, low4, four), lows, SELECT)
        highs = alu.lop3(upper, alu.prmt(high3, high4, four), highs, SELECT)
    return _joined(alu, lows, highs)


def _joined(alu: Alu, low: Register, high: Register) -> tuple[Register, Register]:
    """Two pairs of halves, those of j1 = 0 and 1, from low and high bytes of weights (e, j1)."""
    return alu.prmt(low, high, 0x6240), alu.prmt(low, high, 0x7351)


def _put(out: list[Register], s: int, j0: int, pairs: Sequence[Register]) -> None:
    h, jj = divmod(s, 2)
    at = 8 * jj + 2 * j0 + h
    out[at], out[at + 4] = pairs


def _put_loaded(alu: Alu, out: list[Register], s: int, table: SharedTable, codes: Sequence[Register]) -> None:
    """The weights of a run, one by one."""
    loaded = [alu.load(table, code) for code in codes]
    for j0 in range(2):
        first, second = loaded[4 * j0 : 4 * j0 + 2], loaded[4 * j0 + 2 : 4 * j0 + 4]  # e = 0 and 1, each by j1
        _put(out, s, j0, tuple(alu.shl_add(high, 16, low) for low, high in zip(first, second, strict=True)))
