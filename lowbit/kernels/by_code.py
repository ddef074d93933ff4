"""Sums over inputs by their codes: what the gradients of a weight's parameters are made of.

With G = dy^T x, the gradient of the dense weight, and weights f_c(parameters) for codes c with bits c_i: every f_c is a
polynomial of these bits, f_c = sum_A t_A prod_{i in A} c_i over sets A of bits, and so

  dL/dt_A = the sum of G over those inputs of a group whose codes have every bit of A.

Binary coding and whole numbers times a scale have sets of at most one bit, a stored table has them all. A lane has the
codes of its own entries of G: accumulators lie as WGMMA's operand A of halves does, whose order words are stored in.

Weights from tables of all rows have at most one parameter of their row, a scale. Its gradient is the sum of G times
what they are without it, decoded as for a product. Those of the tables are no sums of a row: see
`lowbit.kernels.buckets`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, reduce
from math import gcd
from random import Random
from typing import Any

import numpy as np

from lowbit.kernels.alu import AND_XOR, Alu, Bit, NumpyAlu, Register
from lowbit.kernels.computed import Books
from lowbit.kernels.decoders import COLUMNS, ROWS, STAGE
from lowbit.kernels.lanes import LANES, Program, row_values, words_of_lanes
from lowbit.passes.pointwise import COMPUTED_BITS, UnsuitableError
from lowbit.passes.relayout import bit_positions
from lowbit.passes.scalar import Element, Scalar, elements, evaluated, negated, plus

Array = np.ndarray[Any, Any]
QUARTET = (1, 2)
"""Lanes that share a row differ in these bits."""
DECODED = 4
"""Instructions for a weight that is looked up, converted, and multiplied by its entry of G."""


@dataclass(frozen=True)
class CodeSums:
    """The sums of a stage that a program's parameters need.

    Raises UnsuitableError where there are none of a row, or too many.
    """

    program: Program

    def __post_init__(self) -> None:
        weights = self.program.weights
        if not weights.parameters:
            books = f": {min(weights.books)!r} is a table of all rows" if weights.books else ""
            raise UnsuitableError(f"its weights have no parameters of their rows{books}")
        if weights.bits > COMPUTED_BITS and not weights.computed:
            raise UnsuitableError(f"its codes have {weights.bits} bits, and it sums for at most {COMPUTED_BITS}")

    @property
    def span(self) -> int:
        """Inputs that are summed together: of one group of every parameter."""
        return gcd(STAGE, *(e.span for e in self.program.weights.parameters))

    @property
    def spans(self) -> int:
        """Of a stage."""
        return STAGE // self.span

    @cached_property
    def odd(self) -> bool:
        """Whether the last bit of a stored code is a sign."""
        entries = self._stored
        half = len(entries) // 2
        return entries[half:] == [negated(e) for e in entries[:half]]

    @cached_property
    def entries(self) -> list[Scalar]:
        """The weight for each stored code without its sign."""
        return self._stored[: len(self._stored) // (1 + self.odd)]

    @cached_property
    def unscaled(self) -> Program | None:
        """Where G is multiplied by weights: how these are decoded."""
        decoder, weights = self.program.decoder, self.program.weights
        if not isinstance(decoder, Books):
            return None
        lookups: list[Scalar] = [(1, lookup) for lookup in decoder.lookups]
        entry = reduce(plus, lookups)
        return replace(self.program, weights=replace(weights, entries=(entry,)))

    @property
    def _stored(self) -> list[Scalar]:
        if self.unscaled:
            return [(1, e) for e in self.program.weights.parameters]
        meaning = self.program.decoder.meaning or range(1 << self.program.weights.bits)
        return [self.program.weights.entries[code] for code in meaning]

    @cached_property
    def subsets(self) -> tuple[int, ...]:
        """The sets A with a t_A that depends on parameters: it differs, without rounding, for two random choices."""
        random, parameters = Random(0), elements(*(node for _, node in self.entries))
        draws = [{e: Fraction(random.getrandbits(60)) for e in parameters} for _ in range(2)]
        terms = [polynomial([evaluated(e, draw.__getitem__, Fraction) for e in self.entries]) for draw in draws]
        return tuple(subset for subset, (a, b) in enumerate(zip(*terms, strict=True)) if a != b)

    @property
    def instructions(self) -> int:
        """Those that an entry of G takes: a sign, tests of bits, additions, and choices of what several sets share."""
        if self.unscaled:
            return DECODED
        bits = self.program.weights.bits - self.odd
        shared = {subset & (1 << at) - 1 for subset in self.subsets for at in range(bits) if subset >> at == 1}
        return 2 * self.odd + bits + len(self.subsets) + len(shared - {0})

    def terms(self, stored: Mapping[Element, Any]) -> list[Any]:
        """t_A of each of the subsets for these parameters."""
        terms = polynomial([evaluated(e, stored.__getitem__) for e in self.entries])
        return [terms[subset] for subset in self.subsets]

    @cached_property
    def places(self) -> Array:
        """[row half, j, e, bit]: where a lane has the bits of its codes of a tile, counted through its words."""
        if self.unscaled:
            return np.zeros((2, COLUMNS // 8, 2, 0), np.int64)
        at = bit_positions(self.program.decoder.codes(), self.program.weights.bits)
        first = at.reshape(ROWS, COLUMNS // 8, 4, 2, -1)[:16:8, :, 0]  # of lane 0
        word, bit = np.divmod(first, 32)
        return word // LANES * 32 + bit

    def __call__(
        self, alu: Alu, at: int, g: Sequence[Register], words: Sequence[Sequence[Register]]
    ) -> list[tuple[Register, Register]]:
        """For each of the subsets, the sums of a lane's two rows.

        Args:
          at: which span of the stage.
          g: accumulators in WGMMA's order, (2 j + h) 2 + e.
          words: of the lane, array by array; none where `g` was multiplied by the weights.
        """
        halves: list[list[Register]] = []
        for h in range(2):
            totals: dict[int, Register] = dict.fromkeys(self.subsets, alu.number(0.0))
            for j in range(at * self.span // 8, (at + 1) * self.span // 8):
                tile = self._words_of_tile(words, j // 8)
                for e in range(2):
                    self._add(alu, totals, g[2 * (2 * j + h) + e], tile, self.places[h, j % 8, e])
            for by in QUARTET:
                totals = {a: alu.f32("add", total, alu.across(total, by)) for a, total in totals.items()}
            halves.append(list(totals.values()))
        return list(zip(*halves, strict=True))

    def _words_of_tile(self, words: Sequence[Sequence[Register]], tile: int) -> list[Register]:
        counts = [len(array) * COLUMNS // STAGE for array in words]
        return [w for count, array in zip(counts, words, strict=True) for w in array[tile * count :][:count]]

    def _add(
        self, alu: Alu, totals: dict[int, Register], value: Register, words: Sequence[Register], places: Array
    ) -> None:
        """Adds one entry of G to the sums that its code belongs to."""
        at = [divmod(int(place), 32) for place in places]
        if self.odd:
            word, bit = at.pop()
            value = alu.lop3(alu.shl(words[word], 31 - bit), 0x80000000, value, AND_XOR)
        bits: list[Bit] = [alu.bit(words[word], bit) for word, bit in at]
        kept = {0: value}

        def with_all(subset: int) -> Register:
            """The entry if its code has all these bits, and zero otherwise."""
            if subset not in kept:
                last = subset.bit_length() - 1
                kept[subset] = alu.where(bits[last], with_all(subset ^ 1 << last))
            return kept[subset]

        for subset, total in totals.items():
            if not subset:
                totals[subset] = alu.f32("add", total, value)
                continue
            last = subset.bit_length() - 1
            totals[subset] = alu.add_where(bits[last], total, with_all(subset ^ 1 << last))


def polynomial(values: Sequence[Any]) -> list[Any]:
    """The coefficients t_A of a function of bits that has these values: t_A = sum of (-1)^|A - B| f(B) over B in A."""
    terms = list(values)
    for bit in range(len(terms).bit_length() - 1):
        for subset in range(len(terms)):
            if subset >> bit & 1:
                terms[subset] = terms[subset] - terms[subset ^ 1 << bit]
    return terms


def in_numpy(sums: CodeSums, at: int, g: Array, words: Sequence[Array]) -> list[Array]:
    """The sums of one span, f32 [ROWS] for each of the subsets.

    Args:
      g: f32 [ROWS, STAGE].
      words: array by array, as `lanes.in_numpy` has them.
    """
    words_of_g = np.ascontiguousarray(g, np.float32).view(np.uint32)
    by_dim = words_of_g.reshape(4, 2, 8, STAGE // 8, 4, 2)  # warp, h, r, j, q, e
    registers = by_dim.transpose(3, 1, 5, 0, 2, 4).reshape(-1, LANES)
    made = sums(NumpyAlu(), at, list(registers), [list(words_of_lanes(w)) for w in words])
    return [row_values(pair).view(np.float32) for pair in made]
