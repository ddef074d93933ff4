"""Ways to decode codes in registers, each a lane program: from words of codes to halves as WGMMA's A operand.

A tile is 64 rows by 64 inputs: 128 lanes with 32 weights each. Lane l of warp w holds, in register 2 j + h as halves
e = 0, 1, the weight of row 16 w + 8 h + l / 4 and input 8 j + 2 (l % 4) + e (PTX ISA, wgmma fragments). Its codes of b
bits lie in b words. Which bit of which word holds which code is stated as a term, the code's own decode expression.
In these terms a lane is (warp, r, q), an input (jj, j, q, e) with jj = 32 inputs, and s = (h, jj) one of four runs of
8 weights of a lane.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from lowbit.ir.build import const, contract, merge, param, split
from lowbit.ir.expr import Concat, Expr, Slice, Unpack
from lowbit.kernels.alu import AND, AND_OR, AND_XOR, SELECT, XOR, Alu, Half, Register
from lowbit.kernels.tables import Builder, is_odd
from lowbit.passes.scalar import Scalar, number, plus

ROWS = COLUMNS = 64
RUN = 32
"""Inputs that share a table at the least."""
Table = Sequence[Register]
Tables = Sequence[Sequence[Table]]
"""By row half, then by run of 32 inputs."""


class Decoder(Protocol):
    """One way to decode: `bits` words a lane and tile."""

    bits: int
    meaning: tuple[int, ...]
    """What a stored code stands for."""

    def codes(self) -> Expr:
        """The stored codes [n, k] of a tile, as a term over its words u32 [word, warp, r, q]."""

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        """The registers in which a row's weights of one group are looked up."""

    def halves(self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables) -> list[Register]:
        """The 16 registers of a tile."""


class OneBit:
    """Two values: the bit, spread over a half, picks one. Of +a and -a it is the sign."""

    bits = 1
    meaning = tuple(range(2))

    def codes(self) -> Expr:
        return _tile(_of_registers(_bits(1, 0)))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        zero = builder.both(entries[0])
        return (zero,) if is_odd(entries) else (zero, builder.alu.lop3(zero, builder.both(entries[1]), 0, XOR))

    def halves(self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables) -> list[Register]:
        out = []
        for at in range(16):
            bit = alu.shl(words[0], 15 - at)
            zero, *difference = tables[at % 2][at // 8]
            if difference:
                out.append(alu.lop3(alu.prmt(bit, 0, 0xBB99), difference[0], zero, AND_XOR))
            else:
                out.append(alu.lop3(bit, 0x80008000, zero, AND_XOR))
        return out


class TwoBits:
    """Four values: one permute finishes a pair of weights, its selector made by one multiplication for four."""

    bits = 2
    meaning = tuple(range(4))

    def codes(self) -> Expr:
        return _tile(_pairs(_words(2)))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        return builder.four(entries)

    def halves(self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables) -> list[Register]:
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
                out[at + 2] = alu.prmt(low, high, alu.high_half(selector))
        return out


class Eights:
    """Any values of up to 4 bits: a permute looks up one byte of four weights in a table of eight. A fourth bit picks
    one of two tables, spread over the bytes of the look-ups.

    The first `base` words of a lane are those of a decoder of as many bits; every further word has one bit of each of
    its weights, so that a code is read at several widths.
    """

    def __init__(self, bits: int, base: int = 3) -> None:
        self.bits, self.base = bits, base
        self.meaning = tuple(range(1 << bits))

    def codes(self) -> Expr:
        return _tile(nested_codes(self.bits, self.base))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        eights = (entries[i : i + 8] for i in range(0, len(entries), 8))
        return tuple(reg for eight in eights for reg in builder.eight([*eight, *eight[:1] * (8 - len(eight))]))

    def halves(self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables) -> list[Register]:
        out: list[Register] = [None] * 16
        for s in range(4):
            h, jj = divmod(s, 2)
            codes = selector(alu, words, s, self.base, min(self.bits, 3))
            for half, four in enumerate((codes, alu.high_half(codes))):
                low, low2, high, high2, *other = tables[h][jj]
                lows, highs = alu.prmt(low, low2, four), alu.prmt(high, high2, four)
                if other:
                    low3, low4, high3, high4 = other
                    upper = alu.prmt(alu.shl(words[3], 7 - 2 * s - half), 0, 0xBA98)
                    lows = alu.lop3(upper, alu.prmt(low3, low4, four), lows, SELECT)
                    highs = alu.lop3(upper, alu.prmt(high3, high4, four), highs, SELECT)
                _put(out, s, half, _joined(alu, lows, highs))
        return out


class SignedTable:
    """Sixteen values, half of them the negatives of the others: a table of eight, and a sign."""

    bits = 4
    meaning = (*range(8, 16), *range(7, -1, -1))
    """With the sign: the code whose weight is the negative."""

    def codes(self) -> Expr:
        return _tile(_threes(Slice(_words(4), "word", 0, 3)) + _of_registers(_bits(4, 3)) * 8)

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        return builder.eight(entries[8:])

    def halves(self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables) -> list[Register]:
        sizes = Eights(3).halves(alu, kind, words[:3], tables)
        return [alu.lop3(alu.shl(words[3], 15 - at), 0x80008000, size, AND_XOR) for at, size in enumerate(sizes)]


class ScaledIntegers:
    """scale (code + zero): a code set into the low bits of a half is an integer there, and only the scaling rounds."""

    bits = 4
    meaning = tuple(range(16))

    def __init__(self, scale: Scalar, zero: Scalar) -> None:
        self.scale, self.zero = scale, zero

    def codes(self) -> Expr:
        code = split(Unpack(split(_words(4), "word", jj=2, j1=2), 4, "f", 8), "f", e=2, j0=2, h=2)
        return _tile(merge(code, "j1", "j0", into="j"))

    def table(self, builder: Builder, entries: Sequence[Scalar]) -> Table:
        shifted = [builder.both(plus(number(by), self.zero)) for by in _OFFSETS[builder.kind]]
        return (builder.both(self.scale), *shifted)

    def halves(self, alu: Alu, kind: Half, words: Sequence[Register], tables: Tables) -> list[Register]:
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


def _words(count: int) -> Expr:
    return param("words", "u32", word=count, warp=4, r=8, q=4)


def _bits(count: int, at: int) -> Expr:
    """Those of one word of `count`, along the dim f."""
    return Unpack(Slice(_words(count), "word", at, at + 1), 1, "f", 32).sum("word")


def _tile(e: Expr) -> Expr:
    return merge(merge(e, "warp", "h", "r", into="n"), "jj", "j", "q", "e", into="k")


def _of_registers(bits: Expr) -> Expr:
    """Bit 2 j + h + 16 e belongs to half e of register 2 j + h."""
    return split(bits, "f", e=2, jj=2, j=4, h=2)


def nested_codes(bits: int, base: int) -> Expr:
    """Codes of which the first `base` words have the first bits, and every further word one more."""
    words = _words(bits)
    code = (_plane, _pairs, _threes)[base - 1](Slice(words, "word", 0, base))
    for at in range(base, bits):
        one = Slice(words, "word", at, at + 1)
        code = code + (_plane(one) if at < 3 else _mask_plane(one)) * (1 << at)
    return code


def _pairs(words: Expr) -> Expr:
    """2 bits: a byte of a word has the codes of weight (j0, e) of two runs, for two j1."""
    return _nibbles(split(Unpack(split(words, "word", h=2), 2, "f", 16), "f", j0=2, e=2, j1=2, jj=2))


def _threes(words: Expr) -> Expr:
    """3 bits: nibbles of three words are the codes of runs 0, 1 and 2, and the nibbles' bits 3 are those of run 3."""
    fields = split(Unpack(words, 1, "f", 32), "f", j0=2, e=2, j1=2, bit=4)
    own = split(Slice(fields, "bit", 0, 3), "word", s=3)
    fourth = split(split(Slice(fields, "bit", 3, 4), "bit", s=1), "word", bit=3)
    code = contract((Concat((own, fourth), "s"), const([1, 2, 4], "i32", "bit")), ("bit",))
    return _nibbles(split(code, "s", h=2, jj=2))


def _plane(word: Expr) -> Expr:
    """1 bit: bit s of a nibble is that of run s, where selectors have their nibble."""
    return _nibbles(split(Unpack(word, 1, "f", 32), "f", j0=2, e=2, j1=2, h=2, jj=2).sum("word"))


def _mask_plane(word: Expr) -> Expr:
    """1 bit: bit 2 s + j0 of a byte, where the looked-up bytes of four weights have theirs."""
    return _nibbles(split(Unpack(word, 1, "f", 32), "f", e=2, j1=2, h=2, jj=2, j0=2).sum("word"))


def _nibbles(code: Expr) -> Expr:
    """Nibble (j0, e, j1) of a run's selector is that of input 2 j + e of its lane, j = 2 j1 + j0."""
    return merge(code, "j1", "j0", into="j")


def selector(alu: Alu, words: Sequence[Register], s: int, base: int, bits: int) -> Register:
    """The first bits of a run's eight codes as nibbles; their bit 3 is clear."""
    if base == 3:
        return _of_threes(alu, words, s)
    codes, first = None, 0
    if base == 2:
        codes, first = alu.lop3(alu.shr(words[s // 2], 2 * (s % 2)), 0x33333333, 0, AND), 2
    for at in range(first, bits):
        bit = alu.shl(words[at], at - s) if at > s else alu.shr(words[at], s - at)
        codes = alu.lop3(bit, 0x11111111 << at, 0 if codes is None else codes, AND if codes is None else AND_OR)
    return codes


def _of_threes(alu: Alu, words: Sequence[Register], s: int) -> Register:
    if s < 3:
        return alu.lop3(words[s], 0x77777777, 0, AND)
    low = alu.lop3(alu.shr(words[0], 3), 0x11111111, 0, AND)
    middle = alu.lop3(alu.shr(words[1], 2), 0x22222222, low, AND_OR)
    return alu.lop3(alu.shr(words[2], 1), 0x44444444, middle, AND_OR)


def _joined(alu: Alu, low: Register, high: Register) -> tuple[Register, Register]:
    """Two pairs of halves, those of j1 = 0 and 1, from low and high bytes of weights (e, j1)."""
    return alu.prmt(low, high, 0x6240), alu.prmt(low, high, 0x7351)


def _put(out: list[Register], s: int, j0: int, pairs: tuple[Register, Register]) -> None:
    h, jj = divmod(s, 2)
    at = 8 * jj + 2 * j0 + h
    out[at], out[at + 4] = pairs
