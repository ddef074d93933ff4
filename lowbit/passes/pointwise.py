"""decode[n, k] = f_c(stored elements of row n and of k's group): one weight, for each value c of its code.

A kernel decodes weight by weight. This reading goes through the term at one position (n, k), held as index arrays for
all positions at once, and finds which stored bits are the weight's code and what the weight is for each code value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import assert_never

import numpy as np

from lowbit.ir.dtypes import bits as dtype_bits
from lowbit.ir.dtypes import is_float
from lowbit.ir.expr import (
    Add,
    Bitcast,
    Bucket,
    Call,
    Cast,
    Concat,
    Const,
    Contract,
    Expr,
    Gather,
    Merge,
    Pad,
    Param,
    Slice,
    Split,
    Unpack,
)
from lowbit.ir.walk import params, topo
from lowbit.passes.positions import Position, field_of, moved
from lowbit.passes.positions import UnsuitableError as UnsuitableError
from lowbit.passes.scalar import (
    Element,
    Index,
    Lookup,
    Node,
    Number,
    Product,
    Scalar,
    Step,
    Where,
    elements,
    leaves,
    number,
    plus,
    times,
)

CODE_BITS = 8
"""Most bits of a weight's code."""
COMPUTED_BITS = 4
"""Most bits of one whose values are computed: a table of 16 entries is what byte permutes look up. A table for more
codes is looked up as it is stored, one for each row."""
BITCAST = "bitcast_"
"""How the name of a step begins that takes bytes for something else."""
GRAIN = 32
"""Weights along k that one selector word covers: what is shared by a multiple of it is a parameter, not a code."""


@dataclass(frozen=True)
class Pointwise:
    """What each weight is.

    Attributes:
      codes: the stored fields that make the code, least significant first.
      entries: the weight for each value of the code; or what it is made of with steps and look-ups, which say
        themselves what they do with a code.
    """

    codes: tuple[Element, ...]
    entries: tuple[Scalar, ...]

    @property
    def bits(self) -> int:
        return sum(code_width(c) for c in self.codes)

    @property
    def grain(self) -> int:
        """Consecutive inputs that have one code, where a weight is one expression of it."""
        return self.codes[0].span if self.computed else 1

    @property
    def computed(self) -> bool:
        """Whether the weight is one expression, with steps or look-ups, instead of an entry for each code."""
        return len(self.entries) == 1

    @property
    def float8(self) -> float | None:
        """The factor of a weight that is stored as e4m3, but for a factor; None of any other."""
        sign, node = self.entries[0]
        number, step = (node.a, node.b) if isinstance(node, Product) else (Number(1.0), node)
        if not self.computed or not isinstance(number, Number) or not isinstance(step, Step):
            return None
        return sign * number.value if step.name == f"{BITCAST}e4m3" else None

    @property
    def books(self) -> dict[str, Param]:
        """Tables that all rows share."""
        return {e.table.name: e.table for _, node in self.entries for e in leaves(node) if isinstance(e, Lookup)}

    @property
    def is_table(self) -> bool:
        """Whether the entries are stored, those of a row next to each other: nothing is computed."""
        return len(self.parameters) == len(self.entries) and all(map(_is_of_a_row, self.entries))

    @property
    def parameters(self) -> tuple[Element, ...]:
        """The stored elements that the entries are made of."""
        return tuple(elements(*(node for _, node in self.entries)))


def pointwise(decode: Expr) -> Pointwise:
    """The reading of a decode term with the dims n and k. Raises UnsuitableError with the reason."""
    sizes = decode.dims
    here = {"n": np.arange(sizes["n"])[:, None], "k": np.arange(sizes["k"])[None, :]}
    first = _Reader({})
    weight = first.at(decode, here)
    codes = tuple(first.codes)
    widths = [code_width(c) for c in codes]
    if any(isinstance(e, Step | Lookup) for e in leaves(weight[1])):
        _check_all_are_taken(codes, weight[1])
        return Pointwise(codes, (weight,))
    if not 1 <= sum(widths) <= CODE_BITS:
        raise UnsuitableError(f"a weight's code has {sum(widths)} bits, and a kernel's table takes 1 to {CODE_BITS}")
    entries = []
    for values in product(*(range(1 << w) for w in reversed(widths))):
        reader = _Reader(dict(zip(codes, reversed(values), strict=True)))
        entries.append(reader.at(decode, here))
        if reader.codes.keys() - set(codes):
            raise UnsuitableError("which bits are a weight's code depends on other bits of it")
        if sum(widths) > COMPUTED_BITS and not _is_of_a_row(entries[-1]):
            what = f"a weight's code has {sum(widths)} bits, and with more than {COMPUTED_BITS}"
            raise UnsuitableError(f"{what} its values must be a stored table of its row")
    return Pointwise(codes, tuple(entries))


def _check_all_are_taken(codes: tuple[Element, ...], node: Node) -> None:
    taken: list[Element] = []
    for e in leaves(node):
        taken += e.codes if isinstance(e, Step) else [c for c, _ in e.code] if isinstance(e, Lookup) else []
    if tuple(taken) != codes:
        raise UnsuitableError("its steps and look-ups do not take each field of a code once, in order")
    if len({code.span for code in codes}) > 1:
        raise UnsuitableError("its codes stand for different numbers of inputs")


def _is_of_a_row(entry: Scalar) -> bool:
    sign, node = entry
    return sign > 0 and isinstance(node, Element) and node.span == 0 and is_float(node.leaf.dtype)


def code_width(e: Element) -> int:
    """Bits of a code field."""
    if e.width:
        return e.width
    bounds = e.leaf.bounds
    if bounds is None or bounds[0] < 0:
        raise UnsuitableError(f"codes {e.leaf.name!r} may be negative; store them from 0 up")
    return min(dtype_bits(e.leaf.dtype), bounds[1].bit_length())


@dataclass
class _Reader:
    """Evaluates a term at every position, the codes having the values given (0 if new)."""

    assigned: Mapping[Element, int]
    codes: dict[Element, None] = field(default_factory=dict)

    def at(self, e: Expr, here: Position) -> Scalar:
        match e:
            case Param():
                return self._stored(Element(e, tuple(Where.of(here[d]) for d in e.dims)))
            case Const():
                picked = np.unique(np.broadcast_arrays(e.values[tuple(here[d] for d in e.dims)])[0])
                return number(float(_one(picked, "a constant of the format")))
            case Unpack(x, width, dim, _):
                return self._stored(field_of(x, width * here[dim], width, here))
            case Add(a, b):
                return plus(self.at(a, here), self.at(b, here))
            case Contract():
                return self._contract(e, here)
            case Gather(table, index, dim):
                if isinstance(table, Param) and not _is_of_rows(table, dim, here):
                    return 1, self._lookup(table, index, dim, here)
                if isinstance(index, Param) and all(here[d].shape[0] == 1 for d in index.dims):
                    raise UnsuitableError(f"its inputs are stored in an order of their own, {index.name!r}")
                sign, code = self.at(index, here)
                if not isinstance(code, Number):
                    raise UnsuitableError("an index is made of parameters, not of code bits")
                # Fields may hold more than the codes' range: what no array stores may mean any entry.
                entry = min(max(int(sign * code.value), 0), table.dims[dim] - 1)
                return self.at(table, {**here, dim: np.full((1, 1), entry)})
            case Cast(x, to, rounds):
                if rounds:
                    raise UnsuitableError(f"a step rounds to {to}")
                return self.at(x, here)
            case Split() | Merge() | Slice() | Concat():
                return self.at(*moved(e, here))
            case Call(name, args):
                return 1, self._step(name, args, here)
            case Bitcast(x, dtype, None):
                return 1, self._step(f"{BITCAST}{dtype}", (x,), here)
            case Bitcast() | Bucket() | Pad():
                raise UnsuitableError(f"a step of its decode is a {type(e).__name__}")
            case _:
                assert_never(e)

    def _stored(self, e: Element) -> Scalar:
        if not e.varies[1] or e.span % GRAIN == 0:
            least, most = e.leaf.bounds or (0, 0)
            if e.width:  # lanes would read another number, and here too
                raise UnsuitableError(f"a parameter is {e.width} bits of {e.leaf.name!r}, and kernels take whole words")
            if least < 0 or most >= 1 << 16:
                raise UnsuitableError(f"parameters {e.leaf.name!r} are {least} to {most}, and kernels take 0 to 65535")
            return 1, e
        if is_float(e.leaf.dtype):
            few = f"every {e.span} inputs, not for a multiple of {GRAIN}"
            raise UnsuitableError(f"{e.leaf.name!r} has a value for {few}")
        code_width(e)
        self.codes[e] = None
        return number(self.assigned.get(e, 0))

    def _step(self, name: str, args: tuple[Expr, ...], here: Position) -> Step:
        before = set(self.codes)
        found: list[Element] = []
        for arg in args:
            inside = _Reader({})
            inside.at(arg, here)
            if not (isinstance(arg, Param) and len(inside.codes) == 1):
                raise UnsuitableError(f"the step {name!r} is not of stored codes alone")
            found += inside.codes
        if before & set(found) or len(set(found)) < len(found):
            raise UnsuitableError(f"codes that the step {name!r} takes are used elsewhere")
        self.codes |= dict.fromkeys(found)
        return Step(name, tuple(found))

    def _lookup(self, table: Param, index: Expr, dim: str, here: Position) -> Lookup:
        inside = _Reader({})
        zero = inside.at(index, here)
        if not inside.codes or zero[1] != Number(0.0) or not all(map(_adds_up, topo(index))):
            raise UnsuitableError(f"what is looked up in {table.name!r} is no sum of code bits alone")
        places = []
        for code in inside.codes:
            sign, value = _Reader({code: 1}).at(index, here)
            assert isinstance(value, Number)
            places.append((code, int(sign * value.value)))
        self.codes |= inside.codes
        at = tuple(Where.of(np.zeros((1, 1), np.int64) if d == dim else here[d]) for d in table.dims)
        return Lookup(table, at, list(table.dims).index(dim), tuple(places))

    def _contract(self, e: Contract, here: Position) -> Scalar:
        sizes = {d: n for f in e.factors for d, n in f.dims.items() if d in e.over}
        terms = []
        for values in product(*map(range, sizes.values())):
            there = {**here, **{d: np.full((1, 1), v) for d, v in zip(sizes, values, strict=True)}}
            term = number(1)
            for f in e.factors:
                term = times(term, self.at(f, there))
            terms.append(term)
        if e.ring == "gf2":
            return _parity(terms)
        total = number(0)
        for term in terms:
            total = plus(total, term)
        return total


def _adds_up(e: Expr) -> bool:
    """Whether a step of an index keeps it a sum of code bits, each times a number."""
    if isinstance(e, Contract):
        return e.ring != "gf2" and sum(bool(params(f)) for f in e.factors) < 2
    return not isinstance(e, Gather)


def _is_of_rows(table: Param, looked_up: str, here: Position) -> bool:
    others = [d for d in table.dims if d != looked_up]
    return "n" in others or any(here[d].shape[0] > 1 for d in others)


def _parity(terms: list[Scalar]) -> Scalar:
    values = [node.value for _, node in terms if isinstance(node, Number)]
    if len(values) < len(terms):
        raise UnsuitableError("an xor of parameters")
    return number(sum(map(int, values)) % 2)


def _one(values: Index, what: str) -> float:
    if values.size != 1:
        raise UnsuitableError(f"{what} depends on the weight's position")
    return float(values[0])
