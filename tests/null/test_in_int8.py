"""Rows as 8-bit integers, and products of them as terms, by the numpy oracle."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.ir import Bitcast, Call, DimError, Gather, cast, contract, evaluate, merge, param
from lowbit.ir.dtypes import short
from lowbit.ir.expr import Expr
from lowbit.passes.in_int8 import COLUMNS, activations_in_int8, checked_numerics, product_in_int8
from lowbit.passes.int8_rows import CODES, LEAST, SCALE, rows
from lowbit.passes.pointwise import UnsuitableError
from lowbit.testing.tolerance import exact_and_bound

Array = np.ndarray[Any, Any]
NUMERICS = tuple(COLUMNS)


def rounded(x: Array, columns: int) -> tuple[Array, Array, Array]:
    """Codes and scales, and what they stand for, of rows [m, k]."""
    leaf = param("x", short(x.dtype), m=x.shape[0], k=x.shape[1])
    codes, scale = (evaluate(e, {"x": x}) for e in rows(leaf, columns))
    values = codes if columns == 1 else codes[0] + codes[1] / 256
    return codes, scale, values * scale[:, None]


FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, 127.0, 63.5, 3.4e38, 1e-45, -1.0])
)


@given(st.lists(st.lists(FLOATS, min_size=3, max_size=3), min_size=1, max_size=3))
def test_half_a_step_at_most(values: list[list[float]]) -> None:
    x = np.array(values, np.float32)
    exact, largest = x.astype(np.float64), np.maximum(np.abs(x).max(1), np.float32(LEAST))
    for columns, step in ((1, 1.0), (2, 1 / 256)):
        codes, scale, back = rounded(x, columns)
        assert codes.min() >= -128 and codes.max() <= 127
        assert (np.log2(scale) % 1 == 0).all()
        assert (scale * 127 >= largest).all() and (scale * 63.4999 <= largest).all()
        assert (np.abs(back - exact) <= scale[:, None] * step / 2).all()


def test_rows_of_zeros_outliers_and_what_is_no_number() -> None:
    x = np.zeros((5, 4), np.float32)
    x[1, :2] = 1000.0, 0.01
    x[2, 0], x[3, 1], x[4, 2] = np.inf, np.nan, -np.inf
    for columns in (1, 2):
        codes, scale, back = rounded(x, columns)
        assert not codes[..., 0, :].any() and scale[0] > 0
        assert back[1].tolist() == [1000.0, 0.0, 0.0, 0.0]  # 0.01 is below half a step of the row's largest
        assert np.isnan(scale[2:]).all() and not codes[..., 2:, :].any()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_are_rounded_as_the_floats_that_they_are(dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, 9)).astype(dtype)
    for columns in (1, 2):
        for half, whole in zip(rounded(x, columns), rounded(x.astype(np.float32), columns), strict=True):
            assert np.array_equal(half, whole)


def test_the_low_byte_carries() -> None:
    codes, scale, back = rounded(np.array([[64.0, 1 - 2.0**-9, 0.5, -0.5]], np.float32), 2)
    assert scale.tolist() == [1.0] and codes[:, 0].tolist() == [[64, 1, 1, 0], [0, 0, -128, -128]]
    assert back.tolist() == [[64.0, 1.0, 0.5, -0.5]]


def test_what_has_no_rows() -> None:
    for leaf in (param("x", "i8", k=3), param("x", "f32")):
        for name in (*CODES.values(), SCALE):
            with pytest.raises(DimError, match=r"^rows of .*: give floats with at least one dim"):
                Call(name, (leaf,))


def test_bounds_of_rows_that_were_rounded() -> None:
    """A sum in float32 may be off, and its codes cross a tie or its row a power of two; the bound covers that."""
    a = param("a", "f32", p=3, c=8)
    table = a.sum("p")
    for seed in range(20):
        env = {"a": np.random.default_rng(seed).standard_normal((3, 8)).astype(np.float32)}
        env["a"][:, 0] = (127 / 3, 127 / 3, 127 / 3)  # near where the scale doubles
        in_order = (env["a"][0] + env["a"][1]) + env["a"][2]
        backwards = env["a"][0] + (env["a"][1] + env["a"][2])
        for e in rows(table):
            exact, bound = exact_and_bound(e, env)
            for other in (in_order, backwards):
                got = evaluate(Call(e.name, (param("t", "f32", c=8),)), {"t": other})  # type: ignore[attr-defined]
                assert (np.abs(got - exact) <= bound).all()


# ---------------------------------------------------------------- products


def decode(table: Expr) -> Expr:
    """Codes of 2 bits in groups of 4 inputs: [n=3 k=8] by a table [n g c=4]."""
    code = param("codes", "u8", (0, 3), n=3, g=2, t=4)
    return merge(Gather(table, code, "c"), "g", "t", into="k")


X = param("x", "f32", m=2, k=8)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e-30, 1e30]), st.sampled_from(NUMERICS), st.booleans())
def test_products_are_within_their_bound(seed: int, size: float, numerics: Any, outliers: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 8)).astype(np.float32) * np.float32(size)
    if outliers:
        x[:, 3] *= 1000
    table = rng.standard_normal((3, 2, 4)).astype(np.float32)
    codes = rng.integers(0, 4, (3, 2, 4))
    env = {"x": x, "table": table, "codes": codes}
    e = product_in_int8(X, decode(param("table", "f32", n=3, g=2, c=4)), numerics)
    got = evaluate(e, env).transpose([list(e.dims).index(d) for d in ("m", "n")])
    w = np.take_along_axis(table, codes, 2).reshape(3, 8).astype(np.float64)
    s = np.abs(x).max(1, keepdims=True).clip(LEAST) / 63.5
    f = np.repeat(np.abs(table).max(2) / 63.5, 4, 1)
    off_x, off_w = s / 2 * 256.0 ** (1 - COLUMNS[numerics]), f / 2
    exact = x.astype(np.float64)
    bound = off_x @ np.abs(w).sum(1)[None] + np.abs(exact) @ off_w.T + off_x @ off_w.sum(1)[None]
    assert (np.abs(got - exact @ w.T) <= bound * (1 + 2.0**-20)).all()
    encoded = evaluate(activations_in_int8(X, numerics), env)
    assert (np.abs(encoded - exact) <= off_x * (1 + 2.0**-20)).all()


def test_a_scale_times_an_integer_is_not_rounded() -> None:
    scale, codes = param("scale", "f32", n=3), param("codes", "i8", n=3, k=8)
    e = product_in_int8(X, scale * codes, "int8")
    rng = np.random.default_rng(0)
    env = {"x": rng.integers(-100, 100, (2, 8)).astype("f4"), "scale": rng.random(3).astype("f4")}
    env["x"][:, 0] = 100  # a scale of 1
    env["codes"] = rng.integers(-128, 128, (3, 8))
    assert np.array_equal(evaluate(e, env), env["x"] @ env["codes"].T * env["scale"].astype("f8"))


def test_what_is_added_in_floats_stays_in_floats() -> None:
    low, codes = param("low", "f32", n=3, r=2), param("codes", "i8", n=3, k=8)
    high = param("high", "f32", r=2, k=8)
    plain = contract((X, low, high), ("k", "r"))
    e = product_in_int8(X, param("scale", "f32", n=3) * codes + (low * high).sum("r"), "int8x2")
    assert plain in e.args and e is not plain


def test_a_dim_that_is_called_column() -> None:
    scale, codes = param("scale", "f32", n=3, column=2), param("codes", "i8", n=3, column=2, k=8)
    e = product_in_int8(X, (scale * codes).sum("column"), "int8x2")
    assert dict(e.dims) == {"m": 2, "n": 3}


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (param("w", "f32", n=3, k=8), "its weights are no integers, and no entries of a small table, under a scale"),
        (cast(Bitcast(param("w", "u8", n=3, k=8), "e4m3"), "f32"), "its weights are no integers"),
        (
            param("s", "f32", n=3) * param("w", "i32", (0, 1 << 24), n=3, k=8),
            "its sums of 8-bit integers may outgrow 32 bits",
        ),
    ],
)
def test_weights_without_integers_are_refused(weight: Expr, why: str) -> None:
    with pytest.raises(UnsuitableError, match=f"^{why}"):
        product_in_int8(X, weight, "int8")


def test_numerics_that_do_not_exist() -> None:
    for numerics in ("int4", None, 8):
        with pytest.raises(ValueError, match=r"^numerics must be one of 'float', 'int8', 'int8x2', not "):
            checked_numerics(numerics)
