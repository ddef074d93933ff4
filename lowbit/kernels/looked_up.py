"""What tables of partial sums hold in place of weights, and where a lane's codes point into them.

Vectors   what x makes of each vector of a book of them           CodeGEMM (NeurIPS 2025)
Signs     8 inputs of x added up with each choice of their signs  LUT-GEMM (ICLR 2024)

Their tables are for QUADS vectors of inputs at a time, one for each lane of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

from lowbit.kernels.alu import AND_OR, XOR, Alu, Register
from lowbit.kernels.computed import QUADS, Books, field
from lowbit.kernels.decoders import COLUMNS, RUN, STAGE
from lowbit.kernels.lanes import LANES, Program, at_once
from lowbit.passes.pointwise import Pointwise, UnsuitableError
from lowbit.passes.scalar import Element, Node, Scalar, Sum, negated, plus

WORD = 4
"""Words that a lane loads or stores at once."""
AT_ONCE = LANES // QUADS
"""Entries of a table that a warpgroup makes at a time."""
XOR3, DIFFER = 0x96, 0x28
"""Truth tables of a ^ b ^ c and (a ^ b) & c."""
Part = Callable[[int, int], list[Register]]
"""The lane's vector of a span of one row of x."""


@dataclass(frozen=True)
class Look:
    """One look-up of a lane.

    Attributes:
      span, half: for which inputs, and which of the lane's rows.
      book, entry: in which table, and where there.
      sign: 1.0 or -1.0; None for 1.
      scale: which of the scales is that of what is found.
    """

    span: int
    half: int
    book: int
    entry: Register
    sign: Register | None
    scale: int


class Source(Protocol):
    """
    Attributes:
      grain: inputs of a vector.
      books: tables for the same inputs.
      entries: of a table.
      words: of a lane, for as many inputs as one table is made for at once.
      scales: one for each `Look.scale`; none if all are 1.
      vectors: shape of the books, in float32; empty without any.
      looks_a_vector: look-ups of a row for one vector of inputs.
      instructions: for a look-up, beside one for each row of x, about.
    """

    grain: int
    books: int
    entries: int
    words: int
    scales: Sequence[Element]
    vectors: tuple[int, ...]
    looks_a_vector: int
    instructions: int

    def looks(self, alu: Alu, words: Sequence[Register]) -> Iterator[Look]: ...
    def made(
        self, alu: Alu, lane: Register, x: Part, spans: int, columns: int, memory: Any
    ) -> Iterator[tuple[int, int, int, list[Register]]]:
        """(span, book, first, sums): for each row of x, entry `first` + lane / QUADS."""


def source(program: Program) -> Source:
    """Raises UnsuitableError for weights that are not looked up so."""
    return Vectors(program) if isinstance(program.decoder, Books) else Signs(program)


class Vectors(Source):
    instructions = 4

    def __init__(self, program: Program) -> None:
        assert isinstance(program.decoder, Books)
        self.decoder = decoder = program.decoder
        self.grain, self.books, self.entries = decoder.grain, len(decoder.lookups), decoder.shape[1]
        self.words = at_once(program.words[0])
        self.scales = () if decoder.scale is None else (decoder.scale,)
        self.vectors, self.looks_a_vector = (self.books, self.entries, self.grain), self.books
        if 32 * self.words % (2 * decoder.bits) or 16 * self.words // decoder.bits % 2:
            what = f"{decoder.bits} bits for {self.grain} inputs"
            raise UnsuitableError(f"{what} do not fill {self.words} words of a lane with an even number of codes a row")
        if self.entries < AT_ONCE or self.grain < WORD:
            shape = f"{self.entries} vectors of {self.grain}"
            raise UnsuitableError(f"tables of sums are for at least {AT_ONCE} vectors of {WORD} and more, not {shape}")

    def looks(self, alu: Alu, words: Sequence[Register]) -> Iterator[Look]:
        at = 0
        for t in range(16 * len(words) // self.decoder.bits):
            for h in range(2):
                for book, width in enumerate(self.decoder.widths):
                    yield Look(t, h, book, field(alu, words, at, width), None, 0)
                    at += width

    def made(
        self, alu: Alu, lane: Register, x: Part, spans: int, columns: int, memory: Any
    ) -> Iterator[tuple[int, int, int, list[Register]]]:
        parts = [[x(t, m) for m in range(columns)] for t in range(spans)]
        entry = alu.mad(alu.shr(lane, 2), 4 * self.grain, memory[1])
        for first in range(0, self.entries, AT_ONCE):
            for book in range(self.books):
                vector = loaded(alu, memory, entry, self.grain, 4 * self.grain * (book * self.entries + first))
                for t in range(spans):
                    yield t, book, first, [_dot(alu, part, vector) for part in parts[t]]


class Signs(Source):
    """Of T[~c] = -T[c], the codes c with their top bit clear are kept: 128 of 256 entries."""

    grain, books, entries, instructions = 8, 1, 128, 8
    vectors: tuple[int, ...] = ()

    def __init__(self, program: Program) -> None:
        self.bits, self.scales = program.weights.bits, planes(program.weights)
        self.offset = len(self.scales) > self.bits
        if program.nested:
            raise UnsuitableError("its words hold the planes of several widths")
        if self.bits == 4 and self.offset:
            raise UnsuitableError("with an offset, words of four planes are those of two tables")
        self.words, self.looks_a_vector = program.words[0], len(self.scales)

    def looks(self, alu: Alu, words: Sequence[Register]) -> Iterator[Look]:
        for tile in range(STAGE // COLUMNS):
            for s, run in enumerate(_runs(alu, words[tile * self.bits :][: self.bits])):
                h, jj = divmod(s, 2)
                t = COLUMNS // RUN * tile + jj
                for p, ((entries, signs), byte) in enumerate(run):
                    sign = alu.prmt(signs, 0x80, byte << 12 | 0x455)  # 1.0 or -1.0
                    yield Look(t, h, 0, alu.prmt(entries, 0, 0x4440 + byte), sign, p)
                if self.offset:  # the plain sum is that of code 255
                    yield Look(t, h, 0, alu.number(0.0), alu.number(-1.0), self.bits)

    def made(
        self, alu: Alu, lane: Register, x: Part, spans: int, columns: int, memory: Any
    ) -> Iterator[tuple[int, int, int, list[Register]]]:
        del memory
        bits = [alu.shl(lane, 29 - i) for i in range(5)]  # of the entry, each at the sign of a float
        for t in range(spans):
            every = [_doubled(alu, bits, x(t, m)) for m in range(columns)]
            for i in range(self.entries // AT_ONCE):
                yield t, 0, AT_ONCE * i, [sums[i] for sums in every]


def _doubled(alu: Alu, bits: Sequence[Register], x: Sequence[Register]) -> list[Register]:
    """With signs of the first inputs from the lane, and the last one minus; each of the others doubles the sums."""
    own = [alu.lop3(bit, 0x80000000, value, 0xA6) for bit, value in zip(bits, x, strict=False)]  # (~a & b) ^ c
    made = [alu.f32("sub", added(alu, own), x[-1])]
    for value in x[len(bits) : -1]:
        made = [alu.f32(op, a, value) for op in ("sub", "add") for a in made]
    return made


def _runs(alu: Alu, words: Sequence[Register]) -> list[list[tuple[tuple[Register, Register], int]]]:
    """For each run of 8 weights and each plane: registers of four entries and of their signs, and which of the four.

    Bit 2 j + e of a byte is the sign of input 8 j + 2 q + e of the run (`lowbit.kernels.decoders`).
    """
    if len(words) == 1:
        made = _apart(alu, _swapped(alu, words[0], 15, 0x0000AAAA))
        return [[(made, s)] for s in range(4)]
    bytes_ = [_swapped(alu, _swapped(alu, word, 14, 0x0000CCCC), 7, 0x00AA00AA) for word in words[:3]]
    if len(words) == 2:
        two = [_apart(alu, b) for b in bytes_]
        return [[(two[s // 2], 2 * (s % 2) + p) for p in range(2)] for s in range(4)]
    top = []
    if len(words) == 4:  # a sign word: where it is set, the other planes are turned, and the last is clear
        turned = _swapped(alu, words[3], 15, 0x0000AAAA)
        bytes_ = [alu.lop3(b, alu.prmt(turned, 0, 0x3000 + 0x111 * s), 0, XOR) for s, b in enumerate(bytes_)]
        last = _apart(alu, alu.lop3(turned, 0, 0, 0x0F))
        top = [[(last, s)] for s in range(4)]
    three = [_apart(alu, b) for b in bytes_]
    runs = [[(three[s], p) if s < 3 else (three[p], 3) for p in range(3)] for s in range(4)]
    return [run + more for run, more in zip(runs, top or [[]] * 4, strict=True)]


def _swapped(alu: Alu, a: Register, distance: int, mask: int) -> Register:
    """With the bits of `mask` and those so far above them exchanged."""
    differ = alu.lop3(alu.shr(a, distance), a, mask, DIFFER)
    return alu.lop3(a, differ, alu.shl(differ, distance), XOR3)


def _apart(alu: Alu, codes: Register) -> tuple[Register, Register]:
    """Four bytes of codes as entries of the half that is kept, and as the first bytes of 1.0 or -1.0."""
    negative = alu.prmt(codes, 0, 0xBA98)
    return alu.lop3(codes, negative, 0x7F7F7F7F, DIFFER), alu.lop3(codes, 0x80808080, 0x3F3F3F3F, AND_OR)


def planes(weights: Pointwise) -> list[Element]:
    """The scales of weights that are sums of signed ones, and the offset if they have one, which is added to that."""
    if weights.computed:
        raise UnsuitableError("its weights are no sums of vectors from codebooks, nor of scales with signs")
    terms = [(1, node) for node in _terms(weights.entries[-1][1])]
    scales = [node for _, node in terms if isinstance(node, Element)]
    if len(scales) != len(terms) or [*map(_made(terms, weights.bits), range(1 << weights.bits))] != [*weights.entries]:
        raise UnsuitableError("its weights are no sums of vectors from codebooks, nor of scales with signs")
    return scales


def _made(terms: Sequence[Scalar], bits: int) -> Callable[[int], Scalar]:
    def entry(code: int) -> Scalar:
        signed = [term if p >= bits or code >> p & 1 else negated(term) for p, term in enumerate(terms)]
        return reduce(plus, signed)

    return entry


def _terms(node: Node) -> list[Node]:
    return [*_terms(node.a), node.b] if isinstance(node, Sum) and not node.minus else [node]


def loaded(alu: Alu, memory: Any, address: Register, count: int, behind: int) -> list[Register]:
    """Words of shared memory, a multiple of WORD."""
    parts = (alu.load_words(memory, address, WORD, behind + 4 * i) for i in range(0, count, WORD))
    return [word for part in parts for word in part]


def _dot(alu: Alu, a: Sequence[Register], b: Sequence[Register]) -> Register:
    return added(alu, [alu.f32("mul", x, y) for x, y in zip(a, b, strict=True)])


def added(alu: Alu, values: Sequence[Register]) -> Register:
    return reduce(lambda a, b: alu.f32("add", a, b), values)
