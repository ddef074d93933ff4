"""Nested floats whose width inputs choose: by what it changes in products, and by given thresholds on statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.nn.statistics import largest, norm, peak
from lowbit.testing.tolerance import gamma
from lowbit.tune.captured import exact
from lowbit.tune.estimators import Estimators, fitted
from lowbit.tune.precision import _blend

RNG = np.random.default_rng(0)
DENSE = nnx.Dict(
    a=nnx.Linear(16, 8, use_bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float16),
    b=nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(1), param_dtype=jnp.float16),
)
SMALL = lb.quantize(DENSE, lb.nested_fp())
X = jnp.asarray(RNG.standard_normal((32, 16)), jnp.float32)
OUT = X.at[::4, 3].set(20.0)  # one input of every fourth row stands out
IS_OUT = np.arange(32) % 4 == 0


def a_only(model: Any, x: jax.Array) -> jax.Array:
    y: jax.Array = model.a(x)
    return y


run = nnx.jit(lambda model, x: lb.nn.effective_bits(a_only, model, x))


def at(x: jax.Array, width: int) -> np.ndarray:
    return np.asarray(lb.matmul(x, SMALL.a.kernel.array, width=width), np.float64)


def bound(x: Any) -> np.ndarray:
    """Of a product in float32, made twice."""
    w = np.abs(np.asarray(DENSE.a.kernel[...], np.float64))
    return 2 * gamma(16 + 8, "float32") * (np.abs(np.asarray(x)) @ w) * (1 + 2**-4) ** 2  # both rounded to e4m3


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_are_taken_in_float32(dtype: str) -> None:
    x = jnp.asarray(RNG.standard_normal((8, 64)) * 1e4, dtype)  # whose squares are infinite in float16
    exactly = np.asarray(x, np.float64)
    norms, most = np.linalg.norm(exactly, axis=1), np.abs(exactly).max(1)
    near = gamma(64 + 4, "float32")
    np.testing.assert_array_equal(largest(x), most)
    np.testing.assert_allclose(norm(x), norms, rtol=near)
    np.testing.assert_allclose(peak(x), most / (norms / 8), rtol=near)


def test_rows_of_zeros_of_nan_and_out_of_range() -> None:
    rows = jnp.asarray([[0, 0, 0, 0], [1, np.nan, 0, 0], [1, -np.inf, 0, 0], [3e38, 0, 3e38, 0]], jnp.float32)
    np.testing.assert_array_equal(norm(rows), np.float32([0, np.nan, np.inf, np.inf]))
    np.testing.assert_array_equal(largest(rows), np.float32([0, np.nan, np.inf, 3e38]))
    np.testing.assert_allclose(peak(rows[:3]), [0, np.nan, np.nan])
    assert peak(rows)[3] > 1.4  # sqrt 2, or inf where 1 / 3e38 is flushed to zero: never a row that asks for less
    assert not np.asarray(jax.grad(lambda x: norm(x).sum())(rows[:1])).any()


# ---------------------------------------------------------------- thresholds that are given


def test_rows_above_a_threshold_have_the_larger_width_in_one_program() -> None:
    before = run.jitted_fn._cache_size()
    x = OUT.at[1].set(jnp.nan)
    for threshold, is_high in ((3.5, IS_OUT), (np.inf, np.zeros(32, bool)), (-np.inf, np.ones(32, bool))):
        y, bits = run(lb.tune.switched_by(SMALL, "peak", threshold), x)
        is_high = is_high | (np.arange(32) == 1)  # NaN is not below any threshold
        assert float(bits.mean) == float(bits.layers["a"]) == 8 + 8 * is_high.mean()
        expected = np.where(is_high[:, None], at(x, 16), at(x, 8))
        assert np.isnan(y[1]).all() and np.isfinite(np.delete(y, 1, 0)).all()
        difference = np.delete(np.abs(np.asarray(y) - expected), 1, 0)
        assert (difference <= np.delete(bound(x), 1, 0)).all()
    assert run.jitted_fn._cache_size() == before + 1


def test_a_threshold_itself_is_not_above_it() -> None:
    x = jnp.zeros((3, 16)).at[:, 0].set(jnp.asarray([1.0, 2.0, 3.0]))
    for statistic in ("norm", "largest"):
        model = lb.tune.switched_by(SMALL, statistic, {"a": jnp.float32(2), "b": 0.0})
        assert float(run(model, x)[1].layers["a"]) == pytest.approx((8 + 8 + 16) / 3)


@pytest.mark.slow
def test_a_call_has_the_largest_width_of_its_rows() -> None:
    model = lb.nn.switching(lb.tune.switched_by(SMALL, "peak", 3.9), "call")
    calm = OUT[~np.isin(np.arange(32), np.arange(0, 32, 4))][:4]
    for x, width in ((calm, 8), (calm.at[2].set(OUT[0]), 16), (calm.at[2].set(jnp.nan), 16)):
        y, bits = run(model, x)
        assert float(bits.mean) == width
        kept = [0, 1, 3]
        assert (np.abs(np.asarray(y) - at(x, width))[kept] <= bound(x)[kept]).all()
    most = lb.nn.switching(model, "most")
    assert float(run(most, calm)[1].mean) == 16


def test_widths_can_be_named_and_the_model_saved(tmp_path: Path) -> None:
    small = lb.quantize(DENSE, lb.any_precision(2, 4))
    model = lb.tune.switched_by(small, "largest", 20.0, low=3, layers="a")
    assert small.a.kernel.reader is None is model.b.kernel.reader
    assert [int(getattr(model.a.kernel.reader, name)[...]) for name in ("low", "high", "most")] == [3, 4, 4]
    lb.save(model, tmp_path / "m.safetensors")
    into = nnx.eval_shape(lambda: lb.tune.switched_by(small, "largest", 0.0, low=3, layers="a"))
    again = lb.load(tmp_path / "m.safetensors", into=into)
    assert float(again.a.kernel.reader.threshold[...]) == 20.0
    other = nnx.eval_shape(lambda: lb.tune.switched_by(small, "peak", 0.0, layers="a"))
    with pytest.raises(ValueError, match="largest"):  # a threshold means nothing without its statistic
        lb.load(tmp_path / "m.safetensors", into=other)


def test_choices_that_are_refused() -> None:
    with pytest.raises(ValueError, match="statistic='max' must be one of norm, largest, peak"):
        lb.tune.switched_by(SMALL, "max", 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="c/\\*"):
        lb.tune.switched_by(SMALL, "peak", 1.0, layers="c/*")
    mixed = lb.quantize(DENSE, {"a": lb.uniform(4), "b": lb.nested_fp()})
    with pytest.raises(ValueError, match=r"'a' \(Linear as uniform\(bits=4\)\) cannot choose between widths"):
        lb.tune.switched_by(mixed, "peak", 1.0)
    with pytest.raises(ValueError, match=r"'a' is nested_fp\(\), of widths \(8, 16\), not 4"):
        lb.tune.switched_by(SMALL, "peak", 1.0, low=4)
    with pytest.raises(ValueError, match=r"'a': low=16 must be below high=16"):
        lb.tune.switched_by(SMALL, "peak", 1.0, low=16)
    with pytest.raises(ValueError, match=r"threshold of layer 'a' has the shape \[2\]"):
        lb.tune.switched_by(SMALL, "peak", jnp.ones(2))
    with pytest.raises(ValueError, match="threshold of layer 'b' is NaN"):
        lb.tune.switched_by(SMALL, "peak", {"a": 1.0, "b": np.nan})
    with pytest.raises(ValueError, match="no number for layer 'b'"):
        lb.tune.switched_by(SMALL, "peak", {"a": 1.0})
    with pytest.raises(ValueError, match="has a layer 'c', and those that choose are a, b"):
        lb.tune.switched_by(SMALL, "peak", {"a": 1.0, "b": 1.0, "c": 1.0})


# ---------------------------------------------------------------- thresholds that are learned


def test_the_change_of_a_width_counts_the_rounding_of_activations() -> None:
    array = SMALL.a.kernel.array
    errors = np.asarray(exact(X, array, 8, 16))
    slack = np.linalg.norm(bound(X), axis=1)
    assert (np.abs(errors - np.linalg.norm(at(X, 16) - at(X, 8), axis=1)) <= slack).all()
    weights = np.asarray(DENSE.a.kernel[...], np.float64)
    low = np.asarray(lb.dequantize(lb.QuantArray(array.fields, array.type.at(8))), np.float64)
    of_weights = np.linalg.norm(np.asarray(X, np.float64) @ (weights - low), axis=1)
    assert errors.mean() > 1.2 * of_weights.mean()  # about as much again, independent: sqrt 2


def test_projections_start_from_the_size_of_the_errors() -> None:
    difference = jnp.asarray(RNG.standard_normal((16, 8)), jnp.float32)
    errors = 1.4 * norm(X @ difference)  # as if activations were rounded too
    found = Estimators(steps=0).projected(X, difference, errors, 0)["projection"].astype(jnp.float32)
    estimates = norm(X @ found.T)
    off = float(jnp.vdot(estimates, errors) / jnp.vdot(estimates, estimates)) - 1
    assert abs(off) <= 2**-8  # rounding to bfloat16
    assert not np.asarray(fitted(jnp.zeros((4, 16)), X, errors)).any()


@pytest.mark.slow
def test_the_gradient_of_a_precision_counts_it_too() -> None:
    array = SMALL.a.kernel.array
    _, back = jax.vjp(lambda bits: _blend(array.type, (8, 16), X, array.fields, bits), jnp.float32(12))
    expected = (at(X, 16) - at(X, 8)).sum() / 8
    assert abs(float(back(jnp.ones((32, 8)))[0]) - expected) <= (bound(X) + gamma(256, "float32")).sum() / 8


def test_learned_thresholds_are_quantiles_of_that_change_or_of_a_statistic(tmp_path: Path) -> None:
    def both(model: Any, x: jax.Array) -> jax.Array:
        y: jax.Array = model.b(model.a(x))
        return y

    start = lb.tune.blended(SMALL, {"a": 16, "b": 8}, target=12)
    share = (float(start.a.kernel.reader.bits) - 8) / 8
    for estimators, values in ((None, exact(OUT, SMALL.a.kernel.array, 8, 16)), ("peak", peak(OUT))):
        found = lb.tune.thresholds(start, DENSE, [OUT], both, estimators=estimators)  # type: ignore[arg-type]
        expected = np.quantile(np.asarray(values), 1 - share)
        assert float(found.layers["a"]["threshold"]) == pytest.approx(expected, rel=1e-5)
        assert ("peak" in found.layers["a"]) == ("peak" in found.layers["b"]) == (estimators == "peak")
        found.save(tmp_path / "t.safetensors")
        again = lb.tune.Thresholds.load(tmp_path / "t.safetensors")
        bits = run(lb.tune.switched(SMALL, again), OUT)[1]
        assert abs(float(bits.layers["a"]) - (8 + 8 * share)) <= 8 / len(OUT)  # a row more or less
    with pytest.raises(ValueError, match="statistic='rms' must be one of"):
        lb.tune.thresholds(start, DENSE, [OUT], both, estimators="rms")  # type: ignore[arg-type]


@pytest.mark.slow
def test_generating_and_serving_read_16_bits_where_they_are_asked_for() -> None:
    sizes = {"vocab": 16, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head": 8, "hidden": 16, "context": 32}
    dense = lb.models.Decoder(lb.models.Config(**sizes), rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    small = lb.quantize(dense, {"layers/**": lb.nested_fp()})
    alone = lb.models.generate(lb.at_width(small, 16), [[1, 2, 3]], 4)
    switched = lb.tune.switched_by(small, "peak", -jnp.inf)
    assert lb.models.generate(switched, [[1, 2, 3]], 4) == alone
    batcher = lb.models.Batcher(switched, rows=2, slots=16)
    batcher.add([1, 2, 3], 4)
    served = []
    while batcher.busy:
        served += [new.token for new in batcher.step()]
    assert served == alone[0][-4:]
