"""Products by the kernels, on a GPU, against the oracle: formats, halves, rows, sizes that fit no tile."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.array import QuantArray, laid_out
from lowbit.formats.format import Format
from lowbit.testing.checks import check_product, random_array, random_rows
from tests.fp3 import fp3_rows
from tests.hopper import needed

needed()

FORMATS = {
    "uniform4": lb.uniform(4, group=128, scale_dtype="float16"),
    "bcq4": lb.bcq(4, group=128, scale_dtype="float16"),
    "bcq3": lb.bcq(3, group=128, scale_dtype="float16"),
    "bcq2": lb.bcq(2, group=128, scale_dtype="float16"),
}
OTHERS = {
    "bcq1": lb.bcq(1, group=128, scale_dtype="bfloat16"),
    "bcq4_offset": lb.bcq(4, group=64, offset=True),
    "bcq3_offset": lb.bcq(3, group=512, offset=True),
    "uniform2": lb.uniform(2, group=512),
    "uniform4_rows": lb.uniform(4),
    "from_outside": fp3_rows(),
    "m1v4": lb.codebook(1, 8, vec=4, group=128, scale_dtype="float16"),
    "m2v8": lb.codebook(2, 8, vec=8, group=128, scale_dtype="float16"),
    "vectors_of_2": lb.codebook(1, 8, vec=2, group=128),
    "vectors_of_16": lb.codebook(1, 8, vec=16),
    "codes_of_10_bits": lb.codebook(1, 10, vec=4, group=64),
    "nested_fp": lb.nested_fp(),
}
NESTED = {
    "any_precision_from_2": lb.any_precision(2, 8),
    "any_precision_from_3": lb.any_precision(3, 8),
    "any_bcq": lb.any_bcq(2, 4, group=128, scale_dtype="float16"),
    "any_bcq_offset": lb.any_bcq(2, 4, group=64, offset=True),
}
"""Read at every width."""
INTEGERS = [
    *FORMATS.values(),
    lb.uniform(3),
    lb.bcq(4),
    *(lb.any_precision(2, 4, width=width) for width in (2, 3, 4)),
    lb.any_bcq(2, 4, group=128, scale_dtype="float16"),
]
"""With kernels for products in 8-bit integers."""
WIDTHS = [(name, width) for name, fmt in NESTED.items() for width in fmt.widths]
OWN = ("m1v4", "m2v8", "nested_fp")
"""Of OTHERS, those whose kernels hold tables of all rows, or fetch bytes as they are stored."""
SUMMED = ("bcq4", "bcq3", "bcq2", "bcq1", "bcq3_offset", "m1v4", "m2v8", "vectors_of_16")
"""Of both, those that `sums` looks up."""
HALVES = ("float16", "bfloat16")
KERNEL = "mma"


@cache
def prepared(fmt: Format, n: int, k: int) -> QuantArray:
    return jax.jit(laid_out)(random_array(lb.QuantType((("k", k), ("n", n)), "f32", fmt)))


def at(width: int, w: QuantArray) -> QuantArray:
    return QuantArray(w.fields, w.type.at(width))


def rows(m: int, k: int, dtype: Any) -> Any:
    return random_rows(m, k, dtype=dtype) / np.asarray(8, dtype)  # sums stay within float16


@pytest.mark.parametrize("m", [1, 2, 5, 16, 64, 100, 512])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_x(name: str, dtype: str, m: int) -> None:
    check_product(rows(m, 1024, dtype), prepared(FORMATS[name], 256, 1024), KERNEL)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats(name: str, dtype: str) -> None:
    check_product(rows(5, 1024, dtype), prepared(OTHERS[name], 192, 1024), KERNEL)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("name", "width"), WIDTHS)
def test_every_width(name: str, width: int, dtype: str) -> None:
    check_product(rows(5, 1024, dtype), at(width, prepared(NESTED[name], 192, 1024)), KERNEL)


@pytest.mark.parametrize("name", ["any_precision_from_3", "any_bcq", "nested_fp"])
def test_a_width_on_the_device(name: str) -> None:
    """One compiled function; at each width the bits of the static one."""
    w, x = prepared({**NESTED, **OTHERS}[name], 192, 1024), jnp.asarray(rows(5, 1024, "float16"))
    product = partial(lb.matmul, lowering=(KERNEL, "fp8"))
    traced = jax.jit(lambda x, w, width: product(x, w, width=width))
    for width in w.type.format.widths:
        static = jax.jit(partial(product, width=width))(x, w)
        assert np.array_equal(traced(x, w, jnp.int32(width)), static), width


@pytest.mark.parametrize("m", [1, 5, 64, 100, 512])
@pytest.mark.parametrize("lowering", ["fp8", "decode"])
def test_nested_floats_in_8_bits(lowering: str, m: int) -> None:
    check_product(rows(m, 1024, "float16"), at(8, prepared(OTHERS["nested_fp"], 192, 1024)), lowering)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("numerics", ["int8", "int8x2"])
@pytest.mark.parametrize("fmt", INTEGERS, ids=str)
def test_products_in_8_bit_integers(fmt: Format, numerics: Any, dtype: str) -> None:
    for m, n, k in ((1, 256, 1024), (5, 70, 301), (64, 192, 1024)):
        w = prepared(fmt, n, k)
        check_product(rows(m, k, dtype), QuantArray(w.fields, replace(w.type, numerics=numerics)), KERNEL)


@pytest.mark.parametrize("m", [64, 512])
@pytest.mark.parametrize("name", OWN)
def test_more_rows_of_other_formats(name: str, m: int) -> None:
    check_product(rows(m, 1024, "float16"), prepared(OTHERS[name], 256, 1024), KERNEL)


@pytest.mark.parametrize(("n", "k"), [(1, 128), (70, 300), (129, 1000), (200, 2049)])
@pytest.mark.parametrize("name", FORMATS)
def test_sizes_that_fit_no_tile(name: str, n: int, k: int) -> None:
    check_product(rows(3, k, "bfloat16"), prepared(FORMATS[name], n, k), KERNEL)


@pytest.mark.parametrize(("n", "k"), [(70, 301), (200, 2049)])
@pytest.mark.parametrize(("name", "width"), [(name, width) for name, width in WIDTHS if width in (3, 4, 8)])
def test_widths_at_sizes_that_fit_no_tile(name: str, width: int, n: int, k: int) -> None:
    check_product(rows(3, k, "bfloat16"), at(width, prepared(NESTED[name], n, k)), KERNEL)


@pytest.mark.parametrize(("n", "k"), [(70, 301), (200, 2049)])
@pytest.mark.parametrize("name", OWN)
def test_other_formats_at_sizes_that_fit_no_tile(name: str, n: int, k: int) -> None:
    w = prepared(OTHERS[name], n, k)
    check_product(rows(3, k, "float16"), w, KERNEL)
    if name == "nested_fp":
        check_product(rows(3, k, "float16"), at(8, w), "fp8")


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bits_every_time(name: str) -> None:
    """Parts of k are summed in order: no atomics. Many parts, and enough blocks for every SM."""
    w, x = prepared(FORMATS[name], 2048, 8192), jnp.asarray(rows(8, 8192, "bfloat16"))
    first, *others = (np.asarray(lb.matmul(x, w, lowering=KERNEL)).tobytes() for _ in range(20))
    assert all(bits == first for bits in others)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [*HALVES, "float32"])
@pytest.mark.parametrize("name", SUMMED)
def test_sums_that_are_looked_up(name: str, dtype: str, m: int) -> None:
    check_product(rows(m, 1024, dtype), prepared({**FORMATS, **OTHERS}[name], 256, 1024), "sums")


@pytest.mark.parametrize(("n", "k"), [(1, 128), (70, 301), (200, 2049), (8192, 512)])
@pytest.mark.parametrize("name", SUMMED)
def test_sums_at_sizes_that_fit_no_tile(name: str, n: int, k: int) -> None:
    check_product(rows(1, k, "float16"), prepared({**FORMATS, **OTHERS}[name], n, k), "sums")


@pytest.mark.parametrize("name", ["bcq1", "m2v8"])
def test_the_same_sums_every_time(name: str) -> None:
    """Lanes of a row, and chunks of k, are summed in order."""
    w, x = prepared(OTHERS[name], 2048, 8192), jnp.asarray(rows(1, 8192, "bfloat16"))
    first, *others = (np.asarray(lb.matmul(x, w, lowering="sums")).tobytes() for _ in range(20))
    assert all(bits == first for bits in others)


@pytest.mark.parametrize("dtype", HALVES)
def test_decoded_once(dtype: str) -> None:
    check_product(rows(64, 512, dtype), prepared(FORMATS["bcq3"], 192, 512), "dense")


def test_float32_is_refused_and_runs_as_xla_makes_it() -> None:
    w = prepared(FORMATS["uniform4"], 128, 256)
    check_product(random_rows(2, 256), w)
    with pytest.raises(ValueError, match="x is f32, and it multiplies halves"):
        lb.matmul(jnp.ones((2, 256)), w, lowering=KERNEL)


def test_a_prepared_array_is_decoded_as_before() -> None:
    for name, fmt in FORMATS.items():
        t = lb.QuantType((("k", 300), ("n", 70)), "f32", fmt)
        w = random_array(t)
        dense = jax.jit(lb.dequantize)
        assert np.array_equal(dense(w), dense(prepared(fmt, 70, 300))), name
