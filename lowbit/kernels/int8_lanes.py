"""Codes in registers as integers of 8 bits: WGMMA's operand A, from the same words that halves are made of.

One permute looks up four weights, and they are a register. In the names of `lowbit.kernels.codes`, its bytes are those
of (e, j1), or (e, j0) of integers that need no look-up. WGMMA gives a lane four inputs that follow each other of every
16, and 32 inputs have two such blocks: j0, or j1. So inputs are in another order, and x is brought into it.

Tables of whole rows come rounded. Those of planes of signs are made for each group as `lowbit.passes.int8_rows` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from lowbit.kernels.alu import AND, SELECT, XOR, Alu, NumpyAlu, Register
from lowbit.kernels.codes import fourth_bit, selector
from lowbit.kernels.decoders import COLUMNS, ROWS, STAGE, Eights, ScaledIntegers, SignedTable, TwoBits
from lowbit.kernels.lanes import LANES, Array, Program, groups_of, row_registers, row_values, words_of_lanes
from lowbit.kernels.pick import scaled_integers
from lowbit.kernels.tables import REVERSED, Builder, is_odd
from lowbit.passes.int8_rows import BELOW, EXPONENT, LEAST
from lowbit.passes.pointwise import UnsuitableError
from lowbit.passes.scalar import Element, Node, Number, Scalar, Sum, elements

IDENTITY = (0x03020100, 0x07060504, 0x0B0A0908, 0x0F0E0D0C)
"""The table of codes that are the weights."""
TO_INTEGER = 1.5 * 2.0**23
"""Added to a small float32, it leaves the integer that is nearest in the low bits."""
LEAST_SPAN = 128
"""Inputs of a group at the least: what WGMMA reads of x in one swizzled row."""


@dataclass(frozen=True)
class Integers:
    """How a stage is decoded to integers, and the factors of its groups.

    Attributes:
      halves: how it is decoded otherwise, from the same words.
    """

    halves: Program

    def __post_init__(self) -> None:
        decoder, weights = self.halves.decoder, self.halves.weights
        if not isinstance(decoder, TwoBits | Eights | SignedTable | ScaledIntegers):
            raise UnsuitableError(f"in 8 bits it decodes codes of 2 to 4 bits, not {type(decoder).__name__}")
        if not (self.affine or weights.is_table or _is_of_signs(weights.entries)):
            raise UnsuitableError("in 8 bits a table is one of a row as it is stored, or of planes of signs alone")
        if any(e.span and e.span < LEAST_SPAN for e in weights.parameters):
            raise UnsuitableError(f"in 8 bits a group has {LEAST_SPAN} inputs at the least")
        if len({e.span for e in weights.parameters}) > 1:
            raise UnsuitableError("its parameters are shared by different numbers of inputs")

    @cached_property
    def affine(self) -> tuple[Element, int, Element | Number] | None:
        """Scale, and the sign and size of what is added to the code, of weights that are a scale times an integer."""
        match scaled_integers(self.halves.weights):
            case ((1, Element() as scale), (sign, Element() | Number() as zero)):
                return scale, sign, zero
            case _:
                return None

    @property
    def of_rows(self) -> bool:
        """Whether tables come rounded, as registers of rows."""
        return self.halves.weights.is_table

    @property
    def table_words(self) -> int:
        """Registers of a rounded table."""
        return len(self.halves.weights.entries) // 4

    @property
    def span(self) -> int:
        """Inputs of a stage that are summed as integers."""
        return min(self.halves.weights.parameters[0].span or STAGE, STAGE)

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Of the dims (j1, j0, q, e) of 32 inputs."""
        return (0, 2, 3, 1) if isinstance(self.halves.decoder, ScaledIntegers) else (1, 2, 3, 0)

    def __call__(
        self, alu: Alu, words: Sequence[Sequence[Register]], *stored: Sequence[Register]
    ) -> tuple[list[list[Register]], list[list[Register]]]:
        """For each group of the stage, its registers in the order of WGMMA's fragments, and its factors of the lane's
        two rows; no factors where tables come rounded.

        Args:
          words: of the lane, array by array.
          stored: the registers of rounded tables, or `halves.inputs`; each for the lane's two rows.
        """
        out, factors = [], []
        for group in range(STAGE // self.span):
            tables = [[register[h] for register in stored] for h in range(2)]
            if not self.of_rows:
                made = [self._table(alu, h, group, stored) for h in range(2)]
                tables = [table for table, _ in made]
                factors.append([factor for _, factor in made])
            tiles = range(group * self.span // COLUMNS, (group + 1) * self.span // COLUMNS)
            out.append([register for tile in tiles for register in self._tile(alu, words, tile, tables)])
        return out, factors

    def _tile(
        self, alu: Alu, words: Sequence[Sequence[Register]], tile: int, tables: Sequence[Sequence[Register]]
    ) -> list[Register]:
        """The 8 registers of 64 inputs."""
        counts = [len(array) * COLUMNS // STAGE for array in words]
        own = [w for count, array in zip(counts, words, strict=True) for w in array[tile * count :][:count]]
        out: list[Register] = [None] * 8
        for s in range(4):
            h, jj = divmod(s, 2)
            pair = self._plain(alu, own, s) if self._needs_no_table else self._looked_up(alu, own, s, tables[h])
            out[4 * jj + h], out[4 * jj + 2 + h] = pair
        return out

    @property
    def _needs_no_table(self) -> bool:
        return isinstance(self.halves.decoder, ScaledIntegers)

    def _plain(self, alu: Alu, words: Sequence[Register], s: int) -> list[Register]:
        h, jj = divmod(s, 2)
        both = words[2 * jj : 2 * jj + 2]
        return [alu.lop3(alu.mul_shr(w, 4) if h else w, 0x0F0F0F0F, 0, AND) for w in both]

    def _looked_up(self, alu: Alu, words: Sequence[Register], s: int, table: Sequence[Register]) -> list[Register]:
        decoder = self.halves.decoder
        base = decoder.base if isinstance(decoder, Eights) else min(decoder.bits, 3)
        codes = selector(alu, words, s, base, min(decoder.bits, 3))
        pair = []
        for j0, four in enumerate((codes, alu.mul_shr(codes, 16))):
            found = alu.prmt(table[0], table[1] if len(table) > 1 else 0, four)
            if len(table) > 2:
                other = alu.prmt(table[2], table[3], four)
                found = alu.lop3(self._fourth(alu, words[3], s, j0), other, found, SELECT)
            pair.append(found)
        return pair

    def _fourth(self, alu: Alu, word: Register, s: int, j0: int) -> Register:
        """The fourth bits of four codes, each spread over its byte."""
        decoder = self.halves.decoder
        if isinstance(decoder, SignedTable):
            h, jj = divmod(s, 2)
            at = 8 * jj + 2 * j0 + h  # that of (e, j1) = (0, 0); j1 counts 4, e 16
            even, odd = (_shifted(alu, word, to - at) for to in (7, 11))
            return alu.prmt(even, odd, 0xFAD8)
        if decoder.shared and s == 3:  # in bits 3 of nibbles, those of even ones brought to the ends of bytes
            return alu.prmt(word, alu.shl(word, 4), (0x9D8C, 0xBFAE)[j0])
        return alu.prmt(alu.shl(word, 7 - fourth_bit(s, 4 * j0, decoder.shared)), 0, 0xBA98)

    def _table(
        self, alu: Alu, h: int, group: int, stored: Sequence[Sequence[Register]]
    ) -> tuple[list[Register], Register]:
        """A group's table of bytes and its factor, float32."""
        inputs, entries = self.halves.inputs, self.halves.weights.entries
        held = {e: reg[h] for (e, g), reg in zip(inputs, stored, strict=True) if g == group % groups_of(e)}
        builder = Builder(alu, self.halves.kind, held)
        if self.affine is not None:
            return list(IDENTITY[: 1 << self.halves.decoder.bits - 2]), builder.node(self.affine[0])
        upper = [(sign, builder.node(node)) for sign, node in entries[len(entries) // 2 :]]
        largest = reduce(alu.add_sizes, map(builder.node, elements(entries[0][1])))  # of all signs alike, in order
        power = alu.f32("mul", alu.larger(largest, alu.number(LEAST)), alu.number(float(BELOW)))
        power = alu.lop3(power, EXPONENT, 0, AND)
        inverse = alu.sub(alu.number(2.0**127), power)  # the exponents add up to 254
        scales = {1: inverse, -1: alu.lop3(inverse, 1 << 31, 0, XOR)}
        if len(entries) == 4:
            upper = [(-sign, x) for sign, x in reversed(upper)] + upper
        bytes_ = [alu.f32("fma", x, scales[sign], alu.number(TO_INTEGER)) for sign, x in upper]
        words = [_packed(alu, bytes_[at : at + 4]) for at in range(0, len(bytes_), 4)]
        factor = alu.f32("add", power, alu.f32("sub", largest, largest))  # NaN if the largest is no number
        return self._with_negatives(alu, words), factor

    def _with_negatives(self, alu: Alu, words: list[Register]) -> list[Register]:
        """The whole table from the second half of an odd one, or from all of one of four."""
        if self.halves.decoder.bits == 2:
            return words
        if isinstance(self.halves.decoder, SignedTable):
            return words + [_negated(alu, w) for w in words]
        return [_negated(alu, alu.prmt(w, 0, REVERSED)) for w in reversed(words)] + words


def _packed(alu: Alu, four: Sequence[Register]) -> Register:
    """The low bytes of four registers."""
    a, b, c, d = four
    return alu.prmt(alu.prmt(a, b, 0x0040), alu.prmt(c, d, 0x0040), 0x5410)


def _negated(alu: Alu, word: Register) -> Register:
    """Of bytes from -127 on. With signs the other way round, 256 less such a byte is from 1 on, and nothing carries."""
    return alu.lop3(alu.sub(alu.lop3(word, 0x7F7F7F7F, 0, XOR), 0xFEFEFEFF), 0x80808080, 0, XOR)


def _shifted(alu: Alu, word: Register, by: int) -> Register:
    return alu.shl(word, by) if by >= 0 else alu.mul_shr(word, -by)


def _is_of_signs(entries: Sequence[Scalar]) -> bool:
    """Whether each entry is a sum of the same parameters, each plus or minus, and as many are."""
    same = {tuple(elements(node)) for _, node in entries}
    return len(same) == 1 and len(entries) == 1 << len(same.pop()) and is_odd(entries) and all(map(_adds, entries))


def _adds(entry: Scalar) -> bool:
    def of(node: Node) -> bool:
        return isinstance(node, Element) or (isinstance(node, Sum) and of(node.a) and of(node.b))

    return of(entry[1])


def in_numpy(program: Integers, words: Sequence[Array], *stored: Array) -> tuple[Array, Array]:
    """The integers i8 [ROWS, STAGE] of a stage, and the factors f32 [groups, ROWS], ones where tables come rounded.

    Args:
      words: array by array u32 [word, LANES], in memory order.
      stored: registers of rounded tables, u32 [ROWS] each; or each of `halves.inputs`, [ROWS].
    """
    lane_words = [list(words_of_lanes(w)) for w in words]
    groups, factors = program(NumpyAlu(), lane_words, *map(row_registers, stored))
    registers = np.stack([np.broadcast_to(r, LANES) for group in groups for r in group])
    by_dim = registers.astype("<u4").view(np.int8).reshape(-1, 2, 4, 8, 4, 4)  # block of 16, h, warp, r, q, input
    matrix = np.ascontiguousarray(by_dim.transpose(2, 1, 3, 0, 4, 5)).reshape(ROWS, -1)
    if program.of_rows:
        return matrix, np.ones((len(groups), ROWS), np.float32)
    return matrix, np.stack([row_values([np.broadcast_to(r, LANES) for r in f]) for f in factors]).view(np.float32)
