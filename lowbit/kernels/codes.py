"""Where codes lie in the words of a lane, as terms: the codes [n, k] of a tile of u32 [word, warp, r, q]; and the lane
programs that gather them.

`lowbit.kernels.decoders` names the dims. Codes that permutes look up come as the nibbles of a selector.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.ir.build import const, contract, merge, param, split
from lowbit.ir.expr import Concat, Expr, Slice, Unpack
from lowbit.kernels.alu import AND, AND_OR, Alu, Register


def lane_words(count: int) -> Expr:
    return param("words", "u32", word=count, warp=4, r=8, q=4)


def word_bits(count: int, at: int) -> Expr:
    """Those of one word of `count`, along the dim f."""
    return Unpack(Slice(lane_words(count), "word", at, at + 1), 1, "f", 32).sum("word")


def in_tile(e: Expr) -> Expr:
    return merge(merge(e, "warp", "h", "r", into="n"), "jj", "j", "q", "e", into="k")


def of_registers(bits: Expr) -> Expr:
    """Bit 2 j + h + 16 e belongs to half e of register 2 j + h."""
    return split(bits, "f", e=2, jj=2, j=4, h=2)


def nested(bits: int, base: int, shared: bool) -> Expr:
    """Codes of which the first `base` words have the first bits, and every further word one more."""
    words = lane_words(bits)
    code = (_plane, pairs, threes)[base - 1](Slice(words, "word", 0, base))
    for at in range(base, bits):
        one = Slice(words, "word", at, at + 1)
        code = code + (_plane(one) if at != 3 else _fourth(one) if shared else _mask_plane(one)) * (1 << at)
    return code


def pairs(words: Expr) -> Expr:
    """2 bits: a byte of a word has the codes of weight (j0, e) of two runs, for two j1."""
    return _nibbles(split(Unpack(split(words, "word", h=2), 2, "f", 16), "f", j0=2, e=2, j1=2, jj=2))


def threes(words: Expr) -> Expr:
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


def _fourth(word: Expr) -> Expr:
    """1 bit: of runs 0 to 2 in the bytes of their look-ups, of run 3 in bit 3 of its nibbles."""
    fields = split(Unpack(word, 1, "f", 32).sum("word"), "f", byte=4, nibble=2, bit=4)
    masks = split(merge(Slice(fields, "bit", 0, 3), "nibble", "bit", into="m"), "m", s=3, j0=2)
    nibbles = split(split(Slice(fields, "bit", 3, 4), "bit", s=1), "nibble", j1=2)
    code = Concat((split(masks, "byte", e=2, j1=2), split(nibbles, "byte", j0=2, e=2)), "s")
    return _nibbles(split(code, "s", h=2, jj=2))


def fourth_bit(s: int, i: int, shared: bool) -> int:
    """Where nibble i of run s has its fourth bit."""
    if shared and s == 3:
        return 4 * i + 3
    j0, in_bytes = divmod(i, 4)
    at = 2 * s + j0
    return 8 * in_bytes + (4 * (at // 3) + at % 3 if shared else at)


def _nibbles(code: Expr) -> Expr:
    """Nibble (j0, e, j1) of a run's selector is that of input 2 j + e of its lane, j = 2 j1 + j0."""
    return merge(code, "j1", "j0", into="j")


def selector(alu: Alu, words: Sequence[Register], s: int, base: int, bits: int) -> Register:
    """The first bits of a run's eight codes as nibbles; their bit 3 is clear."""
    if base == 1:
        return nibbles(alu, words[:bits], s)
    if base == 2:
        codes = alu.lop3(alu.mul_shr(words[s // 2], 2) if s % 2 else words[s // 2], 0x33333333, 0, AND)
        return nibbles(alu, words[2:bits], s, codes, 2)
    if s < 3:
        return alu.lop3(words[s], 0x77777777, 0, AND)
    low = alu.lop3(alu.mul_shr(words[0], 3), 0x11111111, 0, AND)
    middle = alu.lop3(alu.mul_shr(words[1], 2), 0x22222222, low, AND_OR)
    return alu.lop3(alu.mul_shr(words[2], 1), 0x44444444, middle, AND_OR)


def nibbles(
    alu: Alu, planes: Sequence[Register], s: int, codes: Register | None = None, filled: int = 0
) -> Register | None:
    """A run's bits of some planes as nibbles, beside the bits that are filled."""
    for at, word in enumerate(planes, filled):
        bit, mask = moved(alu, word, s, at), 0x11111111 << at
        codes = alu.lop3(bit, mask, 0, AND) if codes is None else alu.lop3(bit, mask, codes, AND_OR)
    return codes


def moved(alu: Alu, a: Register, source: int, target: int) -> Register:
    """Shifted so that a bit gets from one place to the other."""
    return alu.mul_shr(a, source - target) if source > target else alu.shl(a, target - source)
