"""DP-LLM: widths within a budget, precisions that are trained, thresholds, and layers that choose as they run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit as lb
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.kernel import Kernel, layer_kernels
from lowbit.nn.statistics import norm
from lowbit.testing.tolerance import gamma, unit
from lowbit.tune.estimators import Estimators, line, random_projection, tuned
from lowbit.tune.nested import fingerprint
from lowbit.tune.precision import _blend, pair
from lowbit.tune.thresholds import _quantile
from tests.models import Two

RNG = np.random.default_rng(0)
FORMAT = lb.any_precision(2, 4, table_dtype="float32")
X = jnp.asarray(RNG.standard_normal((64, 16)), jnp.float32)
QUICK = Estimators(steps=20)


DENSE = Two()
SMALL = lb.quantize(DENSE, FORMAT)
SIZES = {"first": 256, "second": 128}


def weight(path: str, width: int) -> np.ndarray:
    kernel = getattr(SMALL, path).kernel
    return np.asarray(lb.dequantize(lb.QuantArray(kernel.array.fields, kernel.type.at(width))), np.float64)


def delta(path: str, low: int, high: int) -> np.ndarray:
    return weight(path, high) - weight(path, low)


def exact(x: Any, difference: Any) -> jax.Array:
    """||x difference|| of each row."""
    return jnp.asarray(np.linalg.norm(np.asarray(x, np.float64) @ np.asarray(difference), axis=1), jnp.float32)


def bound(x: Any, *read: np.ndarray) -> np.ndarray:
    """Of products in float32: a rounding for each term of a sum, and a few for what is done with them after it."""
    return gamma(x.shape[1] + 8, "float32") * (np.abs(np.asarray(x)) @ sum(map(np.abs, read)))


def layer_inputs() -> dict[str, np.ndarray]:
    return {"first": np.asarray(X), "second": np.asarray(nnx.relu(DENSE.first(X)))}


def stats() -> dict[str, LayerStats]:
    shapes = {"first": (16, 16), "second": (16, 8)}
    return {
        path: LayerStats(None, None, 1, gradient_square=RNG.uniform(0.1, 2, shape).astype(np.float32))
        for path, shape in shapes.items()
    }


# ---------------------------------------------------------------- the budget


def test_widths_within_a_budget_are_those_of_the_least_harm() -> None:
    measured = stats()
    dense = {path: np.asarray(getattr(DENSE, path).kernel.get_value(), np.float64) for path in SIZES}

    def harm(path: str, b: int) -> float:
        return float((measured[path].gradient_square * (weight(path, b) - dense[path]) ** 2).sum())

    for bits in (2.0, 2.5, 3.1, 4.0, 9.0):
        every = (dict(zip(SIZES, widths, strict=True)) for widths in itertools.product((2, 3, 4), repeat=2))
        kept = [w for w in every if sum(SIZES[p] * b for p, b in w.items()) <= bits * sum(SIZES.values())]
        best = min(kept, key=lambda w: sum(harm(p, b) for p, b in w.items()))
        assert lb.tune.max_widths(SMALL, DENSE, measured, bits=bits) == best


def test_budgets_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.5 bits per weight, and the smallest .* 2 bits"):
        lb.tune.max_widths(SMALL, DENSE, stats(), bits=1.5)
    with pytest.raises(ValueError, match="stats has no layer 'second'"):
        lb.tune.max_widths(SMALL, DENSE, {"first": stats()["first"]}, bits=3)
    with pytest.raises(ValueError, match="dense model has no layer 'first'"):
        lb.tune.max_widths(SMALL, nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0))), stats(), bits=3)
    other = nnx.Dict(first=nnx.Linear(16, 9, rngs=nnx.Rngs(0)), second=DENSE.second)
    measured = {**stats(), "first": LayerStats(None, None, 1, gradient_square=np.ones((16, 9), np.float32))}
    with pytest.raises(ValueError, match=r"'first' is \[16, 16\] and in the dense model \[16, 9\]"):
        lb.tune.max_widths(SMALL, other, measured, bits=3)
    other = nnx.Dict(first=DENSE.first, second=nnx.Linear(16, 8, rngs=nnx.Rngs(1)))
    with pytest.raises(ValueError, match="'second' is farther from that of the dense model than zeros are, at 4 bits"):
        lb.tune.max_widths(SMALL, other, stats(), bits=3)


def test_planes_beyond_the_largest_widths_are_dropped() -> None:
    most = {"first": 3, "second": 2}
    less = lb.tune.narrowed(SMALL, most)
    assert {p: getattr(less, p).kernel.type.format.widths for p in most} == {"first": (2, 3), "second": (2,)}
    assert set(less.first.kernel.type.fields) == {"planes", "table2", "table3"}
    expected = sum(n * (16 * b // 8 + 4 * sum(2**w for w in range(2, b + 1))) for n, b in ((16, 3), (8, 2)))
    stored = sum(row.bytes for row in lb.report(less).rows if row.format.startswith("any_precision"))
    assert stored == expected
    for path, b in (("first", 2), ("first", 3), ("second", 2)):
        array = getattr(less, path).kernel.array
        read = lb.dequantize(lb.QuantArray(array.fields, array.type.at(b)))
        np.testing.assert_array_equal(np.asarray(read, np.float64), weight(path, b))
    assert float(lb.tune.mean_bits(lb.tune.blended(less, most, 2.5))) == pytest.approx((256 * 2.5 + 128 * 2) / 384)
    assert np.isnan(less.first.kernel.stats.get_value()).all()
    at = lb.tune.narrowed(lb.at_width(SMALL, 2), 3)
    assert at.first.kernel.type.format["width"] == 2
    assert SMALL.first.kernel.planes.shape[0] == 4 and lb.tune.narrowed(SMALL, 4).first.kernel.type.format == FORMAT
    bcq = nnx.Dict(first=layer(lb.any_bcq(1, 3, group=8, offset=True)))
    two = lb.at_width(bcq, 2).first.kernel.array
    np.testing.assert_array_equal(lb.dequantize(lb.tune.narrowed(bcq, 2).first.kernel.array), lb.dequantize(two))


def test_planes_that_cannot_be_dropped() -> None:
    with pytest.raises(ValueError, match="most has no width for layer 'second'"):
        lb.tune.narrowed(SMALL, {"first": 3})
    with pytest.raises(ValueError, match=r"'first' is nested_fp\(\), which is stored whole: its largest width is 16"):
        lb.tune.narrowed(nnx.Dict(first=layer(lb.nested_fp())), 8)
    with pytest.raises(ValueError, match=r"'first' chooses between its widths or is laid.*: narrow it before"):
        lb.tune.narrowed(lb.tune.blended(SMALL, 4, 2.5), 3)


def layer(fmt: lb.Format) -> lb.nn.Linear:
    """Of random codes."""
    array = lb.testing.random_array(lb.QuantType((("k", 16), ("n", 4)), "f32", fmt))
    return lb.nn.Linear(Kernel(array, jnp.zeros(2)), None, None)


@pytest.mark.slow
def test_a_model_without_the_planes_it_does_not_need_switches_as_the_whole_one() -> None:
    most = {"first": 3, "second": 2}
    less = lb.tune.narrowed(SMALL, most)
    found = lb.tune.thresholds(lb.tune.blended(less, most, 2.5), DENSE, [X], estimators=None)
    assert float(found.layers["second"]["threshold"]) == np.inf
    of_whole = replace(found, base=fingerprint(layer_kernels(SMALL), SIZES))
    np.testing.assert_array_equal(lb.tune.switched(SMALL, of_whole)(X), lb.tune.switched(less, found)(X))
    assert lb.tune.max_widths(less, DENSE, stats(), bits=9) == most
    with pytest.raises(ValueError, match=r"'first' chooses between its widths or is laid.*: narrow it before"):
        lb.tune.narrowed(lb.prepare(SMALL, "hopper"), 3)


# ---------------------------------------------------------------- precisions


def test_a_precision_blends_the_two_widths_next_to_it() -> None:
    model = lb.tune.blended(SMALL, {"first": 4, "second": 2}, 2.5)
    blend, fixed = model.first.kernel.reader, model.second.kernel.reader
    assert float(blend.bits) == pytest.approx(2.5) and fixed.z is None and float(fixed.bits) == 2
    assert float(lb.tune.mean_bits(model)) == pytest.approx((256 * 2.5 + 128 * 2) / 384)
    low, high = weight("first", 2), weight("first", 3)
    y = np.asarray(X, np.float64) @ (low + high) / 2  # the bias is zero
    assert (np.abs(np.asarray(model.first(X)) - y) <= bound(X, low, high)).all()
    assert np.array_equal(model.second(X), lb.at_width(SMALL, 2).second(X))
    assert SMALL.first.kernel.reader is None


def test_which_widths_are_blended_may_be_given() -> None:
    blend = lb.tune.blended(SMALL, 4, 2.5, widths=(4, 2)).first.kernel.reader
    assert blend.widths == (2, 4) and float(blend.bits) == pytest.approx(2.5)
    y = _blend(SMALL.first.kernel.array.type, blend.widths, X, SMALL.first.kernel.array.fields, blend.bits)
    low, high = weight("first", 2), weight("first", 4)
    assert (np.abs(np.asarray(y) - np.asarray(X) @ (0.75 * low + 0.25 * high)) <= bound(X, low, high)).all()
    values = choices(2.5, widths=(2, 4), estimators=None).layers["first"]
    errors = np.linalg.norm(np.asarray(X, np.float64) @ delta("first", 2, 4), axis=1)
    assert [int(values[name]) for name in ("low", "high")] == [2, 4]
    assert float(values["threshold"]) == pytest.approx(np.quantile(errors, 0.75), rel=1e-5)
    with pytest.raises(ValueError, match=r"'first' is any_precision.* \(2, 3, 4\), not 5"):
        lb.tune.blended(SMALL, 4, 2.5, widths=(2, 4, 5))
    with pytest.raises(ValueError, match=r"most=3 of layer 'second' is none of widths=\(2, 4\)"):
        lb.tune.blended(SMALL, {"first": 4, "second": 3}, 2.5, widths=(2, 4))
    with pytest.raises(ValueError, match=r"target=2\.5 .* from 3 to 4 bits"):
        lb.tune.blended(SMALL, 4, 2.5, widths=(3, 4))


def test_a_precision_at_a_width_is_that_width() -> None:
    for bits, index, share in ((2.0, 0, 0.0), (2.75, 0, 0.75), (3.0, 1, 0.0), (4.0, 1, 1.0)):
        found = pair((2, 3, 4), jnp.float32(bits))
        assert (int(found[0]), float(found[1])) == (index, share)
    assert tuple(map(float, pair((8, 16), jnp.float32(12)))) == (0, 0.5)
    array = SMALL.second.kernel.array
    for bits in (2, 3, 4):
        y = _blend(array.type, (2, 3, 4), X, array.fields, jnp.float32(bits))
        assert np.array_equal(y, lb.matmul(X, array, width=bits))


def test_the_gradient_of_a_precision_is_the_difference_of_the_widths() -> None:
    array = lb.testing.random_array(lb.QuantType((("k", 32), ("n", 8)), "f32", FORMAT))
    x, dy = (jnp.asarray(RNG.standard_normal((16, size)), jnp.float32) for size in (32, 8))
    _, back = jax.vjp(lambda x, bits: _blend(array.type, (2, 3, 4), x, array.fields, bits), x, jnp.float32(3.25))
    dx, d_bits = back(dy)
    low, high = (np.asarray(lb.dequantize(lb.QuantArray(array.fields, array.type.at(b))), np.float64) for b in (3, 4))
    terms = np.asarray(dy, np.float64) * (np.asarray(x, np.float64) @ (high - low))
    scale = np.abs(np.asarray(dy)) * (np.abs(np.asarray(x)) @ (np.abs(low) + np.abs(high)))
    assert abs(float(d_bits) - terms.sum()) <= gamma(terms.size + 40, "float32") * scale.sum()
    mixed = 0.75 * low + 0.25 * high
    assert (np.abs(np.asarray(dx) - np.asarray(dy, np.float64) @ mixed.T) <= bound(dy, low.T, high.T)).all()
    kept = {a.shape for a in jax.tree.leaves(back) if isinstance(a, jax.Array)}
    assert kept == {x.shape, dy.shape, (), *(a.shape for a in array.fields.values())}  # and so no decoded weight


def test_training_moves_precisions_to_the_target_and_leaves_all_else() -> None:
    model = lb.tune.blended(SMALL, 4, 3.5)

    def loss(m: Any, x: Any) -> Any:
        return ((m(x) - DENSE(x)) ** 2).sum(), jnp.float32(x.size)

    toward = lb.tune.Toward(2.5, alpha=10.0, loss=loss)
    total, count = toward(model, X)
    assert float(total / count) == pytest.approx(float(loss(model, X)[0]) / X.size + 10.0, rel=1e-5)
    for target, alpha in ((2.25, 10), (2.3, 1)):  # the published ones
        pulled = float(lb.tune.Toward(target, loss=loss)(model, X)[0] - loss(model, X)[0]) / X.size
        assert pulled == pytest.approx(alpha * (3.5 - target) ** 2, rel=1e-4)
    trained = lb.tune.train(
        model, [X] * 60, tx=optax.adamw(5e-2, weight_decay=1e-2), steps=60, wrt=lb.Threshold, loss=toward
    )
    assert abs(float(lb.tune.mean_bits(trained.model)) - 2.5) < 0.1
    assert lb.tune.Toward(2.5, alpha=10.0, loss=loss) == toward  # one compiled step for both
    for path in SIZES:
        held, before = getattr(trained.model, path).kernel.array.fields, getattr(SMALL, path).kernel.array.fields
        assert all(np.array_equal(held[name], before[name]) for name in before)


def test_models_whose_layers_have_no_precision_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target=5.* from 2 to 4 bits"):
        lb.tune.blended(SMALL, 4, 5.0)
    with pytest.raises(ValueError, match=r"target=1.9"):
        lb.tune.blended(SMALL, 4, 1.9)
    with pytest.raises(ValueError, match="most has no width for layer 'second'"):
        lb.tune.blended(SMALL, {"first": 3}, 2.5)
    with pytest.raises(ValueError, match=r"'first' is any_precision.* \(2, 3, 4\), not 5"):
        lb.tune.blended(SMALL, 5, 2.5)
    uniform = lb.quantize(DENSE, {"first": lb.uniform(4), "second": FORMAT})
    with pytest.raises(ValueError, match=r"'first' \(Linear as uniform\(bits=4\)\) cannot choose"):
        lb.tune.blended(uniform, 4, 2.5)
    assert float(lb.tune.mean_bits(lb.tune.blended(uniform, 4, 2.5, layers="second"))) == pytest.approx(2.5)
    table = lb.quantize(nnx.Dict(e=nnx.Embed(16, 16, rngs=nnx.Rngs(0))), FORMAT)
    with pytest.raises(ValueError, match=r"'e' \(Embed as any_precision"):
        lb.tune.blended(table, 4, 2.5)
    for call in (lb.tune.mean_bits, lambda m: lb.tune.thresholds(m, DENSE, [X])):
        with pytest.raises(ValueError, match=r"no layer with an average precision"):
            call(SMALL)
    with pytest.raises(ValueError, match="read at a width that may change"):
        lb.tune.reconstruct(lb.tune.blended(SMALL, 4, 2.5), DENSE, [X] * 2, "first")


# ---------------------------------------------------------------- thresholds


def choices(target: float = 2.5, most: Any = 4, widths: Any = None, **given: Any) -> lb.tune.Thresholds:
    return lb.tune.thresholds(lb.tune.blended(SMALL, most, target, widths=widths), DENSE, [X[:32], X[32:]], **given)


@pytest.fixture(scope="module")
def found() -> lb.tune.Thresholds:
    return choices(estimators=None)


def test_a_threshold_is_a_quantile_of_the_exact_errors(found: lb.tune.Thresholds) -> None:
    for path, x in layer_inputs().items():
        values = found.layers[path]
        assert [int(values[name]) for name in ("low", "high", "most")] == [2, 3, 4]
        errors = np.linalg.norm(x.astype(np.float64) @ delta(path, 2, 3), axis=1)
        assert float(values["threshold"]) == pytest.approx(np.quantile(errors, 0.5), rel=1e-5)


def test_a_threshold_that_is_a_quantile_of_estimates_keeps_the_share_of_inputs() -> None:
    values = choices(2.25, quantile_of="estimate", estimators=Estimators(r2=2.0, size=2, steps=0)).layers["first"]
    estimates = lb.nn.Switch(values).estimate(X, SMALL.first.kernel.array)
    assert float((estimates > values["threshold"]).mean()) == 0.25
    with pytest.raises(ValueError, match="quantile_of='x' must be one of error, estimate"):
        choices(quantile_of="x")


@pytest.mark.parametrize(
    ("r", "above", "between"),
    [(0.95, 0.0, None), (0.7, 0.4, (2, 3)), (0.5, 0.5, (1, 2)), (0.3, 0.5, (1, 2)), (0.2, 1.0, None)],
)
def test_equal_inputs_have_one_width(r: float, above: float, between: tuple[float, float] | None) -> None:
    rounded = np.float32(1) + np.finfo(np.float32).eps * np.arange(50, dtype=np.float32) / 50
    errors = np.concatenate([rounded, np.full(10, 2, np.float32), np.full(40, 3, np.float32)])
    threshold = float(_quantile(errors, r))
    assert np.mean(errors > threshold) == above
    assert not np.isfinite(threshold) if between is None else threshold == pytest.approx(np.mean(between), rel=1e-6)


def test_precisions_near_a_width_have_that_width_alone() -> None:
    model = lb.tune.blended(SMALL, {"first": 4, "second": 2}, 2.5)
    for bits, low, threshold in ((3.005, 3, np.inf), (3.995, 3, -np.inf)):
        share = (bits - 2) / 2
        model.first.kernel.reader.z.set_value(jnp.float32(np.log(share / (1 - share))))
        values = lb.tune.thresholds(model, DENSE, [X]).layers
        assert (int(values["first"]["low"]), float(values["first"]["threshold"])) == (low, threshold)
        assert float(values["second"]["threshold"]) == np.inf and int(values["second"]["most"]) == 2
    chosen = lb.tune.switched(SMALL, lb.tune.thresholds(model, DENSE, [X]))
    np.testing.assert_array_equal(chosen(X), lb.at_width(SMALL, {"first": 4, "second": 2})(X))


def test_calibrations_that_do_not_do_are_refused() -> None:
    model = lb.tune.blended(SMALL, 4, 2.1)
    with pytest.raises(ValueError, match=r"'first' takes the quantile 0\.900 of 4 inputs, which needs 1[01]"):
        lb.tune.thresholds(model, DENSE, [X[:4]])
    with pytest.raises(ValueError, match="no batches"):
        lb.tune.thresholds(model, DENSE, [])
    with pytest.raises(ValueError, match="'first' in the dense model are NaN or inf"):
        lb.tune.thresholds(model, DENSE, [X.at[0, 0].set(jnp.nan)])
    other = Two()
    other.first = nnx.Linear(9, 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'first' multiplies 16 inputs and in the dense model 9"):
        lb.tune.thresholds(model, other, [X[:, :9]])


def test_thresholds_of_another_model_are_refused(found: lb.tune.Thresholds, tmp_path: Path) -> None:
    found.save(tmp_path / "t.safetensors")
    again = lb.tune.Thresholds.load(tmp_path / "t.safetensors")
    assert again.base == found.base and again.bytes == found.bytes
    assert {n: np.asarray(v).tolist() for n, v in again.values.items()} == {
        n: np.asarray(v).tolist() for n, v in found.values.items()
    }
    lb.tune.switched(lb.at_width(SMALL, 3), again)
    doubled = nnx.clone(SMALL)
    doubled.first.kernel.table3[...] *= 2
    with pytest.raises(ValueError, match=f"digest {found.base}, and here it is .*codes or tables differ"):
        lb.tune.switched(doubled, found)
    with pytest.raises(ValueError, match="no quantized layer 'first'"):
        lb.tune.switched(lb.quantize(DENSE, {"second": FORMAT}), found)
    lb.save(SMALL, tmp_path / "model.safetensors")
    with pytest.raises(lb.CheckpointError, match="holds no thresholds"):
        lb.tune.Thresholds.load(tmp_path / "model.safetensors")
    fewer = {name: value for name, value in found.values.items() if name != "first/low"}
    replace(found, values=fewer).save(tmp_path / "t.safetensors")
    with pytest.raises(lb.CheckpointError, match=r"layer 'first' has \['high', 'most', 'threshold'\]"):
        lb.tune.Thresholds.load(tmp_path / "t.safetensors")


# ---------------------------------------------------------------- estimators


def test_a_random_projection_is_within_15_percent_for_91_percent_of_inputs() -> None:
    key_w, key_x, key_g = jax.random.split(jax.random.key(0), 3)
    difference = jax.random.normal(key_w, (128, 256)) * 0.01
    x = jax.random.normal(key_x, (4000, 128))
    errors = exact(x, difference)
    within = []
    for seed in range(8):  # one projection is one draw for all inputs
        g = random_projection(jax.random.fold_in(key_g, seed), difference, 64)
        within.append(np.mean(np.abs(np.linalg.norm(np.asarray(x @ g.T), axis=1) / np.asarray(errors) - 1) < 0.15))
    # ||A v|| / ||v|| is chi of 64 degrees over 8, within 15 % with the probability 0.912
    assert np.mean(within) == pytest.approx(0.91, abs=0.02)


def test_gradient_descent_brings_a_projection_nearer() -> None:
    difference = jnp.asarray(RNG.standard_normal((16, 32)), jnp.float32)
    errors = exact(X, difference)

    def cost(g: jax.Array) -> float:
        return float(np.mean((np.linalg.norm(np.asarray(X @ g.T), axis=1) - np.asarray(errors)) ** 2))

    g = random_projection(jax.random.key(1), difference, 8)
    nearer = tuned(g, X, errors, 2000, 1e-3)
    assert cost(nearer) < cost(g) / 2
    assert np.array_equal(tuned(g, X, errors, 5, 1e6), g)  # a rate that leads away changes nothing


def test_lines_are_taken_where_they_explain_enough() -> None:
    norms = RNG.uniform(1, 2, 50)
    assert line(norms, 3 * norms + 1) == pytest.approx((3, 1, 1))
    assert line(norms, np.full(50, 2.0))[2] == 1.0
    noise = RNG.standard_normal(50)
    assert line(norms, noise)[2] == pytest.approx(np.corrcoef(norms, noise)[0, 1] ** 2)
    rows = jnp.asarray(RNG.uniform(1, 9, (64, 1)), jnp.float32) * X
    straight = jnp.eye(16)
    found = QUICK.line(norm(rows), exact(rows, straight))
    assert found is not None and found.keys() == {"slope", "offset"}
    one = jnp.zeros((16, 4)).at[0].set(1.0)
    assert QUICK.line(norm(X), exact(X, one)) is None
    bent = QUICK.projected(X, one, exact(X, one), 0)
    assert {n: (a.shape, a.dtype) for n, a in bent.items()} == {"projection": ((64, 16), jnp.bfloat16)}
    for wrong in ({"size": 0}, {"steps": -1}, {"rate": 0.0}):
        with pytest.raises(ValueError, match="a projection has a row at least"):
            Estimators(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- as models run


def test_each_row_has_the_width_that_it_asks_for(found: lb.tune.Thresholds) -> None:
    model = lb.tune.switched(SMALL, found)
    y, bits = nnx.jit(lambda m, x: lb.nn.effective_bits(lambda m, x: m.first(x), m, x))(model, X)
    errors = np.linalg.norm(np.asarray(X, np.float64) @ delta("first", 2, 3), axis=1)
    is_high = errors > np.median(errors)
    low, high = (np.asarray(lb.at_width(SMALL, b).first(X)) for b in (2, 3))
    expected = np.where(is_high[:, None], high, low)
    assert (np.abs(np.asarray(y) - expected) <= 2 * bound(X, weight("first", 2), weight("first", 3))).all()
    assert float(bits.layers["first"]) == 2.5 == float(bits.mean) and np.isnan(bits.layers["second"])


def test_one_call_has_the_largest_width_of_its_rows(found: lb.tune.Thresholds) -> None:
    model = lb.nn.switching(lb.tune.switched(SMALL, found), "call")
    errors = np.linalg.norm(np.asarray(X) @ delta("first", 2, 3), axis=1)
    order = np.argsort(errors)
    step = nnx.jit(lambda m, x: lb.nn.effective_bits(lambda m, x: m.first(x), m, x))
    for rows, width in ((order[:4], 2), (order[-4:], 3), (np.array([order[0], order[1], order[2], order[-1]]), 3)):
        y, bits = step(model, X[rows])
        assert float(bits.mean) == width
        expected = lb.at_width(SMALL, width).first(X[rows])
        assert (np.abs(np.asarray(y - expected)) <= 2 * bound(X[rows], weight("first", width))).all()
    most = lb.nn.switching(model, "most")
    difference = np.abs(np.asarray(most.first(X) - lb.at_width(SMALL, 4).first(X)))
    assert (difference <= 2 * bound(X, weight("first", 4))).all()
    with pytest.raises(ValueError, match="by='token' must be one of row, call, most"):
        lb.nn.switching(model, "token")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Two has no layer that switches"):
        lb.nn.effective_bits(lambda m, x: m(x), SMALL, X)


def test_estimates_run_as_they_were_found() -> None:
    lines = {name: jnp.float32(v) for name, v in {"slope": 2.0, "offset": -1.0}.items()}
    common = {n: jnp.int32(b) for n, b in {"low": 2, "high": 3, "most": 4}.items()} | {"threshold": jnp.float32(0)}
    array = SMALL.first.kernel.array
    norms = np.linalg.norm(np.asarray(X), axis=1)
    np.testing.assert_allclose(lb.nn.Switch(common | lines).estimate(X, array), 2 * norms - 1, rtol=1e-5)
    g = jnp.asarray(RNG.standard_normal((8, 16)), jnp.float32)
    projected = lb.nn.Switch(common | {"projection": g}).estimate(X, array)
    np.testing.assert_allclose(projected, np.linalg.norm(np.asarray(X @ g.T), axis=1), rtol=1e-5)


def test_switched_models_are_saved_prepared_and_read_at_one_width(found: lb.tune.Thresholds, tmp_path: Path) -> None:
    model = lb.tune.switched(SMALL, found)
    lb.save(model, tmp_path / "m.safetensors")
    again = lb.load(tmp_path / "m.safetensors", into=nnx.eval_shape(lambda: lb.tune.switched(SMALL, found)))
    for held, stored in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        assert np.array_equal(held, stored)
    assert isinstance(again.first.kernel.reader, lb.nn.Switch)
    at = lb.at_width(model, 3).first.kernel
    assert at.reader is None and at.type == SMALL.first.kernel.type.at(3)
    assert lb.explain(model.first).count("x[1, k]") == 3  # every width
    assert lb.prepare(model, "hopper").first.kernel.reader is not None
    assert lb.prepare(lb.at_width(SMALL, jnp.int32(2)), "hopper").first.kernel.width is not None


@pytest.fixture(scope="module")
def decoder() -> Any:
    sizes = {"vocab": 16, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head": 8, "hidden": 16, "context": 32}
    dense = lb.models.Decoder(lb.models.Config(**sizes), rngs=nnx.Rngs(0))
    small = lb.quantize(dense, {"layers/0/mlp/*": lb.any_precision(2, 3, table_dtype="float32")})
    tokens = jnp.asarray(RNG.integers(0, 16, (2, 24)), jnp.int32)
    start = lb.tune.blended(small, 3, 2.5)
    return tokens, lb.tune.switched(small, lb.tune.thresholds(start, dense, [tokens], estimators=QUICK))


def test_decoding_chooses_anew_at_each_step_in_one_program(decoder: Any) -> None:
    tokens, model = decoder
    whole, bits = nnx.jit(lambda m, t: lb.nn.effective_bits(lambda m: m(t), m))(model, tokens[:1])
    graph, state = nnx.split(lb.nn.switching(model, "call"))

    @jax.jit
    def step(state: Any, cache: Any, token: jax.Array, at: jax.Array) -> Any:
        def run(m: Any) -> Any:
            hidden, new = m.hidden(token[None, None], at[None, None], cache)
            return m.logits(hidden)[0, 0], new

        return lb.nn.effective_bits(run, nnx.merge(graph, state))

    cache = lb.models.DenseKV().empty(model.config, 1, 24, jnp.float32)
    means = []
    for i in range(24):
        (logits, cache), chosen = step(state, cache, tokens[0, i], jnp.int32(i))
        # A sum of at most 24 terms in another order, through some 20 roundings, relative to the largest of a sequence.
        limit = 20 * 24**0.5 * unit("float32") * np.abs(np.asarray(whole)).max()
        assert np.abs(np.asarray(logits - whole[0, i])).max() <= limit
        means.append(float(chosen.mean))
    assert step._cache_size() == 1 and len(set(means)) > 1
    assert np.mean(means) == pytest.approx(float(bits.mean), rel=1e-5)


def test_generating_tells_the_widths_of_each_step(decoder: Any) -> None:
    _, model = decoder
    made, bits = lb.models.generate(model, [[3]], 6, bits=True)
    assert len(bits) == len(made[0]) == 6
    for step in bits:
        widths = [float(b) for b in step.layers.values()]
        assert len(widths) == 3 and {*widths} <= {2.0, 3.0}
        assert float(step.mean) == pytest.approx(np.mean(widths))  # the layers are of one size
    assert len({float(step.mean) for step in bits}) > 1
    with pytest.raises(ValueError, match="Decoder has no layer that switches"):
        lb.models.stream(lb.at_width(model, 2), [[3]], 4, bits=True)


def test_scores_come_with_effective_bits(decoder: Any) -> None:
    tokens, model = decoder
    text = np.asarray(tokens[0, :17])  # one window, all of whose targets count
    score = lb.models.evaluate(model, text, length=16, batch=1)
    logits, bits = nnx.jit(lambda m, t: lb.nn.effective_bits(lambda m: m(t), m))(model, tokens[:1, :16])
    assert score.effective_bits == pytest.approx(float(bits.mean), rel=1e-6) and 2 < score.effective_bits < 3
    picked = np.asarray(jax.nn.log_softmax(logits[0]))[np.arange(16), text[1:]]
    assert score.nats == pytest.approx(-picked.mean(), rel=1e-5)
    assert lb.models.evaluate(lb.at_width(model, 2), text, length=16, batch=1).effective_bits is None


@pytest.mark.slow
def test_generating_takes_steps_at_the_chosen_widths(decoder: Any) -> None:
    tokens, model = decoder
    prompt = tokens[0, :3].tolist()
    found = lb.models.generate(model, [prompt], 4)[0]
    assert found == lb.models.generate(model, [prompt], 4, bits=True).tokens[0]
    text = [*prompt]
    cache = lb.models.DenseKV().empty(model.config, 1, 16, jnp.float32)
    most, call = lb.nn.switching(model, "most"), lb.nn.switching(model, "call")
    before = jnp.asarray([prompt[:-1]])
    _, cache = most.hidden(before, jnp.arange(2, dtype=jnp.int32)[None], cache)
    for at in range(2, 6):
        hidden, cache = call.hidden(jnp.asarray([text[-1:]]), jnp.full((1, 1), at, jnp.int32), cache)
        text.append(int(call.logits(hidden)[0, 0].argmax()))
    assert found == text[3:]
