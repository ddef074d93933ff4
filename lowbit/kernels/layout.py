"""The layout that the kernels read: a format's codes as words in fragment order, its parameters by tiles of rows.

    words   u32 [row tile, stage, word, lane]           codes of STAGE inputs by ROWS outputs, vectors of 4 words a lane
    leaf    [row tile, group, element, ROWS]            for each leaf that parameters come from, in its own dtype

What is read at several widths has the codes of the least one in `words`, and in `words5` the fifth bit of each code.
Rows are padded to whole tiles for every warpgroup, inputs to whole stages, with zeros. Moving there and back is
derived from the reading of single weights and from the decoder's own term; `lowbit.kernels.arrange` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from math import ceil, prod
from typing import Any

import numpy as np

from lowbit.ir.build import param
from lowbit.ir.dtypes import numpy_dtype
from lowbit.ir.expr import Expr, Param
from lowbit.ir.walk import params
from lowbit.kernels.alu import Half
from lowbit.kernels.decoders import ROWS, STAGE, Decoder
from lowbit.kernels.int8_lanes import Integers
from lowbit.kernels.lanes import LANES, Program, by_leaf
from lowbit.passes.pointwise import COMPUTED_BITS, Pointwise, UnsuitableError, code_width, pointwise
from lowbit.passes.scalar import Element, Where

WORDS = "words"
WARPGROUPS = 2
"""That compute in a kernel, each on a tile of rows."""
SMS = 132
Array = np.ndarray[Any, Any]


@lru_cache(maxsize=1024)
def layout(*readings: Expr) -> Layout:
    """The layout of a format at a size, given its decode terms: one, or one for each width from the least.

    Raises UnsuitableError with the reason why there is none.
    """
    weights = tuple(map(pointwise, readings))
    for fewer, more in pairwise(weights):
        if more.codes[: len(fewer.codes)] != fewer.codes:
            raise UnsuitableError(f"its codes of {more.bits} bits do not begin with those of {fewer.bits}")
    first = readings[0]
    made = Layout(first.dims["n"], first.dims["k"], weights)
    _check_widths(made)
    made.check_decoded()
    if made.as_stored:
        _check_rows_of_bytes(made)
    elif taken := params(*readings).keys() & set(made.words):
        raise UnsuitableError(f"it stores {min(taken)!r} of its own")
    for name, elements in made.leaves.items():
        span = elements[0].span
        if any(e.span != span for e in elements):
            raise UnsuitableError(f"{name!r} is shared by {sorted({e.span for e in elements})} inputs in turn")
        if span and STAGE % span and span % STAGE:
            raise UnsuitableError(f"groups of {span} inputs do not line up with {STAGE} inputs at a time")
    if lost := params(*readings).keys() - {*made.code_bits, *made.homes, *made.books}:  # and no entry of those is lost
        raise UnsuitableError(f"{min(lost)!r} is part of no weight, and would be lost")
    return made


def _check_widths(made: Layout) -> None:
    """That what is stored for the largest width is what the others read."""
    if not made.nested:
        return
    if made.books or len({w.computed for w in made.weights}) > 1:
        raise UnsuitableError("it has a look-up of all rows, or a step, and widths that are read in other ways")
    if made.bits > COMPUTED_BITS and not made.as_stored and not made.shared:
        raise UnsuitableError(f"weights of {COMPUTED_BITS} bits are computed, and those of more are stored in tables")
    for weights in made.weights:
        for name, own in by_leaf(weights).items():
            if made.leaves[name][: len(own)] != tuple(own):
                raise UnsuitableError(f"entries of {name!r} are read in another order at another width")


def _check_rows_of_bytes(made: Layout) -> None:
    everywhere = Where.of(np.arange(made.n)[:, None]), Where.of(np.arange(made.k)[None])
    for e in made.codes:
        if e.at != everywhere:
            raise UnsuitableError(f"bytes of {e.leaf.name!r} are not stored in the order of the weights")
        if tuple(e.leaf.dims.items()) != (("n", made.n), ("k", made.k)) or e.leaf.dtype != "u8":
            raise UnsuitableError(f"its codes {e.leaf.name!r} are {e.leaf.type}, not u8[n={made.n} k={made.k}]")
    if made.leaves:
        raise UnsuitableError(f"its steps have {', '.join(made.leaves)} beside the bytes")


@dataclass(frozen=True)
class Layout:
    """How arrays of one format and size are arranged.

    Attributes:
      n, k: outputs and inputs.
      weights: what each weight is, at each width.
    """

    n: int
    k: int
    weights: tuple[Pointwise, ...]

    @property
    def codes(self) -> tuple[Element, ...]:
        return self.weights[-1].codes

    @property
    def bits(self) -> int:
        """Of a code, at the largest width."""
        return self.weights[-1].bits

    @property
    def first(self) -> int:
        """Bits of the code at the least width."""
        return self.weights[0].bits

    @property
    def words(self) -> dict[str, int]:
        """The arrays of codes, and the bits of each code in them."""
        if self.as_stored:
            return {e.leaf.name: code_width(e) for e in self.codes}
        more = {f"{WORDS}{b.bits}": b.bits - a.bits for a, b in pairwise(self.weights)}
        return {WORDS: self.first, **more}

    @property
    def as_stored(self) -> bool:
        """Whether codes are bytes that kernels read row by row, as the format stores them."""
        return self.weights[-1].computed and not self.books

    def arrays(self, weights: Pointwise) -> int:
        """How many arrays of codes a product at that width reads."""
        return len(weights.codes) if self.as_stored else 1 + self.weights.index(weights)

    @property
    def books(self) -> dict[str, Param]:
        """Tables that all rows share, which stay as they are."""
        return {name: leaf for weights in self.weights for name, leaf in weights.books.items()}

    @property
    def starts(self) -> Array:
        """The inputs with which codes begin."""
        return np.arange(0, self.k, self.weights[0].grain)

    def program(self, kind: Half, at: int = 0) -> Program:
        """How weights are decoded at one of the widths."""
        weights = self.weights[at]
        arrays = tuple(self.words.values())[: self.arrays(weights)]
        return Program(weights, kind, arrays, self.nested, self.shared)

    def integers(self, at: int = 0) -> Integers:
        """How weights are decoded to integers of 8 bits. Raises UnsuitableError with the reason why they are not."""
        return Integers(self.program("f16", at))

    def check_decoded(self, at: int = -1) -> None:
        """Raises UnsuitableError where no decoder makes halves of the weights at one of the widths."""
        _ = self.program("f16", at).decoder  # made here, and that raises

    def read(self, at: int = 0) -> list[str]:
        """The fields that a product at one of the widths reads, words first."""
        weights = self.weights[at]
        return [*self.words_read(at), *by_leaf(weights), *weights.books]

    def words_read(self, at: int = 0) -> list[str]:
        return list(self.words)[: self.arrays(self.weights[at])]

    @property
    def nested(self) -> bool:
        return len(self.weights) > 1

    @property
    def shared(self) -> bool:
        """Whether all tables of 16 entries and more are stored, one for each row."""
        return all(w.is_table for w in self.weights if w.bits >= COMPUTED_BITS)

    @property
    def tiles(self) -> int:
        """Of ROWS outputs."""
        return WARPGROUPS * ceil(self.n / (ROWS * WARPGROUPS))

    @property
    def stages(self) -> int:
        return ceil(self.k / STAGE)

    @cached_property
    def decoder(self) -> Decoder:
        """That at the largest width, whose words include those of all others."""
        return self.program("f16", -1).decoder

    @cached_property
    def leaves(self) -> dict[str, tuple[Element, ...]]:
        """Parameters by the leaf that stores them."""
        out: dict[str, dict[Element, None]] = {}
        for weights in self.weights:
            for name, elements in by_leaf(weights).items():
                out[name] = out.get(name, {}) | dict.fromkeys(elements)
        return {name: tuple(elements) for name, elements in out.items()}

    @cached_property
    def fields(self) -> dict[str, Param]:
        """What is stored."""
        if self.as_stored:
            return {name: param(name, "u8", t=self.tiles, r=ROWS, k=self.stages * STAGE) for name in self.words}
        counts = self.program("f16", -1).words
        out = {
            name: param(name, "u32", t=self.tiles, s=self.stages, w=count, l=LANES)
            for name, count in zip(self.words, counts, strict=True)
        }
        for name, elements in self.leaves.items():
            leaf = elements[0].leaf
            sizes = {"t": self.tiles, "g": self.groups(elements[0]), "e": len(elements), "r": ROWS}
            out[name] = Param(name, tuple(sizes.items()), leaf.dtype, leaf.within)
        return out | self.books

    def groups(self, e: Element) -> int:
        """Groups of a parameter along the padded inputs."""
        return ceil(self.stages * STAGE / e.span) if e.span else 1

    def place(self, e: Element) -> Place:
        """Where an element is stored, input by input."""
        axes = [i for i, w in enumerate(e.at) if w.shape[0] > 1]
        if self.n == 1:
            axes = [i for i, dim in enumerate(e.leaf.dims) if dim == "n"]
        sizes = list(e.leaf.dims.values())
        rows = np.arange(self.n)[:, None]
        if len(axes) != 1 or sizes[axes[0]] != self.n or not np.array_equal(e.at[axes[0]].values, rows):
            raise UnsuitableError(f"{e.leaf.name!r} has no dim that is that of the weight's rows")
        if e.shift is not None and e.shift.shape[0] > 1:
            raise UnsuitableError(f"which bits of {e.leaf.name!r} are a weight's depends on its row")
        axis, column = axes[0], np.zeros(self.k, np.int64)
        for i, where in enumerate(e.at):
            if i != axis:
                column = column * sizes[i] + where.values[0]
        shift = np.zeros(self.k, np.int64) if e.shift is None else e.shift.values[0] + np.zeros(self.k, np.int64)
        return Place(axis, prod(sizes) // self.n, column, shift)

    @cached_property
    def homes(self) -> dict[str, Array]:
        """For each parameter leaf, entry by entry of a row: where it is in [group, element]."""
        out = {}
        for name, elements in self.leaves.items():
            starts = np.arange(self.groups(elements[0])) * elements[0].span
            starts = starts[starts < self.k]
            home = np.full(self.place(elements[0]).entries, -1)
            for i, e in enumerate(elements):
                home[self.place(e).column[starts]] = np.arange(starts.size) * len(elements) + i
            if (home < 0).any():
                raise UnsuitableError(f"some entries of {name!r} are part of no weight, and would be lost")
            out[name] = home
        return out

    @cached_property
    def code_bits(self) -> dict[str, Array]:
        """For each code leaf, [entry of a row, bit]: which bit of the row's codes it is, k first; -1 for padding."""
        out: dict[str, Array] = {}
        below = 0
        for e in self.codes:
            place = self.place(e)
            word = numpy_dtype(e.leaf.dtype).itemsize * 8
            bits = out.setdefault(e.leaf.name, np.full((place.entries, word), -1))
            for b in range(code_width(e)):
                at = place.column[self.starts], place.shift[self.starts] + b
                bits[at] = np.arange(len(self.starts)) * self.bits + below + b
            below += code_width(e)
        used = sum(int((bits >= 0).sum()) for bits in out.values())
        if used != len(self.starts) * self.bits:
            raise UnsuitableError("weights share code bits")
        return out


@dataclass(frozen=True)
class Place:
    """Where an element is stored.

    Attributes:
      axis: of its leaf, that counts rows.
      entries: of the leaf in a row.
      column: which of them, for each input; the other axes flattened.
      shift: its first bit.
    """

    axis: int
    entries: int
    column: Array
    shift: Array
