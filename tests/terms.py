"""Random well-typed terms, and random arrays for their leaves; numpy only, for tests/null and tests/jax alike.

A term is read off one string of bytes: a single draw keeps thousands of terms cheap, and hypothesis shrinks bytes well
because byte 0, also what is read past the end, is always the simplest choice. Names are few on purpose, so that bound,
free, merged and looked-up dims clash all the time, also with names that a renaming would invent (`c_1`).

Leaves hold small multiples of 1/2 and operators only multiply and add them, so float64 computes every value exactly and
two equal terms must give *equal* arrays, in whatever order they sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import TypeVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from lowbit.ir import (
    Bitcast,
    Bucket,
    Call,
    CallSpec,
    Concat,
    Const,
    Contract,
    DimError,
    DType,
    Expr,
    Gather,
    Merge,
    Pad,
    Param,
    Slice,
    Split,
    Type,
    Unpack,
    add,
    cast,
    const,
    contract,
    params,
    register_call,
)
from lowbit.ir.dtypes import is_float, numpy_dtype

EXAMPLES = min(5 * settings().max_examples, 2000)
"""Terms that each pass is compared on: 300 in `make test`, in `make test-all` the 2,000 that docs/passes.md states."""
SIZES = {"m": 2, "n": 3, "g": 2, "j": 4, "v": 8, "p": 2, "c": 4, "k": 8, "c_1": 4, "g_1": 2}
NAMES = tuple(SIZES)
LIMIT = 512
"""Elements of an array, so that a term takes well under a millisecond."""

register_call(
    "reverse",  # a step along a dim that its type does not show
    CallSpec(
        type=lambda t: Type(t.dims, t.dtype, t.bounds),
        oracle=lambda v: v[..., ::-1],
        operations=lambda t: prod(t.dims.values()),
        xla=lambda v: v[..., ::-1],
        bound=lambda v, bound: bound[..., ::-1],
    ),
)

T = TypeVar("T")


class Source:
    """Choices, read off bytes."""

    def __init__(self, data: bytes, wide: bool) -> None:
        self.data, self.at, self.wide = data, 0, wide

    def below(self, n: int) -> int:
        self.at += 1
        return self.data[self.at - 1] % n if self.at <= len(self.data) else 0

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def some(self, options: Iterable[T]) -> list[T]:
        options = list(options)
        mask = self.below(256) if options else 0
        return [o for i, o in enumerate(options) if mask >> i & 1]

    def names(self, most: int = 3) -> list[str]:
        return list(dict.fromkeys(self.pick(NAMES) for _ in range(self.below(most + 1))))


# ---------------------------------------------------------------- leaves


def leaf(dtype: DType, names: Iterable[str], within: tuple[int, int] | None = None, **more: int) -> Param:
    """A Param named after its type, so that equal names are equal leaves and leaves recur."""
    shape = {**{k: SIZES[k] for k in names}, **more}
    span = "" if within is None else f"_{within[0]}_{within[1]}".replace("-", "m")
    return Param(f"{dtype}{span}_" + "_".join(f"{k}{n}" for k, n in shape.items()), tuple(shape.items()), dtype, within)


def float_leaf(s: Source, depth: int = 0) -> Expr:
    return leaf(s.pick(("f32", "f16", "f32", "bf16", "e4m3", "e5m2") + (("f64",) if s.wide else ())), s.names())


def word_leaf(s: Source) -> Param:
    dtype, within = s.pick(
        (("u8", None), ("u8", (0, 3)), ("u8", (2, 13)), ("u16", None), ("u16", (0, 15)), ("u32", None), ("u8", None))
    )
    return leaf(dtype, s.names(), within)


def int_leaf(s: Source, depth: int = 0) -> Expr:
    dtype, within = s.pick(
        (("u8", (0, 1)), ("i8", (-3, 5)), ("u8", None), ("u8", (0, 3)), ("i32", (-20, 20)), ("u16", (0, 15)))
    )
    return leaf(dtype, s.names(), within)


def table(s: Source, dtype: DType, names: Iterable[str]) -> Const:
    """A Const of small values; dims beyond 256 entries are left out."""
    shape: dict[str, int] = {}
    for k in names:
        if prod(shape.values()) * SIZES[k] <= 256:
            shape[k] = SIZES[k]
    values = np.random.default_rng(s.below(16)).integers(0 if dtype[0] == "u" else -2, 3, list(shape.values()))
    return const(values, dtype, *shape)


# ---------------------------------------------------------------- making operands fit each other


def meet(operands: Iterable[Expr]) -> list[Expr]:
    """The operands, with dims that clash in size or make the product too large summed away."""
    out: list[Expr] = []
    dims: dict[str, int] = {}
    for x in operands:
        gone = {k for k, n in x.dims.items() if dims.get(k, n) != n}
        for k in list(x.dims):
            if prod({**dims, **{d: n for d, n in x.dims.items() if d not in gone}}.values()) > LIMIT:
                gone.add(k)
        x = total(x, gone)
        dims.update(x.dims)
        out.append(x)
    return out


def total(x: Expr, over: Iterable[str]) -> Expr:
    if not over:
        return x
    return contract((x,), over) if factor(x) is x else factor(x)


def factor(x: Expr) -> Expr:
    """`x`, or if its integers could leave the exact range of a product, a Const."""
    return x if x.bounds is None or max(map(abs, x.bounds)) <= 1 << 10 else const(3, "i32")


def free_name(s: Source, taken: Iterable[str]) -> str:
    taken = set(taken)
    return s.pick([k for k in (*NAMES, "t", "u", "w", "x", "y", "z") if k not in taken])


# ---------------------------------------------------------------- operators


def product(s: Source, depth: int) -> Expr:
    first = real(s, depth)
    factors = [first, *(s.pick((real, integer))(s, depth) for _ in range(s.below(3)))]
    if s.below(4) == 1:
        factors.append(first)
    factors = meet(map(factor, factors))
    over = s.some({k: None for f in factors for k in f.dims})
    acc: DType = "f64" if any(f.dtype == "f64" for f in factors) or (s.wide and s.below(8) == 1) else "f32"
    if s.below(3) == 1:  # nested as it stands, as a parsed term may be
        return Contract(tuple(factors), frozenset(over), "real", acc)
    return contract(factors, over, acc=acc)


def int_product(s: Source, depth: int) -> Expr:
    factors = meet(map(factor, (integer(s, depth) for _ in range(1 + s.below(3)))))
    over = s.some({k: None for f in factors for k in f.dims})
    return contract(factors, over)


def xor(s: Source, depth: int) -> Expr:
    factors = [bit_of(f) for f in meet(bit(s, depth) for _ in range(1 + s.below(3)))]
    return contract(factors, s.some({k: None for f in factors for k in f.dims}), "gf2")


def sum_of(s: Source, depth: int) -> Expr:
    a, b = meet((real(s, depth), s.pick((real, integer))(s, depth)))
    return add(a, factor(b))


def int_sum(s: Source, depth: int) -> Expr:
    a, b = meet(map(factor, (integer(s, depth), integer(s, depth))))
    return add(cast(a, "i32"), cast(b, "i32"))


def lookup(s: Source, depth: int) -> Expr:
    """A gather whose table has batch dims, dims of its own, or is computed."""
    index = index_of(s, depth)
    dim = free_name(s, index.dims)
    size = index.bounds[1] + 1 + s.below(2) if index.bounds else 1
    own = [k for k in s.names(2) if k != dim and index.dims.get(k, SIZES[k]) == SIZES[k]]
    while own and (prod({**index.dims, **{k: SIZES[k] for k in own}}.values()) > LIMIT or size * 8 ** len(own) > 2048):
        own = own[:-1]
    t: Expr = leaf(s.pick(("f32", "f16", "bf16")), own, **{dim: size})
    if size <= 16 and s.below(3) == 1:
        other = real(s, depth)
        keep = {k for k, n in other.dims.items() if k in own}
        t = contract((t, *meet((t, total(other, other.dims.keys() - keep)))[1:]), ())
    return Gather(t, index, dim)


def index_of(s: Source, depth: int) -> Expr:
    """A small non-negative integer term."""
    kind = s.below(4)
    if kind == 0:
        return leaf("u8", s.names(2), (0, 3))
    if kind == 1:
        return bits(s)
    if kind == 2:  # joined digits
        width = s.pick((1, 2))
        fields = Unpack(leaf(s.pick(("u8", "u16")), s.names(2)), width, "q", 2)
        return contract((fields, const(s.pick(([1, 1 << width], [4, 1])), "i32", "q")), ("q",))
    x = integer(s, depth)
    return x if x.bounds and 0 <= x.bounds[0] and x.bounds[1] < 64 else leaf("u8", s.names(2), (1, 6))


def bits(s: Source) -> Expr:
    word = word_leaf(s)
    width = s.pick((1, 1, 2, 4))
    most = np.iinfo(numpy_dtype(word.dtype)).bits // width
    dim = free_name(s, word.dims)
    return Unpack(word, width, dim, min(most, SIZES.get(dim, 3)))


def bit(s: Source, depth: int) -> Expr:
    x = s.pick((int_leaf, lambda s, _: bits(s), lambda s, _: table(s, "u8", s.names(2)), integer))(s, depth)
    return bit_of(x)


def bit_of(x: Expr) -> Expr:
    """`x` if it is a bit; else bits made of it."""
    if x.bounds and 0 <= x.bounds[0] and x.bounds[1] <= 1:
        return x
    names = [k for k in x.dims if SIZES.get(k) == x.dims[k]]
    return leaf("u8", names[:2], (0, 1))


def bucketed(s: Source, depth: int) -> Expr:
    x, index = real(s, depth), index_of(s, 0)
    index, x = meet((index, x))
    if not (index.bounds and 0 <= index.bounds[0] and index.bounds[1] < 16):
        index = leaf("u8", [k for k in index.dims if SIZES.get(k) == index.dims[k]], (0, 3))
    assert index.bounds is not None
    over = s.some({**index.dims, **x.dims})
    kept = {k for k in (*index.dims, *x.dims) if k not in over}
    return Bucket(x, index, free_name(s, {*index.dims, *kept}), index.bounds[1] + 1, frozenset(over))


def rounded(s: Source, depth: int) -> Expr:
    """Casts: exact for integers in range, rounding for sums."""
    x = factor(s.pick((real, integer))(s, depth))
    return cast(x, s.pick(("f32", "bf16", "f32", "f16") + (("f64",) if s.wide else ())))


def bitcast(s: Source, depth: int) -> Expr:
    names = [k for k in s.names(2) if k != "p"]
    return s.pick(
        (
            Bitcast(leaf("u8", names, (0x30, 0x48)), "e4m3"),
            Bitcast(leaf("u16", names, (0x3800, 0x4200)), "f16"),
            cast(Bitcast(leaf("u8", names), "i8"), "f32"),
        )
    )


def int_bitcast(s: Source, depth: int) -> Expr:
    names = [k for k in s.names(2) if k != "p"]
    joined = leaf("u8", names, (0, 9), **{k: 2 for k in ("p",)})
    return s.pick(
        (
            Bitcast(leaf("u8", names), "i8"),
            Bitcast(joined, "u16", "p"),
            Bitcast(leaf("u16", names), "u8", "p"),
            Bitcast(leaf("f16", names), "u8", "p"),
            Bitcast(leaf("f32", names), "u32"),
        )
    )


def reshaped(x: Expr, s: Source) -> Expr:
    """One of the nodes that only move elements; `x` itself when its dims allow none of them."""
    options = [move(x, s, dim) for dim in list(x.dims)[:3] for move in (_merge, _split, _slice, _pad, _concat, _call)]
    options = [e for e in options if prod(e.dims.values()) <= LIMIT]
    return s.pick([x, *options])


def _merge(x: Expr, s: Source, dim: str) -> Expr:
    parts = list(dict.fromkeys((dim, s.pick(list(x.dims)))))[:: s.pick((1, -1))]
    return Merge(x, tuple(parts), free_name(s, x.dims.keys() - set(parts)))


def _split(x: Expr, s: Source, dim: str) -> Expr:
    outer = s.pick([n for n in range(1, x.dims[dim] + 1) if x.dims[dim] % n == 0])
    a = free_name(s, x.dims.keys() - {dim})
    if outer == 1:
        return Split(x, dim, ((a, x.dims[dim]),))
    b = free_name(s, {*x.dims, a} - {dim} | {a})
    return Split(x, dim, ((a, outer), (b, x.dims[dim] // outer)))


def _slice(x: Expr, s: Source, dim: str) -> Expr:
    start = s.below(x.dims[dim])
    return Slice(x, dim, start, start + 1 + s.below(x.dims[dim] - start))


def _pad(x: Expr, s: Source, dim: str) -> Expr:
    return Pad(x, dim, s.below(2), 1 + s.below(2))


def _concat(x: Expr, s: Source, dim: str) -> Expr:
    parts = [x, Slice(x, dim, 0, 1), *([] if s.below(2) else [x])]
    return Concat(tuple(parts[:: s.pick((1, -1))]), dim)


def _call(x: Expr, s: Source, dim: str) -> Expr:
    return Call("reverse", (x,))


# ---------------------------------------------------------------- terms

Make = Callable[[Source, int], Expr]

REAL: tuple[Make, ...] = (
    float_leaf, product, product, product, sum_of, lookup, lookup, bucketed, rounded, bitcast,
    lambda s, depth: reshaped(real(s, depth), s),
    lambda s, depth: reshaped(reshaped(real(s, depth), s), s),
    lambda s, depth: table(s, s.pick(("f32", "f16")), s.names()),
)  # fmt: skip
INTEGER: tuple[Make, ...] = (
    int_leaf, int_product, int_sum, xor, int_bitcast,
    lambda s, depth: bits(s),
    lambda s, depth: bits(s) * 2 + -1,
    lambda s, depth: reshaped(integer(s, depth), s),
    lambda s, depth: table(s, s.pick(("i32", "i8", "u8")), s.names()),
)  # fmt: skip


def real(s: Source, depth: int) -> Expr:
    return s.pick(REAL)(s, depth - 1) if depth > 0 else float_leaf(s)


def integer(s: Source, depth: int) -> Expr:
    try:
        return s.pick(INTEGER)(s, depth - 1) if depth > 0 else int_leaf(s)
    except DimError as err:
        if "holds" not in str(err):  # sums that outgrow i32; nothing else may be ill-typed here
            raise
        return int_leaf(s)


def terms(depth: int = 3, *, wide: bool = True) -> st.SearchStrategy[Expr]:
    """Any float term; `wide` allows float64."""
    return st.binary(min_size=72, max_size=72).map(lambda data: real(Source(data, wide), depth))


def matmuls(*, wide: bool = False) -> st.SearchStrategy[Expr]:
    """A product of an activation with the decode of some weight: the terms that the passes are for."""
    return st.binary(min_size=40, max_size=40).map(lambda data: _matmul(Source(data, wide)))


def _matmul(s: Source) -> Expr:
    n = s.pick(("n", "n", "c", "c_1"))
    w = s.pick((_planes, _xor_planes, _affine, _digits, _codebook, _row_table, _joined))(s, n)
    if s.below(3) == 1:
        w = w + leaf(s.pick(("f16", "f32")), ("g",), **{n: 3})
    k = s.pick(("k", "k", "g", "v", "j"))
    if s.below(2):
        w = _cut(s, Merge(w, ("j", "v"), "t"), "t")
        w = _cut(s, Merge(w, ("g", "t"), k), k)
    else:
        w = _cut(s, Merge(w, ("g", "j", "v"), k), k)
    m = s.pick([d for d in ("m", "g", "j", "v", "p", "c", "g_1") if d not in (k, n)])
    x: Expr = leaf("f32", (), **{m: 2, k: w.dims[k]})
    if s.below(4) == 1:
        x = x + leaf("f16", (), **{k: w.dims[k]})
    y = contract((x, w) if s.below(4) else (x, w, leaf("f16", (), **{k: w.dims[k]})), s.pick(((k,), (k,), (k, n))))
    return y if s.below(4) else reshaped(y, s)


def ordered(*, wide: bool = False) -> st.SearchStrategy[Expr]:
    """Products with a weight whose inputs are stored in another order, and what their gradients are made of."""
    return st.binary(min_size=40, max_size=40).map(lambda data: _ordered(Source(data, wide)))


def _ordered(s: Source) -> Expr:
    w = Merge(s.pick((_planes, _affine, _codebook, _row_table, _joined))(s, "n"), ("g", "j", "v"), "place")
    size = w.dims["place"]
    order = leaf("u8", (), (0, s.below(size)), k=5)
    looked_up, m = Gather(w, order, "place"), s.pick(("m", "g", "j", "p", "c"))
    x, dy = leaf("f32", (), **{m: 2}, k=5), leaf("f32", (), **{m: 2}, n=3)
    by_inputs = (x, leaf("f16", (), k=5)) if s.below(2) else (x,)
    pulled = contract((*by_inputs, dy), (m,) if s.below(4) else ())
    return s.pick(
        (
            contract((*by_inputs, looked_up), ("k",)),
            contract((dy, looked_up), ("n",)),
            Bucket(pulled, order, s.pick(("place", "n_1", "q")), size, frozenset("k")),
        )
    )


def _cut(s: Source, w: Expr, dim: str) -> Expr:
    return w if s.below(2) else Slice(w, dim, 0, max(1, w.dims[dim] - 1 - s.below(3)))


def _words(n: str, *names: str, planes: int = 2) -> Param:
    return leaf("u8", (), **{n: 3}, **{k: planes if k == "p" else 2 for k in names})


def _planes(s: Source, n: str) -> Expr:
    sign = Unpack(_words(n, "p", "g", "j", planes=2 + s.below(2)), 1, "v", 8) * 2 + -1
    alpha = leaf("f16", (), p=sign.dims["p"], **{n: 3}, g=2)
    return contract((alpha, sign), ("p",))


def _xor_planes(s: Source, n: str) -> Expr:
    matrix = np.random.default_rng(s.below(8)).integers(0, 2, (8, 8))
    stored = Unpack(_words(n, "p", "g", "j"), 1, "u", 8)
    sign = contract((const(matrix, "u8", "v", "u"), stored), ("u",), "gf2") * 2 + -1
    return contract((leaf("f16", (), p=2, **{n: 3}, g=2), sign), ("p",))


def _affine(s: Source, n: str) -> Expr:
    width = s.pick((1, 2, 4))
    code = Unpack(_words(n, "g", "j"), width, "v", 8 // width)
    zero = cast(leaf("u8", (), (0, 15), **{n: 3}, g=2), "i32")
    return leaf("f16", (), **{n: 3}, g=2) * (cast(code, "i32") - zero)


def _digits(s: Source, n: str) -> Expr:
    planes = 2 + s.below(2)
    place_values = const([1 << i for i in range(planes)], "i32", "p")
    code = contract((Unpack(_words(n, "p", "g", "j", planes=planes), 1, "v", 8), place_values), ("p",))
    zero = cast(leaf("u8", (), (0, 15), **{n: 3}, g=2), "i32")
    return leaf("f16", (), **{n: 3}, g=2) * (code - zero if s.below(2) else code)


def _codebook(s: Source, n: str) -> Expr:
    c = s.pick([d for d in ("c", "k", "c_1", "p") if d != n])
    codes = leaf("u8", (), (0, 15), **{n: 3}, q=2, g=2, j=2)
    book = leaf("f16", (), q=2, **{c: 16}, v=4)
    return contract((Gather(book, codes, c), leaf("f16", (), **{n: 3}, g=2)), ("q",))


def _row_table(s: Source, n: str) -> Expr:
    c = s.pick([d for d in ("c", "k", "c_1", "m") if d != n])
    return Gather(leaf("f16", (), **{n: 3, c: 16}), Unpack(_words(n, "g", "j"), 4, "v", 2), c)


def _joined(s: Source, n: str) -> Expr:
    c = s.pick([d for d in ("c", "k", "c_1", "m") if d != n])
    planes = 2 + s.below(2)
    code = contract((Unpack(_words(n, "p", "g", "j", planes=planes), 1, "v", 8),
                     const([1 << i for i in range(planes)], "i32", "p")), ("p",))  # fmt: skip
    return Gather(leaf("f16", (), **{n: 3, c: 1 << planes}), code, c)


# ---------------------------------------------------------------- values


def environment(e: Expr, seed: int, *, exact: bool = True) -> dict[str, np.ndarray]:
    """Random arrays for the leaves, in their storage dtypes: multiples of 1/2 in [-2, 2], integers within range.

    Without `exact`, floats of full precision, so that every sum rounds.
    """
    rng = np.random.default_rng(seed)
    out = {}
    for name, p in sorted(params(e).items()):
        sizes = list(p.dims.values())
        if is_float(p.dtype):
            values = rng.integers(-4, 5, sizes) / 2 if exact else rng.standard_normal(sizes)
        else:
            assert p.bounds is not None
            values = rng.integers(p.bounds[0], p.bounds[1] + 1, sizes)
        out[name] = np.asarray(values).astype(numpy_dtype(p.dtype))
    return out
