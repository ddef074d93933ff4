"""Gradients of activations by the kernel, on a GPU, against the oracle."""

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
from lowbit.testing.checks import assert_dx, random_array, random_rows
from tests.fp3 import fp3_rows
from tests.hopper import needed

needed()

FORMATS = {
    "uniform4": lb.uniform(4, group=128, scale_dtype="float16"),
    "uniform4_rows": lb.uniform(4),
    "bcq1": lb.bcq(1, group=128, scale_dtype="bfloat16"),
    "bcq3": lb.bcq(3, group=128, scale_dtype="float16"),
    "bcq4": lb.bcq(4, group=512, scale_dtype="float16"),
    "from_outside": fp3_rows(),
    "any_bcq_at_3": lb.any_bcq(2, 4, group=128, scale_dtype="float16", width=3),
    "any_precision_at_3": lb.any_precision(3, 8, width=3),
    "any_precision_at_4": lb.any_precision(3, 8, width=4),
    "any_precision_at_5": lb.any_precision(3, 8, width=5),
    "m1v4": lb.codebook(1, 8, vec=4, group=128, scale_dtype="float16"),
    "m2v8": lb.codebook(2, 8, vec=8, group=128, scale_dtype="float16"),
    "nested_fp": lb.nested_fp(),
}
FEW = ("uniform4", "any_precision_at_4", "m1v4")
HALVES = ("float16", "bfloat16")


@cache
def arrays(fmt: Format, n: int, k: int) -> tuple[QuantArray, QuantArray]:
    """In the format's own layout, and in the kernels'."""
    w = random_array(lb.QuantType((("k", k), ("n", n)), "f32", fmt))
    return w, jax.jit(laid_out)(w)


def back(dy: Any, w: QuantArray) -> jax.Array:
    """The gradient of x by the kernel."""

    @jax.jit
    def pull(dy: jax.Array, w: QuantArray) -> jax.Array:
        x = jnp.zeros((len(dy), dict(w.type.dims)["k"]), dy.dtype)
        dx: jax.Array = jax.vjp(lambda x: lb.matmul(x, w, lowering="mma_dx"), x)[1](dy)[0]
        return dx

    return pull(jnp.asarray(dy), w)


def check(name: str, dtype: str, m: int, n: int, k: int) -> None:
    w, there = arrays(FORMATS[name], n, k)
    dy = random_rows(m, n, dtype=dtype) / np.asarray(8, dtype)  # sums stay within float16
    assert_dx(np.asarray(back(dy, there)), dy, w)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, dtype: str) -> None:
    check(name, dtype, 64, 1024, 512)


@pytest.mark.parametrize("m", [1, 5, 100, 512])
@pytest.mark.parametrize("name", FEW)
def test_rows_of_dy(name: str, m: int) -> None:
    check(name, "bfloat16", m, 1024, 256)


@pytest.mark.parametrize(("n", "k"), [(1, 128), (70, 301), (129, 1000), (2049, 200)])
@pytest.mark.parametrize("name", [*FEW, "nested_fp"])
def test_sizes_that_fit_no_tile(name: str, n: int, k: int) -> None:
    check(name, "float16", 3, n, k)


@pytest.mark.parametrize("name", FEW)
def test_the_same_bits_every_time(name: str) -> None:
    """Parts of n are summed in order. Tiles are decoded where others were multiplied, and tables replaced."""
    _, there = arrays(FORMATS[name], 8192, 2048)
    dy = random_rows(128, 8192, dtype="bfloat16")
    first, *others = (np.asarray(back(dy, there)).tobytes() for _ in range(20))
    assert all(bits == first for bits in others)
