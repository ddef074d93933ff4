"""Products by the kernels, on a GPU, against the oracle: formats, halves, rows, sizes that fit no tile."""

from __future__ import annotations

from functools import cache
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
    "uniform2": lb.uniform(2, group=512),
    "uniform4_rows": lb.uniform(4),
    "from_outside": fp3_rows(),
}
HALVES = ("float16", "bfloat16")
KERNEL = "mma"


@cache
def prepared(fmt: Format, n: int, k: int) -> QuantArray:
    return jax.jit(laid_out)(random_array(lb.QuantType((("k", k), ("n", n)), "f32", fmt)))


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


@pytest.mark.parametrize(("n", "k"), [(1, 128), (70, 300), (129, 1000), (200, 2049)])
@pytest.mark.parametrize("name", FORMATS)
def test_sizes_that_fit_no_tile(name: str, n: int, k: int) -> None:
    check_product(rows(3, k, "bfloat16"), prepared(FORMATS[name], n, k), KERNEL)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bits_every_time(name: str) -> None:
    """Parts of k are summed in order: no atomics. Many parts, and enough blocks for every SM."""
    w, x = prepared(FORMATS[name], 2048, 8192), jnp.asarray(rows(8, 8192, "bfloat16"))
    first, *others = (np.asarray(lb.matmul(x, w, lowering=KERNEL)).tobytes() for _ in range(20))
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
