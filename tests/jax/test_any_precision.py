"""Formats that are read at several widths: any_precision, and products at a width chosen when they run."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.array import laid_out
from lowbit.ir import param
from lowbit.passes.pointwise import UnsuitableError

FORMAT = lb.any_precision(2, 4)
TYPE = lb.QuantType((("k", 45), ("n", 7)), "f32", FORMAT)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 45)), jnp.float32)


@pytest.fixture(scope="module")
def w() -> lb.QuantArray:
    return lb.testing.random_array(TYPE)


@pytest.fixture(scope="module")
def product() -> Any:
    return jax.jit(lambda x, w, width: lb.matmul(x, w, width=width))


WIDER = lb.any_precision(2, 5, width=3, table_dtype="float32")


@pytest.mark.parametrize("fmt", [FORMAT, pytest.param(WIDER, marks=pytest.mark.slow)])
def test_the_kit(fmt: lb.Format) -> None:
    lb.testing.check_format(fmt)


def test_codes_of_a_width_are_the_leading_bits(w: lb.QuantArray) -> None:
    planes = np.unpackbits(np.asarray(w.fields["planes"]), axis=-1, bitorder="little")[:, :, 0, :45]
    for width in FORMAT.widths:
        code = sum(planes[p].astype(int) << (width - 1 - p) for p in range(width))
        table = np.asarray(w.fields[f"table{width}"], np.float32)
        decoded = lb.dequantize(lb.QuantArray(w.fields, TYPE.at(width)))
        assert np.array_equal(decoded, np.take_along_axis(table, code, 1).T)


def test_all_widths_are_stored_once(w: lb.QuantArray) -> None:
    assert list(TYPE.fields) == ["planes", "table2", "table3", "table4"]
    assert TYPE.bits == 7 * (4 * 8 * 6 + 16 * (4 + 8 + 16))
    assert all(TYPE.at(b).fields == TYPE.fields for b in FORMAT.widths)
    assert [TYPE.role(field) for field in TYPE.fields] == ["code", "codebook", "codebook", "codebook"]


def test_a_width_is_chosen_when_it_runs(w: lb.QuantArray, product: Any) -> None:
    for width in (2, 3, 4):
        assert np.array_equal(product(X, w, jnp.int32(width)), lb.matmul(X, w, width=width))
    assert np.array_equal(product(X, w, jnp.int32(0)), lb.matmul(X, w, width=2))  # the nearest there is
    assert np.array_equal(product(X, w, jnp.int8(100)), lb.matmul(X, w, width=4))
    assert product._cache_size() == 2  # int32 and int8: no width compiles again


def test_a_width_reads_its_own_planes_alone(w: lb.QuantArray, product: Any) -> None:
    lowered = product.lower(X, w, jnp.int32(3))
    assert lowered.as_text().count("stablehlo.case") == 1
    sliced = re.findall(r"\(tensor<4x7x1x6xui8>\) -> tensor<([23])x7x1x6xui8>", lowered.as_text())
    assert sorted(sliced) == ["2", "3"]  # and width 4 takes all of them
    assert lowered.compile().as_text().count(" conditional(") == 1


@pytest.mark.parametrize(
    ("width", "rows", "name"), [(2, 1, "select"), (4, 1, "select"), (8, 1, "decode"), (3, 64, "decode")]
)
def test_the_form_that_is_cheaper_runs(width: int, rows: int, name: str) -> None:
    wide = lb.QuantType((("k", 4096), ("n", 4096)), "f32", lb.any_precision(2, 8, width))
    assert lb.plan((rows, 4096), wide, "cpu").forms[0].name == name


def test_gradients_reach_the_table_of_the_width(w: lb.QuantArray, product: Any) -> None:
    gradient = jax.grad(lambda w, b: product(X, w, b).sum(), allow_int=True)
    for width in FORMAT.widths:
        found = gradient(w, jnp.int32(width)).fields
        expected = jax.grad(lambda w, b=width: lb.matmul(X, w, width=b).sum(), allow_int=True)(w).fields
        for other in FORMAT.widths:
            name = f"table{other}"
            assert np.array_equal(found[name], expected[name]) and bool(found[name].any()) == (other == width)


def test_what_is_refused(w: lb.QuantArray) -> None:
    with pytest.raises(ValueError, match="is read at widths 2 to 4, not 5"):
        lb.matmul(X, w, width=5)
    with pytest.raises(ValueError, match="is read at widths 2 to 4, not True"):
        TYPE.at(True)
    other = lb.testing.random_array(replace(TYPE, format=lb.bcq(2)))
    for width in (2, jnp.int32(2)):
        with pytest.raises(ValueError, match=r"^bcq\(bits=2\) is read at one width only"):
            lb.matmul(X, other, width=width)
    for wrong in (jnp.float32(2), jnp.array([2, 3])):
        with pytest.raises(TypeError, match=r"^width is \w+\[.*\]: give one integer"):
            lb.matmul(X, w, width=wrong)
    with pytest.raises(ValueError, match=r"3 widths under jax\.vmap"):
        jax.vmap(lambda b: lb.matmul(X, w, width=b))(jnp.arange(3))
    with pytest.raises(UnsuitableError, match="read at several widths"):
        laid_out(w)


@pytest.mark.parametrize(("lo", "hi"), [(0, 3), (4, 3), (3, 9), (2.0, 3)])
def test_widths_that_there_are_not(lo: Any, hi: Any) -> None:
    with pytest.raises(ValueError, match=r"^widths go from lo to hi with 1 <= lo <= hi <= 8, not"):
        lb.any_precision(lo, hi)


@pytest.mark.parametrize("width", [1, 5, 3.0])
def test_a_width_of_its_own_is_one_of_them(width: Any) -> None:
    with pytest.raises(ValueError, match=f"^width must be None or an int from lo = 2 to hi = 4, not {width}"):
        lb.any_precision(2, 4, width)


def test_readings_store_the_same_arrays() -> None:
    @lb.register_format("readings_that_differ", views=("width", lambda **_: (1, 2)))
    def differ(n: int, k: int, width: int = 1) -> Any:
        return param("scale", "f32", n=n, w=width).sum("w") * param("codes", "u8", n=n, k=k)

    with pytest.raises(ValueError, match=r"^param 'scale' occurs as f32\[n=7 w=1\] and as f32\[n=7 w=2\]"):
        _ = replace(TYPE, format=differ()).fields
