"""Single weights read from a term are those of the oracle; what cannot be read so is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.ir import (
    Bitcast,
    Bucket,
    Call,
    Expr,
    Gather,
    Pad,
    Split,
    Unpack,
    cast,
    const,
    contract,
    evaluate,
    merge,
    param,
    params,
    slice_,
    split,
)
from lowbit.ir.dtypes import is_float, numpy_dtype
from lowbit.ir.expr import Concat
from lowbit.ir.walk import rename
from lowbit.passes.pointwise import UnsuitableError, code_width, pointwise
from lowbit.passes.scalar import Element, Node, Number, Product, Scalar, Sum, elements, negated, number, plus, times
from tests.terms import leaf
from tests.weights import value, weights

N = 3


def planes(bits: int, k: int, group: int) -> Expr:
    """Bits with dims p n g j v, groups padded to whole bytes."""
    return Unpack(param("planes", "u8", p=bits, n=N, g=-(-k // group), j=-(-group // 8)), 1, "v", 8)


def in_a_row(e: Expr, k: int, group: int) -> Expr:
    within = slice_(merge(e, "j", "v", into="t"), "t", 0, group)
    return slice_(merge(within, "g", "t", into="k"), "k", 0, k)


def uniform(bits: int, k: int, group: int) -> Expr:
    code = contract((planes(bits, k, group), const([1 << p for p in range(bits)], "i32", "p")), ("p",))
    zero = cast(param("zero", "u8", n=N, g=-(-k // group)), "i32")
    return in_a_row(param("scale", "f32", n=N, g=-(-k // group)) * (code - zero), k, group)


def binary(bits: int, k: int, group: int, alpha: Expr | None = None, offset: bool = False) -> Expr:
    groups = -(-k // group)
    alpha = alpha or param("alpha", "f32", p=bits, n=N, g=groups)
    w = contract((alpha, planes(bits, k, group) * 2 - 1), ("p",))
    return in_a_row(w + param("beta", "f32", n=N, g=groups) if offset else w, k, group)


def tuned(bits: int, k: int, group: int) -> Expr:
    """The scale of plane 0 stored apart, in another type."""
    first, rest = (
        param(name, dtype, p=p, n=N, g=-(-k // group)) for name, dtype, p in (("a", "f32", 1), ("b", "f16", bits - 1))
    )
    return binary(bits, k, group, Concat((first, cast(rest, "f32")), "p"))


def table_of_planes(k: int) -> Expr:
    code = contract(
        (Unpack(param("planes", "u8", p=3, n=N, j=-(-k // 8)), 1, "v", 8), const([1, 2, 4], "i32", "p")), ("p",)
    )
    table = Gather(const([0, 1, 2, 4, 0, -1, -2, -4], "f32", "c"), code, "c")
    return slice_(merge(table * param("scale", "f32", n=N), "j", "v", into="k"), "k", 0, k)


def nibbles(k: int) -> Expr:
    """Two codes a byte, within the half of a wider word, looked up in a table of the row."""
    fields = Unpack(Unpack(param("words", "u32", n=N, j=k // 8), 16, "h", 2), 4, "v", 4)
    return merge(Gather(param("table", "f32", n=N, c=16), fields, "c"), "j", "h", "v", into="k")


def direct(k: int) -> Expr:
    """A byte a code, inputs first, in blocks of 64 that lie apart."""
    stored = Split(param("codes", "u8", (0, 5), k=k, n=N), "k", (("b", k // 64), ("i", 64)))
    return merge(param("scale", "bf16", b=k // 64, n=N) * stored, "b", "i", into="k")


def shared_parity(k: int) -> Expr:
    """The sign is the xor of two planes."""
    parity = contract((planes(2, k, 32), const([1, 1], "u8", "p")), ("p",), ring="gf2")
    return in_a_row(param("alpha", "f32", n=N, g=-(-k // 32)) * (parity * 2 - 1), k, 32)


FORMATS: dict[str, tuple[Callable[[], Expr], int, tuple[int, ...]]] = {
    # the term, the bits of a code, and the inputs that share each parameter (0: the row)
    "uniform 4": (lambda: uniform(4, 128, 64), 4, (64, 64)),
    "uniform 1, one group": (lambda: uniform(1, 40, 40), 1, (0, 0)),
    "uniform 3, a ragged last group": (lambda: uniform(3, 71, 32), 3, (32, 32)),
    "binary 2, groups of 96": (lambda: binary(2, 200, 96), 2, (96, 96)),
    "binary 4 with offset": (lambda: binary(4, 64, 32, offset=True), 4, (32,) * 5),
    "binary 3, in two types": (lambda: tuned(3, 96, 32), 3, (32, 32, 32)),
    "a table": (lambda: table_of_planes(13), 3, (0,)),
    "nibbles of words": (lambda: nibbles(64), 4, (0,) * 16),
    "bytes": (lambda: direct(128), 3, (64,)),
    "parity": (lambda: shared_parity(64), 2, (32,)),
}


def contents(e: Expr, seed: int) -> dict[str, np.ndarray]:
    """Any codes; floats of few bits, so that float64 is exact."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, p in params(e).items():
        shape = list(p.dims.values())
        low, high = p.bounds or (-8, 8)
        drawn = rng.integers(low, high + 1, shape)
        out[name] = (drawn / 4 if is_float(p.dtype) else drawn).astype(numpy_dtype(p.dtype))
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_single_weights_are_those_of_the_oracle(name: str) -> None:
    make, bits, spans = FORMATS[name]
    e = make()
    read = pointwise(e)
    assert read.bits == bits and len(read.entries) == 1 << bits
    assert tuple(p.span for p in read.parameters) == spans
    for seed in range(3):
        env = contents(e, seed)
        order = [list(e.dims).index(d) for d in ("n", "k")]
        want = evaluate(e, env).transpose(order)
        np.testing.assert_array_equal(weights(read, env, *want.shape), want)


def test_codes_are_fields_least_significant_first() -> None:
    read = pointwise(uniform(2, 64, 32))
    assert [(c.leaf.name, c.at[0].values.item(), c.width) for c in read.codes] == [("planes", 0, 1), ("planes", 1, 1)]
    assert [c.varies for c in read.codes] == [(True, True)] * 2
    assert [c.span for c in read.codes] == [1, 1]
    (only,) = pointwise(nibbles(64)).codes
    assert (only.leaf.name, only.width) == ("words", 4)
    assert only.shift is not None and only.shift.values[0, :9].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 0]
    (byte,) = pointwise(direct(64)).codes
    assert (byte.width, code_width(byte), byte.shift) == (0, 3, None)


def test_entries_share_their_beginnings_and_signs_are_outside() -> None:
    read = pointwise(binary(3, 64, 32))
    assert all(x == negated(y) for x, y in zip(read.entries, reversed(read.entries), strict=True))
    beginnings = {node.a for _, node in read.entries if isinstance(node, Sum)}
    assert len(beginnings) == 2  # alpha_0 + alpha_1 and alpha_0 - alpha_1


def test_one_row_varies_along_its_inputs_alone() -> None:
    e = param("scale", "f32", n=1) * param("codes", "u8", (0, 3), n=1, k=40)
    assert pointwise(e).codes[0].varies == (False, True)


# ---------------------------------------------------------------- refusals

SCALE, CODES = param("scale", "f32", n=N), param("codes", "u8", (0, 3), n=N, k=64)
FEW = param("few", "u8", (0, 3), n=N)
CODES2 = param("codes", "u8", (0, 3), n=N, j=32)
BOOK, VECTORS = param("book", "f16", c=256, v=8), param("vectors", "u8", n=N, j=8)


def looked_up(*tables: Expr, index: Expr = VECTORS) -> Expr:
    """Vectors of 8 inputs from tables of all rows, added up."""
    first, *others = (Gather(t, index, "c") for t in tables)
    return merge(sum(others, first), "j", "v", into="k")


NO_SUM = "what is looked up in 'book' is no sum of code bits alone"
TAKEN = "its steps and look-ups do not take each field of a code once, in order"
REFUSED: dict[str, tuple[Expr, str]] = {
    "an index from 1 up": (looked_up(param("book", "f16", c=257, v=8), index=cast(VECTORS, "i32") + 1), NO_SUM),
    "an index in another order": (
        looked_up(BOOK, index=Gather(const([0, 1, *range(255, 1, -1)], "i32", "r"), VECTORS, "r")),
        NO_SUM,
    ),
    "an index without a code": (looked_up(BOOK, index=param("vectors", "u8", n=N, j=1)), NO_SUM),
    "a sign beside a vector": (
        looked_up(BOOK) * (cast(param("signs", "u8", (0, 1), n=N, k=64), "i32") * -2 + 1),
        TAKEN,
    ),
    "a code that is added": (looked_up(BOOK) + CODES, TAKEN),
    "a code for two tables": (looked_up(BOOK, param("more", "f16", c=256, v=8)), TAKEN),
    "vectors of two sizes": (
        looked_up(BOOK) + merge(Gather(param("pairs", "f16", c=4, p=2), CODES2, "c"), "j", "p", into="k"),
        "its codes stand for different numbers of inputs",
    ),
    "no bits": (SCALE * param("rows", "f32", n=N) * const([1.0] * 64, "f32", "k"), "code has 0 bits, .* 1 to 8"),
    "five bits": (
        uniform(5, 64, 32),
        "a weight's code has 5 bits, and with more than 4 its values must be",
    ),
    "a byte": (SCALE * param("codes", "u8", n=N, k=64), "a weight's code has 8 bits"),
    "negative": (SCALE * param("codes", "i8", n=N, k=64), "codes 'codes' may be negative; store them from 0 up"),
    "a parameter in bits": (
        merge(SCALE * split(CODES, "k", t=2, v=32) * Unpack(param("steps", "u8", n=N), 4, "t", 2), "t", "v", into="k"),
        "a parameter is 4 bits of 'steps', and kernels take whole words",
    ),
    "a negative parameter": (
        SCALE * CODES * param("steps", "i8", n=N),
        "parameters 'steps' are -128 to 127, and kernels take 0 to 65535",
    ),
    "a choice of codes": (
        SCALE * Gather(param("more", "u8", (0, 1), n=N, k=64, c=4), CODES, "c"),
        "which bits are a weight's code depends on other bits of it",
    ),
    "a constant that varies": (
        SCALE * CODES * const(np.arange(64.0), "f32", "k"),
        "a constant of the format depends on the weight's position",
    ),
    "an index of parameters": (
        Gather(const([1, 2, 3, 4], "f32", "c"), FEW, "c") * CODES,
        "an index is made of parameters, not of code bits",
    ),
    "rounding": (cast(SCALE * CODES, "bf16"), "a step rounds to bf16"),
    "floats for few inputs": (
        binary(2, 64, 24),
        "'alpha' has a value for every 24 inputs, not for a multiple of 32",
    ),
    "an xor of parameters": (
        contract((param("row", "u8", (0, 1), n=N), param("bit", "u8", (0, 1), n=N, k=64)), (), ring="gf2") * SCALE,
        "an xor of parameters",
    ),
    "fields of a sum": (
        merge(Unpack(param("words", "u8", (0, 7), n=N, j=16) + 1, 2, "v", 4), "j", "v", into="k") * SCALE,
        "fields are unpacked from a Add, not from stored words",
    ),
    "rows of two arrays": (
        Concat((param("a", "f32", n=1), param("b", "f32", n=N - 1)), "n") * CODES,
        "its weights come from several arrays joined along 'n'",
    ),
    "a Bitcast that joins": (
        Bitcast(param("b", "u8", n=N, k=64, i=2), "f16", "i"),
        "a step of its decode is a Bitcast",
    ),
    "a Bucket": (
        Bucket(rename(CODES, {"n": "r"}), const([0, 1, 0], "u8", "r"), "n", N, frozenset({"r"})),
        "a step of its decode is a Bucket",
    ),
    "a Pad": (Pad(SCALE * CODES, "k", 0, 8), "a step of its decode is a Pad"),
    "a Call": (Call("reverse", (SCALE * CODES,)), "the step 'reverse' is not of stored codes alone"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_single_weights_is_refused(what: str) -> None:
    e, message = REFUSED[what]
    with pytest.raises(UnsuitableError, match=message):
        pointwise(e)


def test_a_table_may_have_fewer_entries_than_its_codes_have_values() -> None:
    codes = param("codes", "u8", (0, 2), n=N, k=64)
    e = param("scale", "f32", n=N) * Gather(const([-1, 0, 1], "f32", "c"), codes, "c")
    read = pointwise(e)
    assert read.bits == 2 and len(read.entries) == 4
    env = contents(e, 0)
    np.testing.assert_array_equal(weights(read, env, N, 64), evaluate(e, env))


# ---------------------------------------------------------------- scalars

STORED = [Element(leaf("f32", [name]), ()) for name in "ngjvp"]
VALUES = dict(zip(STORED, (-1.5, 0.25, 2.0, 0.0, -3.0), strict=True))


def combined(drawn: tuple[str, tuple[Scalar, float], tuple[Scalar, float]]) -> tuple[Scalar, float]:
    how, (x, a), (y, b) = drawn
    if how == "negated":
        return negated(x), -a
    return (plus(x, y), a + b) if how == "plus" else (times(x, y), a * b)


SCALARS: st.SearchStrategy[tuple[Scalar, float]] = st.recursive(
    st.sampled_from([-2.0, -1.0, -0.5, 0.0, 1.0, 1.5]).map(lambda v: (number(v), v))
    | st.sampled_from(STORED).map(lambda e: ((1, e), VALUES[e])),
    lambda inner: st.tuples(st.sampled_from(["plus", "times", "negated"]), inner, inner).map(combined),
    max_leaves=12,
)


def nodes(x: Node) -> list[Node]:
    below = [x.a, x.b] if isinstance(x, Sum | Product) else []
    return [x, *(n for one in below for n in nodes(one))]


@given(SCALARS)
def test_scalars_have_a_normal_form_of_the_same_value(drawn: tuple[Scalar, float]) -> None:
    x, expected = drawn
    assert value(x, VALUES.__getitem__) == expected
    assert x[0] in (1, -1)
    for n in nodes(x[1]):
        match n:
            case Number(size):
                assert size >= 0
            case Sum(a, b):
                assert not (isinstance(a, Number) and isinstance(b, Number))
                assert Number(0.0) not in (a, b)
            case Product(a, b):
                assert not isinstance(b, Number) and a != Number(1.0)
                assert not (isinstance(b, Product) and isinstance(b.a, Number))  # numbers in front, and one of them
                assert not (isinstance(a, Product) and isinstance(a.a, Number))
    assert negated(negated(x)) == x


def test_elements_are_found_once_and_in_order() -> None:
    a, b, c = ((1, e) for e in STORED[:3])
    _, node = plus(times(b, a), plus(number(2), times(a, c)))
    assert list(elements(node)) == [STORED[1], STORED[0], STORED[2]]
