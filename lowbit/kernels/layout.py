"""The layout that the kernels read: a format's codes as words in fragment order, its parameters by tiles of rows.

    words   u32 [row tile, stage, word, lane]           codes of STAGE inputs by ROWS outputs, vectors of 4 words a lane
    leaf    [row tile, group, element, ROWS]            for each leaf that parameters come from, in its own dtype

Rows are padded to whole tiles for every warpgroup, inputs to whole stages, with zeros. Moving there and back is
derived from the reading of single weights and from the decoder's own term; `lowbit.kernels.arrange` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import Any

import numpy as np

from lowbit.ir.build import param
from lowbit.ir.dtypes import numpy_dtype
from lowbit.ir.expr import Expr, Param
from lowbit.ir.walk import params
from lowbit.kernels.decoders import COLUMNS, ROWS, Decoder
from lowbit.kernels.lanes import LANES, STAGE
from lowbit.kernels.pick import pick
from lowbit.passes.pointwise import Pointwise, UnsuitableError, code_width, pointwise
from lowbit.passes.scalar import Element

WORDS = "words"
WARPGROUPS = 2
"""That compute in a kernel, each on a tile of rows."""
Array = np.ndarray[Any, Any]


@lru_cache(maxsize=1024)
def layout(decode: Expr) -> Layout:
    """The layout of a format at a size. Raises UnsuitableError with the reason why there is none."""
    weights = pointwise(decode)
    if WORDS in params(decode):
        raise UnsuitableError(f"it stores {WORDS!r} of its own")
    made = Layout(decode.dims["n"], decode.dims["k"], weights)
    for name, elements in made.leaves.items():
        span = elements[0].span
        if any(e.span != span for e in elements):
            raise UnsuitableError(f"{name!r} is shared by {sorted({e.span for e in elements})} inputs in turn")
        if span and STAGE % span and span % STAGE:
            raise UnsuitableError(f"groups of {span} inputs do not line up with {STAGE} inputs at a time")
    if lost := params(decode).keys() - {*made.code_bits, *made.homes}:  # and no entry of those is lost
        raise UnsuitableError(f"{min(lost)!r} is part of no weight, and would be lost")
    return made


@dataclass(frozen=True)
class Layout:
    """How arrays of one format and size are arranged.

    Attributes:
      n, k: outputs and inputs.
      weights: what each weight is.
    """

    n: int
    k: int
    weights: Pointwise

    @property
    def tiles(self) -> int:
        """Of ROWS outputs."""
        return WARPGROUPS * ceil(self.n / (ROWS * WARPGROUPS))

    @property
    def stages(self) -> int:
        return ceil(self.k / STAGE)

    @cached_property
    def decoder(self) -> Decoder:
        return pick(self.weights)

    @cached_property
    def leaves(self) -> dict[str, tuple[Element, ...]]:
        """Parameters by the leaf that stores them."""
        out: dict[str, tuple[Element, ...]] = {}
        for e in self.weights.parameters:
            out[e.leaf.name] = (*out.get(e.leaf.name, ()), e)
        return out

    @cached_property
    def fields(self) -> dict[str, Param]:
        """What is stored."""
        words = self.decoder.bits * STAGE // COLUMNS
        out = {WORDS: param(WORDS, "u32", t=self.tiles, s=self.stages, w=words, l=LANES)}
        for name, elements in self.leaves.items():
            leaf = elements[0].leaf
            sizes = {"t": self.tiles, "g": self.groups(elements[0]), "e": len(elements), "r": ROWS}
            out[name] = Param(name, tuple(sizes.items()), leaf.dtype, leaf.within)
        return out

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
        below = used = 0
        for e in self.weights.codes:
            place = self.place(e)
            word = numpy_dtype(e.leaf.dtype).itemsize * 8
            bits = out.setdefault(e.leaf.name, np.full((place.entries, word), -1))
            for b in range(code_width(e)):
                bits[place.column, place.shift + b] = np.arange(self.k) * self.weights.bits + below + b
            below += code_width(e)
        used = sum(int((bits >= 0).sum()) for bits in out.values())
        if used != self.k * self.weights.bits:
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
