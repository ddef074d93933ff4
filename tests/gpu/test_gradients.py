"""Gradients of parameters by the kernel, on a GPU, against the oracle's cotangents."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.array import QuantArray, laid_out
from lowbit.kernels import buckets
from lowbit.kernels.mma_db import table_gradients
from lowbit.kernels.mma_dw import parameter_gradients
from lowbit.quant_type import Split, kernel_layout, readings
from lowbit.testing.checks import random_array, random_rows
from tests.fp3 import fp3_rows
from tests.hopper import needed
from tests.parameter_gradients import check_parameter_gradients, check_table_gradients

needed()

FORMATS = {
    "bcq1": lb.bcq(1, group=128),
    "bcq2": lb.bcq(2, group=32, scale_dtype="float16"),
    "bcq3": lb.bcq(3, group=128, scale_dtype="float16"),
    "bcq4": lb.bcq(4, group=128),
    "bcq4_offset": lb.bcq(4, group=64, offset=True),
    "uniform2": lb.uniform(2, group=512),
    "uniform4": lb.uniform(4, group=128),
    "uniform4_rows": lb.uniform(4),
    "from_outside": fp3_rows(),
    "any_precision_at_2": lb.any_precision(2, 8, width=2),
    "any_precision_at_3": lb.any_precision(3, 8, width=3),
    "any_precision_at_4": lb.any_precision(3, 8, width=4),
    "m1v4": lb.codebook(1, 8, vec=4, group=128),  # of the scales
    "m2v8": lb.codebook(2, 8, vec=8, group=32, scale_dtype="float16"),
    "m1v8_of_10_bits": lb.codebook(1, 10, vec=8, group=128),  # as much as shared memory holds
    "m1v16": lb.codebook(1, 8, vec=16, scale_dtype="bfloat16"),
    "m1v2_of_10_bits": lb.codebook(1, 10, vec=2, group=64),
    "m2v4_of_6_bits": lb.codebook(2, 6, vec=4, group=512),
    "any_bcq_at_4": lb.any_bcq(2, 4, group=128, width=4),
}
HALVES = ("float16", "bfloat16")


@cache
def prepared(name: str, n: int, k: int, splits: tuple[Split, ...] = ()) -> QuantArray:
    return jax.jit(laid_out)(random_array(lb.QuantType((("k", k), ("n", n)), "f32", FORMATS[name], splits)))


@jax.jit
def gradients(x: jax.Array, dy: jax.Array, w: QuantArray) -> dict[str, jax.Array]:
    return parameter_gradients(kernel_layout(w.type), x, dy, w.fields, readings(w.type).index(w.type.decode))


def check(w: QuantArray, dtype: str, m: int) -> None:
    sizes = dict(w.type.dims)
    x, dy = random_rows(m, sizes["k"], dtype=dtype), random_rows(m, sizes["n"], dtype=dtype, seed=3)
    check_parameter_gradients(gradients(jnp.asarray(x), jnp.asarray(dy), w), x, dy, w)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, dtype: str) -> None:
    check(prepared(name, 192, 1024), dtype, 100)


@pytest.mark.parametrize("m", [1, 64, 128, 512, 2048])
@pytest.mark.parametrize("name", ["bcq3", "any_precision_at_4", "m1v4"])
def test_rows_of_x(name: str, m: int) -> None:
    check(prepared(name, 256, 1024), "bfloat16", m)


@pytest.mark.parametrize(("n", "k"), [(1, 128), (70, 301), (129, 1000), (200, 2049)])
@pytest.mark.parametrize("name", ["bcq3", "bcq4", "uniform2", "any_precision_at_3"])
def test_sizes_that_fit_no_tile(name: str, n: int, k: int) -> None:
    check(prepared(name, n, k), "bfloat16", 70)


def test_scales_of_which_some_train() -> None:
    check(prepared("bcq3", 192, 1024, (("alpha", "p", 1),)), "bfloat16", 100)


@pytest.mark.parametrize("name", ["bcq4", "any_precision_at_4"])
def test_the_same_bits_every_time(name: str) -> None:
    w = prepared(name, 2048, 4096)
    x, dy = (jnp.asarray(random_rows(512, size, dtype="bfloat16", seed=size)) for size in (4096, 2048))
    first, *others = ([np.asarray(a).tobytes() for a in gradients(x, dy, w).values()] for _ in range(10))
    assert all(bits == first for bits in others)


# ---------------------------------------------------------------- tables that all rows share

TABLES = ("m1v4", "m2v8", "m1v8_of_10_bits", "m1v16", "m1v2_of_10_bits", "m2v4_of_6_bits")


@jax.jit
def of_tables(x: jax.Array, dy: jax.Array, w: QuantArray) -> dict[str, jax.Array]:
    return table_gradients(kernel_layout(w.type), x, dy, w.fields)


def check_tables(w: QuantArray, dtype: str, m: int) -> None:
    sizes = dict(w.type.dims)
    x, dy = random_rows(m, sizes["k"], dtype=dtype), random_rows(m, sizes["n"], dtype=dtype, seed=3)
    check_table_gradients(of_tables(jnp.asarray(x), jnp.asarray(dy), w), x, dy, w)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str, dtype: str) -> None:
    check_tables(prepared(name, 192, 1024), dtype, 100)


@pytest.mark.parametrize("m", [1, 64, 512, 2048])
@pytest.mark.parametrize("name", ["m1v4", "m2v8"])
def test_tables_and_rows_of_x(name: str, m: int) -> None:
    check_tables(prepared(name, 256, 1024), "bfloat16", m)


@pytest.mark.parametrize(("n", "k"), [(70, 301), (129, 1000), (200, 2049)])
@pytest.mark.parametrize("name", ["m1v4", "m2v8"])
def test_tables_of_sizes_that_fit_no_tile(name: str, n: int, k: int) -> None:
    check_tables(prepared(name, n, k), "bfloat16", 70)


def test_tables_in_bands_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w = prepared("m1v4", 320, 512)
    monkeypatch.setattr(buckets, "PARTS", 4 * 10 * 1024)
    jax.clear_caches()
    check_tables(w, "bfloat16", 100)
    jax.clear_caches()


def test_tables_have_the_same_bits_every_time() -> None:
    w = prepared("m2v8", 2048, 4096)
    x, dy = (jnp.asarray(random_rows(512, size, dtype="bfloat16", seed=size)) for size in (4096, 2048))
    first, *others = (np.asarray(of_tables(x, dy, w)["codebooks"]).tobytes() for _ in range(10))
    assert all(bits == first for bits in others)


def test_what_is_not_finite_stays_so() -> None:
    w = prepared("m1v4", 192, 1024)
    x, dy = random_rows(64, 1024, dtype="bfloat16"), random_rows(64, 192, dtype="bfloat16", seed=3)
    dy[5, 7] = np.nan
    assert not np.isfinite(np.asarray(of_tables(jnp.asarray(x), jnp.asarray(dy), w)["codebooks"])).any()
