"""Nodes: one object a structure, whatever makes it, and none that is ill-formed."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from hypothesis import given

from lowbit.ir import (
    Add,
    Bitcast,
    Bucket,
    Call,
    CallSpec,
    Cast,
    Concat,
    Const,
    Contract,
    DimError,
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
    param,
    register_call,
)
from lowbit.ir.expr import CONST_LIMIT, Interned
from tests.terms import terms

X = param("x", "f32", m=2, k=8)
CODES = param("codes", "u8", (0, 3), n=3, k=8)
WORDS = param("words", "u8", n=3, j=2)
TABLE = param("table", "f16", n=3, c=4)
FOURS, PAST = const([4, 4], "i32", "k"), param("past", "i32", (-(2**31), 0), k=2)  # 2 * 4 * 2**62 is 0 in 64 bits
register_call("codes_without_range", CallSpec(lambda t: Type(t.dims, "u8", None), lambda v: v, lambda t: 0))


def test_equal_structure_is_one_object() -> None:
    assert param("x", "f32", m=2, k=8) is X
    assert (X * 2 + 1).sum("k") is (X * 2 + 1).sum("k")
    assert (X * 2).sum("k") is not (X * 3).sum("k")


@given(terms())
def test_copies_and_pickles_are_the_same_object(e: Expr) -> None:
    assert copy.copy(e) is e
    assert copy.deepcopy([e])[0] is e
    assert pickle.loads(pickle.dumps(e)) is e


def test_the_pool_forgets_what_nobody_holds() -> None:
    gc.collect()
    before = len(Interned._pool)
    held = [param(f"forgotten_{i}", "f32", n=2) + 1 for i in range(100)]
    assert len(Interned._pool) >= before + 200
    del held
    gc.collect()
    assert len(Interned._pool) <= before + 1  # the constant 1, if nothing held it before


def test_threads_get_the_same_object() -> None:
    start = Barrier(8)

    def build(_: int) -> list[Expr]:
        start.wait()
        return [(param(f"raced_{i}", "f32", n=4, k=8) * X).sum("k") for i in range(200)]

    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(build, range(8))
    assert all(a is b for other in others for a, b in zip(first, other, strict=True))


def test_constants_that_python_calls_equal_stay_apart() -> None:
    values = [(1, "i32"), (1, "f32"), (1, "f16"), (1, "u8"), (0.0, "f32"), (-0.0, "f32"), (np.nan, "f32")]
    made = [const(v, d) for v, d in values]  # type: ignore[arg-type]
    assert len(set(made)) == len(made)
    assert const(np.nan, "f32") is const(np.nan, "f32")
    assert const(True, "u8") is const(1, "u8")


def test_a_constant_must_hold_its_values() -> None:
    with pytest.raises(ValueError, match=r"\[300\] has values that u8 cannot hold"):
        const([300], "u8", "c")
    with pytest.raises(ValueError, match=r"0.1 has values that bf16 cannot hold"):
        const(0.1, "bf16")


def test_nodes_are_frozen_and_say_what_they_are() -> None:
    with pytest.raises(AttributeError):
        X.name = "y"  # type: ignore[misc]
    assert repr(X) == "<Param f32[m=2 k=8]>"
    assert str(X + 1).splitlines()[-1].split() == "%2 = %0 + %1 : f32[m=2 k=8]".split()


def test_operators_lift_numbers_beside_their_operand() -> None:
    assert (X * 2).dtype == "f32"
    assert (CODES * 2 - 1).type.bounds == (-1, 5)
    assert (X - X) is add(X, contract((X, const(-1, "f32")), ()))
    assert cast(X, "f32") is X


def test_a_sum_with_tables_ranges_over_their_products() -> None:
    """Digits of digits: each of the 64 values once, however many tables the place values are in."""
    bits, ones, eights = param("b", "u8", (0, 1), p=3, n=2), const([1, 2, 4], "i32", "p"), const([1, 8], "i32", "n")
    assert contract((contract((bits, ones), ("p",)), eights), ("n",)).type.bounds == (0, 63)
    assert contract((bits, ones, eights), ("p",)).type.bounds == (0, 56)  # the largest of 7 and 56
    assert contract((bits, const([-1, 2, 4], "i32", "p"), eights), ("p", "n")).type.bounds == (-9, 54)
    large, small = const(np.arange(4096) % 2, "i32", "k"), const([1, 2], "i32", "n")  # too many products to list
    assert contract((param("w", "u8", (0, 1), k=4096, n=2), large, small), ("k", "n")).type.bounds == (0, 8192)


ILL_FORMED: list[tuple[Callable[[], Expr], str]] = [
    (lambda: param("a b", "f32"), "param 'a b' is not a name: use letters, digits and underscores, no digit first"),
    (lambda: param("a", "f32", n=0), "param a: dim 'n' has size 0; sizes are positive ints"),
    (lambda: param("a", "f32", n=True), "param a: dim 'n' has size True; sizes are positive ints"),
    (lambda: Param("a", (("n", 2), ("n", 3)), "f32"), "param a: dim 'n' occurs twice, with the sizes 2 and 3"),
    (lambda: param("a", "f32", (0, 1), n=2), "param a: a f32 array has no value range, but (0, 1) was given"),
    (lambda: param("a", "u8", (0, 256), n=2), "param a: range 0..256 is not one of u8"),
    (lambda: param("a", "u8", (3, 2), n=2), "param a: range 3..2 is not one of u8"),
    (lambda: param("a", "u8", (0, 3.0), n=2), "param a in a range: 3.0 is not a plain int"),  # type: ignore[arg-type]
    (lambda: const([[1, 2]], "u8", "c"), "const of shape (1, 2) over the dims ('c',): name one dim for each axis"),
    (lambda: Const((("c", 3),), "f32", b"1234"), "const f32[c=3]: 4 bytes do not fill 3 entries"),
    (
        lambda: const(np.zeros(CONST_LIMIT + 1), "f32", "c"),
        "const [c=4097] has 4097 entries, at most 4096: make it a Param",
    ),
    (lambda: Unpack(X, 1, "v", 8), "unpack of f32[m=2 k=8]: words are unsigned integers"),
    (lambda: Unpack(WORDS, True, "v", 8), "unpack: True is not a plain int"),
    (lambda: Unpack(WORDS, 3, "v", 3), "unpack 3 fields of 3 bits from u8[n=3 j=2]: the word has 8 bits"),
    (lambda: Unpack(WORDS, 1, "j", 8), "unpack makes dim 'j', which [n=3 j=2] already has: rename one"),
    (
        lambda: Bitcast(WORDS, "u16"),
        "bitcast u8[n=3 j=2] to u16: 8 and 16 bits need a dim exactly when they differ",
    ),
    (lambda: Bitcast(WORDS, "u16", "n"), "bitcast u8[n=3 j=2] to u16: dim 'n' must be 2, not 3"),
    (lambda: Gather(TABLE, X, "c"), "gather over 'c': the index is f32[m=2 k=8], not an integer"),
    (
        lambda: Gather(TABLE, WORDS, "c"),
        "gather over c=4: the index ranges over 0..255; it must stay in 0..3",
    ),
    (lambda: Gather(TABLE, CODES, "z"), "gather over 'z': the operand is f16[n=3 c=4], which has no such dim"),
    (
        lambda: Bucket(X, CODES, "c", 4, frozenset({"z"})),
        "bucket over ['z']: the operands have dims [m=2 k=8 n=3]",
    ),
    (
        lambda: Bucket(X, CODES, "m", 4, frozenset({"k"})),
        "bucket makes dim 'm', which [m=2 n=3] already has: rename one",
    ),
    (lambda: Bucket(X, CODES, "c", 4.0, frozenset("k")), "bucket over 'c': 4.0 is not a plain int"),  # type: ignore[arg-type]
    (lambda: X + param("y", "f32", k=9), "add: dim 'k' is 8 in operand [m=2 k=8] and 9 in [k=9]"),
    (
        lambda: Add(X, param("y", "f16", k=8)),
        "add of f32[m=2 k=8] and f16[k=8]: the element types differ, cast one",
    ),
    (lambda: contract((X,), ("z",)), "sum over ['z']: the factors have dims [m=2 k=8]"),
    (
        lambda: Contract((X, CODES), frozenset(), "real", "f16"),
        "sum: factor f32[m=2 k=8] is not exact in the accumulator f16: cast it, or widen",
    ),
    (
        lambda: Contract((FOURS, PAST, PAST), frozenset("k"), "real", "i32"),
        "sum reaches 0..36893488147419103232, more than i32 holds: use a wider type",
    ),
    (
        lambda: Contract((CODES,), frozenset("k"), "gf2", "f32"),
        "xor over the ring 'gf2' in f32: use 'real', or 'gf2' with an integer type",
    ),
    (
        lambda: Contract((CODES,), frozenset("k"), "xor", "u8"),  # type: ignore[arg-type]
        "sum over the ring 'xor' in u8: use 'real', or 'gf2' with an integer type",
    ),
    (lambda: contract((CODES,), (), "gf2"), "xor factor u8[n=3 k=8] is not a bit: its values must lie in 0..1"),
    (lambda: Split(X, "k", (("g", 3), ("t", 3))), "split k=8 into [g=3 t=3]: the product is 9"),
    (lambda: Split(X, "k", (("m", 2), ("t", 4))), "split makes dim 'm', which [m=2] already has: rename one"),
    (lambda: Split(param("a", "f32", k=1), "k", ()), "split k=1 into nothing: name at least one dim"),
    (lambda: Merge(X, (), "z"), "merge of (): name at least one dim, each once"),
    (lambda: Merge(X, ("k", "k"), "z"), "merge of ('k', 'k'): name at least one dim, each once"),
    (lambda: Cast(X, "f16"), "cast f32[m=2 k=8] to f16 can lose values: mark it as rounding"),
    (lambda: Cast(CODES, "f16", True), "cast u8[n=3 k=8] to f16 is exact: do not mark it as rounding"),
    (
        lambda: Cast(X, "i32", True),
        "cast f32[m=2 k=8] to i32: integers are never made by rounding inside a term",
    ),
    (lambda: Slice(X, "k", 4, 9), "slice 'k' 4..9 of f32[m=2 k=8]: needs 0 <= start < stop <= 8"),
    (lambda: Slice(X, "k", 4, 4), "slice 'k' 4..4 of f32[m=2 k=8]: needs 0 <= start < stop <= 8"),
    (lambda: Slice(X, "k", 0, np.int64(2)), "slice 'k': np.int64(2) is not a plain int"),  # type: ignore[arg-type]
    (lambda: Pad(X, "k", 1, 1.0), "pad 'k': 1.0 is not a plain int"),  # type: ignore[arg-type]
    (lambda: Pad(X, "k", -1, 2), "pad 'k' by -1 and 2: neither may be negative, nor both zero"),
    (lambda: Concat((), "k"), "concat of nothing"),
    (
        lambda: Call("codes_without_range", (X,)),
        "call codes_without_range makes u8[m=2 k=8] in the range None: integers have a range, floats have none",
    ),
    (lambda: Concat((X, TABLE), "k"), "concat over 'k': the operand is f16[n=3 c=4], which has no such dim"),
]


@pytest.mark.parametrize(("build", "message"), ILL_FORMED, ids=[m[:48] for _, m in ILL_FORMED])
def test_an_ill_formed_node_cannot_be_built(build: Callable[[], Expr], message: str) -> None:
    with pytest.raises(DimError) as err:
        build()
    assert str(err.value) == message


@pytest.mark.parametrize("build", [lambda d: param("a", d), lambda d: const(1, d), lambda d: cast(X, d)])
def test_an_unknown_element_type_is_named(build: Callable[[str], Expr]) -> None:
    with pytest.raises(TypeError, match=r"^'float32' is not an element type; use one of f64, f32, f16, "):
        build("float32")


def test_joined_digits_stay_tight_in_a_product_of_tables() -> None:
    """Flattening must not widen a range: what indexes a table of 8 still does."""
    digits = contract((Unpack(WORDS, 1, "v", 3), const([1, 2, 4], "i32", "v")), ("v",))
    signs = const([1, -1], "i32", "j")
    assert contract((digits, signs), ("j",)).bounds == (-7, 7)
