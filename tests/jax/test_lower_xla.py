"""`emit` under jit against the numpy oracle, on random terms and on every form of random products."""

import re
from collections import Counter
from math import inf
from typing import get_args

import jax
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lowbit.formats import Format, any_precision, bcq, codebook
from lowbit.ir import (
    Bitcast,
    Bucket,
    Call,
    CallSpec,
    Cast,
    Concat,
    Contract,
    Expr,
    Gather,
    Merge,
    Param,
    Type,
    Unpack,
    const,
    contract,
    param,
    register_call,
    topo,
)
from lowbit.ir.dtypes import DTYPES, is_float, short
from lowbit.passes import PIPELINES, run
from lowbit.passes.lower_xla import COMPARE, emit
from lowbit.passes.one_loop import UNROLL
from lowbit.passes.style import Style
from lowbit.passes.tile import tile, written
from lowbit.testing.tolerance import assert_within, exact_and_bound
from tests.terms import environment, matmuls, terms

Env = dict[str, np.ndarray]


def lowered(e: Expr, env: Env, limit: float = inf) -> jax.Array:
    return jax.jit(lambda env: emit(e, env, Style(limit, sums_as_dots=True)))(env)


def check(e: Expr, env: Env, source: Expr | None = None, limit: float = inf) -> bool:
    """`emit(e)` is the exact value of `source` (`e` if None), up to the rounding of `e`, in its dtype; integers equal.

    False, and nothing is checked, if the term overflows: a lowering may do so earlier or later than the oracle.
    """
    exact, bound = exact_and_bound(e, env)
    if source is not None:
        value, _ = exact_and_bound(source, env)
        exact = value.transpose([list(source.dims).index(d) for d in e.dims])
    if not (np.isfinite(exact).all() and np.isfinite(bound).all()):
        return False
    got = lowered(e, env, limit)
    assert short(got.dtype) == e.dtype
    assert is_float(e.dtype) or not bound.any()
    assert_within(got, exact, bound, e)
    return True


def values(e: Expr, seed: int = 0) -> Env:
    return environment(e, seed, exact=False)


# ---------------------------------------------------------------- random terms


@pytest.mark.slow
def test_random_terms():
    seen: Counter[type] = Counter()

    @given(terms(wide=False), st.integers(0, 9), st.booleans())
    def property_(e: Expr, seed: int, exact: bool) -> None:
        assume(check(e, environment(e, seed, exact=exact)))
        seen.update({type(n) for n in topo(e)})

    property_()
    assert set(seen) == set(get_args(Expr)), "some node was never lowered"


@pytest.mark.slow
def test_random_products_in_every_form():
    """A pass keeps the value, and what it makes can be lowered: each pipeline, with full-precision values."""
    changed: Counter[str] = Counter()

    @given(matmuls(), st.sampled_from([*PIPELINES]), st.integers(0, 9))
    @example(contract((param("x", "f32", None, m=2, k=16), any_precision(2, 3).decode(3, 16)), ("k",)), "select", 0)
    def property_(e: Expr, name: str, seed: int) -> None:
        form = run(e, PIPELINES[name])
        changed[name] += form is not e
        assume(check(form, values(e, seed), e))

    property_()
    assert changed["decode"] == 0 and all(changed[name] for name in PIPELINES if name != "decode")


@pytest.mark.slow
def test_random_products_in_parts():
    """A loop over parts is bounded like the whole: the bound holds for any order of the sums."""
    ways: Counter[bool] = Counter()

    @settings(max_examples=60)
    @given(matmuls(), st.sampled_from([*PIPELINES]), st.integers(1, 8), st.integers(0, 9))
    def property_(e: Expr, name: str, parts: int, seed: int) -> None:
        form = run(e, PIPELINES[name])
        limit = written(form) / parts - 1
        tiles = tile(form, limit)
        assume(tiles and check(form, values(e, seed), e, limit))
        ways[tiles.sums] += 1

    property_()
    assert ways[True] > 5 and ways[False] > 5


@pytest.mark.parametrize("rows", [96, 97])
def test_parts_that_do_not_divide_the_whole(rows: int):
    w = param("w", "u8", None, n=rows, j=4)
    e = contract((param("x", "f32", None, m=3, j=4, v=8), Unpack(w, 1, "v", 8)), ("j", "v"))
    tiles = tile(e, 10 * 4 * 8 * 4)  # ten rows of floats
    assert tiles is not None and (tiles.dim, tiles.size) == ("n", 8 if rows == 96 else 10)
    assert check(e, values(e), limit=10 * 4 * 8 * 4)


@pytest.mark.parametrize(
    ("fmt", "parts"), [(bcq(3, group=64), 3), (codebook(2, 4, vec=8), 2)], ids=["planes", "codebooks of a row"]
)
def test_a_sum_of_looked_up_terms_is_a_product_with_ones(fmt: Format, parts: int):
    x = param("x", "f32", None, m=1, k=1024)
    form = run(contract((x, fmt.decode(48, 1024)), ("k",)), PIPELINES["table" if parts == 3 else "join"])
    program = jax.jit(lambda env: emit(form, env, Style(sums_as_dots=True))).lower(values(form)).as_text()
    assert len(re.findall(r"= \"?stablehlo.gather", program)) == parts  # one each, added up before the sum
    assert "stablehlo.reduce" not in program


@pytest.mark.parametrize("table_dtype", ["float16", "float32"])
def test_a_vector_times_selected_weights_writes_no_weights(table_dtype: str):
    n, k = 64, 1024
    fmt = any_precision(2, 4, width=3, table_dtype=table_dtype)
    decode = contract((param("x", "f32", None, m=1, k=k), fmt.decode(n, k)), ("k",))
    e = run(decode, PIPELINES["select"])
    assert check(e, values(e), decode)
    program = jax.jit(lambda env: emit(e, env, Style(sums_as_dots=True))).lower(values(e))
    assert "stablehlo.gather" not in program.as_text()
    assert program.compile().memory_analysis().temp_size_in_bytes < n * k  # an eighth of the weights in float32 and x


def test_float64_needs_x64():
    e = (param("a", "f64", k=3) * param("b", "f64", k=3)).sum("k")
    with pytest.raises(NotImplementedError, match=r"^f64\[k=3\]: float64 terms need jax_enable_x64"):
        lowered(e, values(e))
    with jax.enable_x64(True):
        assert check(e, values(e))


# ---------------------------------------------------------------- what random terms meet too rarely


@pytest.mark.parametrize("size", [2, COMPARE, COMPARE + 1, 300])
def test_buckets_by_comparing_and_by_scatter(size: int):
    x = param("x", "f32", None, m=3, k=50)
    index = param("i", "u16", (0, size - 1), k=50, n=4)
    for over in (frozenset({"k"}), frozenset({"k", "m"}), frozenset()):
        e = Bucket(x, index, "c", size, over)
        assert check(e, values(e))


@pytest.mark.parametrize("size", [1, UNROLL, UNROLL + 1, 2000])
def test_sums_short_and_long(size: int):
    a, b = param("a", "f32", None, m=2, k=size, p=2), param("b", "f16", None, k=size, p=2)
    for e in (
        a.sum("k"),
        (a * b).sum("k"),
        (a * b).sum("k", "p"),
        (a * param("c", "bf16", None, n=3, k=size)).sum("k"),
    ):
        assert check(e, values(e))


def test_pointwise_product_in_a_cheaper_order_keeps_its_dims_apart():
    """The scalar and b meet first, so the last product finds the dims as m, n: the result is still n, m."""
    a, b, c = param("a", "f32", None, n=3, m=2), param("b", "f32", None, m=2), param("c", "f32")
    for e in (
        contract((c, a, b), ()),
        contract((a, b, c), ()),
        contract((c, a, b, b), ()),
        contract((c, a, b, b), ("n",)),
    ):
        assert check(e, values(e))


@pytest.mark.slow
def test_passes_respect_steps_along_a_dim():
    """A step that its type does not show is no function of one word, and sees the order of its operand's dims."""
    fields = Unpack(param("w", "u8", None, n=3), 4, "v", 2) * 2 + -1
    x = param("x", "f32", None, n=3, m=2)
    for moved in (fields, Merge(fields, ("n",), "n"), Concat((fields,), "n")):
        reversed_ = Call("reverse", (moved,))
        for e in (reversed_, Call("reverse", (contract((x, reversed_), ("n",)),))):
            for name, pipeline in PIPELINES.items():
                assert check(run(e, pipeline), values(e), e), name


def test_many_factors_are_taken_from_left_to_right():
    factors = [param(f"a{i}", "f32", None, **{f"d{i}": 2, f"d{i + 1}": 2}) for i in range(9)]
    e = contract(factors, [f"d{i}" for i in range(1, 9)])
    assert check(e, values(e))


def test_gather_with_batch_dims_and_columns():
    table = param("t", "f32", None, v=3, n=2, c=5, g=4)
    index = param("i", "u8", (0, 4), g=4, k=6, n=2)
    e = Gather(table, index, "c")
    assert check(e, values(e))


def test_bitcasts_follow_byte_order():
    """Index 0 is the least significant part, whatever the host's byte order."""
    parts = param("b", "u8", None, j=2, n=3)
    for e in (
        Bitcast(parts, "u16", "j"),
        Bitcast(Bitcast(parts, "u16", "j"), "u8", "i"),
        Bitcast(param("w", "u8"), "i8"),
    ):
        assert check(e, environment(e, 1))
    joined = lowered(Bitcast(parts, "u16", "j"), {"b": np.array([[1, 0, 255], [0, 1, 255]], np.uint8)})
    assert joined.tolist() == [1, 256, 65535]


@pytest.mark.parametrize("acc", ["f32", "i32"])
def test_integer_factors(acc):
    """Integers are exact in an integer accumulator, also where float32 would round: 2**24 + 1."""
    a = param("a", "i32", (0, 2**25 if acc == "i32" else 2**24), k=3)
    e = contract((a,), ("k",), acc=acc)
    assert check(e, {"a": np.array([2**24, 1, 0], np.int32)})
    if acc == "i32":
        assert int(lowered(e, {"a": np.array([2**24, 1, 0], np.int32)})) == 2**24 + 1


@pytest.mark.parametrize("to", [d for d in DTYPES if is_float(d) and d != "f64"])
def test_casts_round_to_nearest_even(to):
    """Against the oracle's rounding bit for bit: neither is computed from anything rounded."""
    x = param("x", "f32", None, k=1000)
    e = Cast(x, to, rounds=True) if to != "f32" else x
    env = values(e)
    exact, _ = exact_and_bound(e, env)
    assert np.array_equal(np.asarray(lowered(e, env)).astype(np.float64), exact)


# ---------------------------------------------------------------- errors

X = param("x", "f32", None, m=2, k=3)


def test_missing_leaf():
    with pytest.raises(KeyError, match=r"no array for param 'x': f32\[m=2 k=3\]"):
        emit(X * 2, {})


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((3, 2), np.float32), r"float32\[3, 2\]"),
        (np.zeros((2, 3), np.float16), r"float16\[2, 3\]"),
        (np.zeros((2, 3), np.int32), r"int32\[2, 3\]"),
        (np.zeros((), np.float32), r"float32\[\]"),
    ],
)
def test_leaf_of_another_type(array, what):
    with pytest.raises(ValueError, match=rf"^param 'x' is f32\[m=2 k=3\], but the array is {what}$"):
        emit(X * 2, {"x": array})


register_call(
    "oracle_only", CallSpec(type=lambda t: Type(t.dims, t.dtype, t.bounds), oracle=lambda v: v, operations=lambda t: 0)
)


def test_opaque_step_without_a_jnp_reading():
    with pytest.raises(NotImplementedError, match=r"^call 'oracle_only' has no jnp reading: register it with `xla=`"):
        lowered(Call("oracle_only", (X,)), values(X))


register_call(
    "grows",
    CallSpec(type=lambda t: t, oracle=lambda v: v, operations=lambda t: 0, xla=lambda v: v.repeat(2, 0).astype("int8")),
)


def test_opaque_step_whose_jnp_reading_is_of_another_type():
    message = r"^call 'grows' is f32\[m=2 k=3\], but its jnp reading makes int8\[4, 3\]$"
    with pytest.raises(ValueError, match=message):
        emit(Call("grows", (X,)), {"x": jax.numpy.zeros((2, 3))})


def test_buckets_under_strict_promotion():
    e = Bucket(X, param("i", "u8", (0, 3), k=3), "c", 4, frozenset("k"))
    with jax.numpy_dtype_promotion("strict"):
        assert check(e, values(e))


def test_constants_need_no_arrays():
    e = contract((const([1.0, 2.0, 4.0], "f32", "k"), const([1, -1, 3], "i32", "k")), ("k",))
    assert isinstance(e, Contract) and not any(isinstance(n, Param) for n in topo(e))
    assert float(lowered(e, {})) == 1 - 2 + 12
