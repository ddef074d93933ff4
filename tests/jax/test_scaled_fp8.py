"""Floats of 8 bits under scales: every byte, every shape of a block, and the quantizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lowbit as lb
from lowbit.quantizers import RoundToE4m3
from lowbit.testing.tolerance import gamma, unit

E4M3 = ml_dtypes.float8_e4m3fn
SHAPES = [(2, 45), (1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [lb.scaled_fp8(), lb.scaled_fp8(2, 32, "bfloat16")])
def test_the_kit(fmt: lb.Format) -> None:
    assert "quantizer" in lb.testing.check_format(fmt, SHAPES).passed["n=2 k=45"]


@pytest.mark.parametrize(
    ("rows", "group", "shape"),
    [(1, None, [5]), (None, None, []), (2, 3, [3, 3]), (None, 4, [2]), (1, 4, [5, 2]), (3, None, [2]), (9, 9, [])],
)
def test_each_block_has_its_scale(rows: int | None, group: int | None, shape: list[int]) -> None:
    n, k = 5, 8
    w = lb.testing.random_array(lb.QuantType((("n", n), ("k", k)), "f32", lb.scaled_fp8(rows, group)))
    scale = np.asarray(w.fields["scale"])
    assert list(scale.shape) == shape
    blocks = scale.reshape(-(-n // (rows or n)), -(-k // (group or k)))
    spread = blocks.repeat(rows or n, 0)[:n].repeat(group or k, 1)[:, :k]
    exact = spread.astype(np.float64) * np.asarray(w.fields["code"]).view(E4M3).astype(np.float64)
    assert np.array_equal(lb.dequantize(w), exact.astype(np.float32))


def test_every_float_is_its_own_code() -> None:
    floats = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    floats = floats[np.isfinite(floats)]
    w = lb.quantize_array(floats[:, None], lb.scaled_fp8())
    assert w.fields["scale"] == 1 and np.array_equal(lb.dequantize(w)[:, 0], floats)


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
def test_weights_are_rounded_to_the_nearest(scale_dtype: str) -> None:
    dense = np.random.default_rng(0).standard_normal((64, 12)).astype(np.float32)
    fmt = lb.scaled_fp8(4, 32, scale_dtype)
    w = lb.quantize_array(dense, fmt)
    assert np.asarray(w.fields["scale"]).dtype.name == scale_dtype
    scale = np.asarray(w.fields["scale"]).astype(np.float64).repeat(4, 0).repeat(32, 1).T
    # The largest weight of a block may be cut where its scale was rounded down.
    cut = np.abs(dense) * (unit(scale_dtype) + gamma(2, "f32"))
    least = scale * 2.0**-10  # half of the spacing below the smallest normal e4m3
    bound = np.abs(dense) * (unit("e4m3") + gamma(3, "f32")) + cut + least
    assert (np.abs(np.asarray(lb.dequantize(w)) - dense) <= bound).all()


def test_zeros_stay_zeros() -> None:
    w = lb.quantize_array(np.zeros((8, 4), np.float32), lb.scaled_fp8())
    assert (w.fields["scale"] == 1).all() and not lb.dequantize(w).any()


def test_scales_that_do_not_fit_their_dtype() -> None:
    for weight, message in ((1e-7, "underflows"), (1e9, "overflows")):
        with pytest.raises(ValueError, match=rf"'scale' {message} float16; use scale_dtype='float32'"):
            lb.quantize_array(np.full((8, 4), weight, np.float32), lb.scaled_fp8(scale_dtype="float16"))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_nan_are_refused(code: int) -> None:
    w = lb.quantize_array(np.ones((8, 4), np.float32), lb.scaled_fp8())
    with pytest.raises(ValueError, match=r"^'code' holds 1 codes among 32 that are NaN or inf, read as e4m3"):
        lb.QuantArray.of({**w.fields, "code": w.fields["code"].at[1, 2].set(code)}, w.type)


def test_options_and_formats_that_are_wrong() -> None:
    with pytest.raises(ValueError, match=r"^rows must be a positive int, or None for all outputs, not 0"):
        lb.scaled_fp8(rows=0)
    with pytest.raises(ValueError, match=r"^group must be a positive int, or None for one group a row, not 1\.5"):
        lb.scaled_fp8(group=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^scale_dtype must be"):
        lb.scaled_fp8(scale_dtype="float64")
    with pytest.raises(TypeError, match=r"^RoundToE4m3\(\) makes scaled_fp8, not uniform\(bits=2\)$"):
        lb.quantize_array(jnp.ones((8, 4)), lb.uniform(2), RoundToE4m3())


def test_it_quantizes_under_jit() -> None:
    dense = jax.random.normal(jax.random.key(0), (16, 4))
    traced = jax.jit(lambda w: lb.quantize_array(w, lb.scaled_fp8()))(dense)
    assert np.array_equal(traced.fields["code"], lb.quantize_array(dense, lb.scaled_fp8()).fields["code"])
