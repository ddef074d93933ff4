"""Traces of Hessians in `lb.calibrate`, and what `lb.allocate` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from examples.subjects import tinylm
from lowbit.nn.calibrate import LayerStats

COSTS = jnp.arange(1.0, 5.0)
"""Of each output."""


def trace(model: nnx.Module, batches: Any, loss: Any, **options: Any) -> dict[str, Any]:
    stats = lb.calibrate(model, batches, statistics=["hessian_trace"], loss=loss, **options)
    return {path: of.hessian_trace for path, of in stats.items()}


def squared(y: jax.Array) -> jax.Array:
    return (y * y @ COSTS).sum() / 2


def test_a_diagonal_hessian_is_exact_whatever_the_signs() -> None:
    model = nnx.Dict(a=nnx.Linear(8, 4, rngs=nnx.Rngs(0)), idle=nnx.Linear(2, 2, rngs=nnx.Rngs(1)))
    found = trace(model, [jnp.eye(8), 3 * jnp.eye(8)], lambda m, x: squared(m.a(x)))
    assert found.keys() == {"a"}
    np.testing.assert_array_equal(found["a"], np.float32((1 + 9) / 2 * 2.5), strict=True)


def test_each_slice_of_a_stack_has_its_own() -> None:
    model = nnx.Dict(of=nnx.Einsum("sbk,skn->sbn", (3, 8, 4), rngs=nnx.Rngs(0)))
    x = jnp.stack([jnp.eye(8), 2 * jnp.eye(8), 3 * jnp.eye(8)])
    np.testing.assert_array_equal(trace(model, [x], lambda m, x: squared(m.of(x)))["of"], 2.5 * np.arange(1, 4) ** 2)


def test_each_layer_of_a_scan_has_its_own() -> None:
    @nnx.vmap
    def make(key: jax.Array) -> nnx.Linear:
        return nnx.Linear(8, 4, rngs=nnx.Rngs(key))

    @nnx.scan(in_axes=(0, 0), out_axes=0)
    def run(layer: nnx.Linear, x: jax.Array) -> jax.Array:
        return layer(x)

    model = nnx.Dict(of=make(jax.random.split(jax.random.key(0), 3)))
    x = jnp.stack([jnp.eye(8), 2 * jnp.eye(8), 3 * jnp.eye(8)])
    found = trace(model, [x], lambda m, x: squared(run(m.of, x)))["of"]
    np.testing.assert_array_equal(found, 2.5 * np.arange(1, 4) ** 2)


def test_what_is_quantized_already_is_differentiated_too() -> None:
    last = nnx.Dict(b=nnx.Linear(8, 4, kernel_init=lambda *_: jnp.eye(8, 4), rngs=nnx.Rngs(1)))
    model = nnx.Dict(a=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rest=lb.quantize(last, lb.uniform(4)))
    found = trace(model, [jnp.eye(8)], lambda m, x: squared(m.rest.b(m.a(x))))["a"]
    np.testing.assert_allclose(found, 2.5 / 2, rtol=1e-6)  # half of its outputs reach the loss


@pytest.mark.slow
def test_experts_are_measured_together() -> None:
    model, sizes = nnx.Dict(moe=lb.nn.Experts(2, 8, 4, rngs=nnx.Rngs(0))), jnp.array([8, 8])
    x = jnp.concatenate([jnp.eye(8), 3 * jnp.eye(8)])
    found = trace(model, [x], lambda m, x: squared(m.moe(x, sizes)))["moe"]
    np.testing.assert_array_equal(found, np.float32(2.5 * 5), strict=True)


class Net(nnx.Module):
    def __init__(self) -> None:
        self.up, self.down = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


def fit(model: Any, x: jax.Array) -> jax.Array:
    return ((model(x) - x[:, :2]) ** 2).mean()


@pytest.mark.slow
def test_the_mean_over_signs_is_the_trace() -> None:
    model, x, draws = Net(), jax.random.normal(jax.random.key(0), (64, 4)), 200
    sizes = {"up": 12, "down": 6}

    def of(flat: jax.Array) -> jax.Array:
        up, down = flat[:12].reshape(4, 3), flat[12:].reshape(3, 2)
        y = jnp.tanh(x @ up) @ down  # biases are zero
        return ((y - x[:, :2]) ** 2).mean()

    flat = jnp.concatenate([model.up.kernel[...].ravel(), model.down.kernel[...].ravel()])
    hessian = np.asarray(jax.hessian(of)(flat), np.float64)
    found = trace(model, [x] * draws, fit)
    for path, own in (("up", slice(12)), ("down", slice(12, 18))):
        # Of z_i z_j H_ij: pairs of one layer come twice, those with another layer once.
        off = hessian - np.diag(hessian.diagonal())
        variance = 2 * (off[own, own] ** 2).sum() + (off[own] ** 2).sum() - (off[own, own] ** 2).sum()
        expected = hessian[own, own].trace() / sizes[path]
        error = np.sqrt(variance / draws) / sizes[path]
        assert 0 < 5 * error < 0.5 * expected  # a test that can fail
        assert abs(found[path] - expected) < 5 * error


@pytest.mark.slow
def test_of_a_trained_model_squared_gradients_have_nearly_the_same_trace() -> None:
    """Where a model predicts well, second derivatives are the mean squares of each token's own gradient, which sum up
    like noise: those of the mean over a window are as many times smaller as it has tokens."""
    s = tinylm()
    stats = lb.calibrate(s.model, s.batches[:32], statistics=["hessian_trace", "gradient_square"], loss=s.loss)
    tokens = s.batches[0].shape[1] - 1
    ratios = [float(of.hessian_trace / (tokens * of.gradient_square.mean())) for of in stats.values()]  # type: ignore[operator, union-attr]
    # Of one size: one vector of signs a window leaves single layers uncertain by a factor.
    assert 0.5 < np.median(ratios) < 2 and 0.2 < min(ratios) < max(ratios) < 5


def test_two_layers_with_one_weight_share_it() -> None:
    model = nnx.Dict(a=nnx.Linear(4, 4, rngs=nnx.Rngs(0)), b=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    model.b.kernel = model.a.kernel
    found = trace(model, [jnp.eye(4)], lambda m, x: squared(m.a(x)) + squared(m.b(3 * x)))
    assert found["a"] == found["b"] == 2.5 * 10


@pytest.mark.slow
def test_others_are_measured_as_without(tmp_path: Path) -> None:
    data, names = (
        [jax.random.normal(jax.random.key(i), (5, 4)) for i in range(3)],
        ["second_moment", "gradient_square", "guided_gram"],
    )
    alone = lb.calibrate(Net(), data, statistics=names, loss=fit)
    both = lb.calibrate(Net(), data, statistics=[*names, "hessian_trace"], loss=fit)
    for path, of in alone.items():
        assert of.rows == both[path].rows == 15 and of.hessian_trace is None
        for name in names:
            np.testing.assert_array_equal(getattr(of, name), getattr(both[path], name), strict=True)
    trace(Net(), data[:2], fit, resume=tmp_path)
    resumed = trace(Net(), data, fit, resume=tmp_path)
    np.testing.assert_equal(resumed, trace(Net(), data, fit))
    np.testing.assert_equal(resumed, {path: of.hessian_trace for path, of in both.items()})


def test_allocation_takes_it_before_squared_gradients() -> None:
    model = nnx.Dict(a=nnx.Linear(32, 8, rngs=nnx.Rngs(0)), b=nnx.Linear(32, 8, rngs=nnx.Rngs(1)))
    square = np.ones((32, 8), np.float32)
    stats = {p: LayerStats(None, None, 1, square, hessian_trace=jnp.float32(t)) for p, t in (("a", 2.0), ("b", 8.0))}
    formats = [lb.uniform(2), lb.uniform(4)]
    found = lb.allocate(model, stats, formats=formats, bits=64, by="trace")
    for c in found.chosen:
        w = model[c.layer].kernel[...]
        d = np.asarray(lb.dequantize(lb.quantize_array(w, c.rule.format, dims=("k", "n"))) - w, np.float64)
        np.testing.assert_allclose(c.harm, (2.0 if c.layer == "a" else 8.0) * (d * d).sum(), rtol=1e-4)
    mixed = {"a": stats["a"], "b": LayerStats(None, None, 1, square)}
    with pytest.raises(ValueError, match="of layer 'a' and only 'gradient_square' of layer 'b', which are not of one"):
        lb.allocate(model, mixed, formats=formats, bits=64, by="trace")
    tight = lb.allocate(model, stats, formats=formats, bits=(found.bits_per_weight * 2 - 2) / 2, by="trace")
    assert {rule.path: rule.format["bits"] for rule in tight.rules} == {"a": 2, "b": 4}


@pytest.mark.slow
def test_slices_of_a_stack_count_by_their_own_traces() -> None:
    model, t = nnx.Dict(of=nnx.Einsum("sbk,skn->sbn", (2, 32, 8), rngs=nnx.Rngs(0))), np.array([1.0, 100.0])
    stats = {"of": LayerStats(None, None, 1, hessian_trace=jnp.asarray(t, jnp.float32))}
    (c,) = lb.allocate(model, stats, formats=[lb.uniform(2)], bits=64, by="trace").chosen
    w = model["of"].kernel[...]
    d = np.asarray(lb.dequantize(lb.quantize_array(w, lb.uniform(2), dims=("k", "n"))) - w, np.float64)
    np.testing.assert_allclose(c.harm, (t * (d * d).sum((1, 2))).sum(), rtol=1e-4)


def test_quantizers_cannot_weigh_by_it() -> None:
    rule = lb.Rule("up", lb.bcq(2), lb.alternating(weighs_by=("hessian_trace",)))
    with pytest.raises(ValueError, match=r"^rule 'up': weighs_by="):
        lb.calibrate(Net(), [jnp.ones((1, 4))], rules=[rule], loss=fit)


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (
            -1.0,
            (),
            "layer 'a': the trace of its second derivatives is estimated at -1 a weight, .*: measure more batches",
        ),
        (np.nan, (), "'hessian_trace' of layer 'a' in stats has 1 NaN"),
        (1.0, (2,), r"has 'hessian_trace' of layer 'a' with the shape \(2,\)"),
    ],
)
def test_what_is_no_trace_is_refused(value: float, shape: tuple[int, ...], message: str) -> None:
    model = nnx.Dict(a=nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    stats = {"a": LayerStats(None, None, 1, hessian_trace=jnp.full(shape, value))}
    with pytest.raises(ValueError, match=message):
        lb.allocate(model, stats, formats=[lb.uniform(2)], bits=3, by="trace")


def test_it_needs_a_scalar_loss() -> None:
    with pytest.raises(ValueError, match="'hessian_trace' is of the loss's derivatives: give loss="):
        lb.calibrate(Net(), [jnp.ones((1, 4))], statistics=["hessian_trace"])
    with pytest.raises(ValueError, match=r"the loss has shape \(1, 2\): give one that is a scalar"):
        trace(Net(), [jnp.ones((1, 4))], lambda m, x: m(x))
