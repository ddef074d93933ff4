"""`lb.calibrate`: what each layer saw, and what `lb.quantize` makes of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.nn import LayerStats
from lowbit.nn.kinds import NAMES
from lowbit.testing.tolerance import assert_within, gamma
from tests.models import Net, arrays, assert_same

BCQ = lb.bcq(2, group=16)


def pair() -> nnx.Dict:
    return nnx.Dict(up=nnx.Linear(32, 8, rngs=nnx.Rngs(0)), down=nnx.Linear(8, 32, rngs=nnx.Rngs(1)))


def rows(n: int, k: int = 32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((n, k)) * np.linspace(0.01, 3, k), jnp.float32)


def up_alone(model: nnx.Dict, x: jax.Array) -> jax.Array:
    return model.up(x)


def test_moments_over_batches_of_any_size() -> None:
    batches = [rows(3), rows(1, seed=1).reshape(1, 1, 32), rows(8, seed=2).reshape(2, 4, 32)]
    stats = lb.calibrate(pair(), batches, lambda m, x: m.down(m.up(x)))
    seen = np.concatenate([b.reshape(-1, 32) for b in batches]).astype(np.float64)
    up = stats["up"]
    assert (up.rows, stats["down"].rows) == (12, 12)
    # A row passes a square, a sum of at most 12 and a mean, then one update (4 operations) for each of 3 batches.
    exact = (seen**2).mean(0)
    np.testing.assert_allclose(up.second_moment, exact, rtol=gamma(2 + 12 + 3 * 4, "f32"))
    np.testing.assert_array_equal(up.largest, np.abs(seen).max(0).astype(np.float32))


def test_products_of_inputs_over_batches_of_any_size() -> None:
    batches = [rows(3), rows(9, seed=2).reshape(3, 3, 32)]
    stats = lb.calibrate(pair(), batches, up_alone, statistics=["gram", "second_moment"])["up"]
    seen = np.concatenate([b.reshape(-1, 32) for b in batches]).astype(np.float64)
    # A product and a sum of at most 9, then a mean and one update (4 operations) for each of 2 batches.
    bound = gamma(10 + 1 + 2 * 4, "f32") * (np.abs(seen).T @ np.abs(seen)) / 12
    assert_within(stats.gram, seen.T @ seen / 12, bound)
    moments = np.asarray(stats.second_moment)
    np.testing.assert_allclose(np.diagonal(stats.gram), moments, rtol=2 * gamma(2 + 12 + 2 * 4, "f32"))


@pytest.mark.slow
def test_additive_codebooks_are_weighed_by_products_of_inputs() -> None:
    model, fmt = pair(), lb.codebook(1, 4, vec=2)
    mixed = rows(64) @ rows(32, seed=1)
    rules = [lb.Rule("up", fmt, lb.additive_codebooks()), lb.Rule("down", None)]
    stats = lb.calibrate(model, [mixed], up_alone, rules=rules)
    assert stats["up"].second_moment is None and stats["up"].gram.shape == (32, 32)
    weighed, plain = (lb.quantize(model, rules, stats=s) for s in (stats, None))
    exact = model.up(mixed)
    assert float(jnp.mean((weighed.up(mixed) - exact) ** 2)) < 0.5 * float(jnp.mean((plain.up(mixed) - exact) ** 2))
    dense, gram = model.up.kernel[...], stats["up"].gram
    same = lb.quantize_array(dense, fmt, lb.additive_codebooks(), importance=gram)
    assert all(np.array_equal(weighed.up.kernel.array.fields[f], a) for f, a in same.fields.items())
    with pytest.raises(ValueError, match=r"^'gram' of layer 'up' in stats is not symmetric and positive semidefinite"):
        lb.quantize(model, rules, stats={"up": LayerStats(None, None, 1, gram=-gram)})
    with pytest.raises(ValueError, match=r"^stats has 'gram' of layer 'up' with the shape \(8, 8\), but the weight's"):
        lb.quantize(model, rules, stats={"up": LayerStats(None, None, 1, gram=jnp.eye(8))})


@pytest.mark.slow
def test_the_model_is_left_as_it_is() -> None:
    model = Net(nnx.Rngs(0))
    before = arrays(model)
    stats = lb.calibrate(model, [jnp.arange(6).reshape(2, 3)])
    assert_same(arrays(model), before)
    lb.quantize(model, {"**": BCQ}, stats=stats)  # the names are those of rules
    assert all(s.rows > 0 for s in stats.values())


def test_a_tied_embedding_counts_what_it_attends_to() -> None:
    model = nnx.Dict(embed=nnx.Embed(8, 32, rngs=nnx.Rngs(0)))
    stats = lb.calibrate(model, [rows(4)], lambda m, x: m.embed.attend(x) + m.embed(jnp.arange(4)).sum())
    assert stats["embed"].rows == 4
    np.testing.assert_array_equal(stats["embed"].largest, jnp.abs(rows(4)).max(0))


def test_an_embedding_that_is_only_looked_up_has_no_statistics() -> None:
    model = nnx.Dict(embed=nnx.Embed(8, 32, rngs=nnx.Rngs(0)), up=nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    stats = lb.calibrate(model, [jnp.arange(4)], lambda m, ids: m.up(m.embed(ids)))
    assert set(stats) == {"up"}


def test_one_compilation_serves_all_batches() -> None:
    traced = []

    def call(model: nnx.Dict, x: jax.Array) -> jax.Array:
        traced.append(1)
        return model.up(x)

    lb.calibrate(pair(), [rows(4, seed=i) for i in range(5)], call)
    assert len(traced) == 1


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [BCQ, lb.bcq(3, offset=True)], ids=str)
def test_weighing_by_moments_lowers_the_error_of_the_output(fmt: lb.Format) -> None:
    model, x = pair(), rows(64)
    stats = lb.calibrate(model, [x], up_alone)
    exact = model.up(x)
    plain, weighed = (lb.quantize(model, {"up": fmt, "down": None}, stats=s) for s in (None, stats))
    errors = [float(jnp.mean((q.up(x) - exact) ** 2)) for q in (plain, weighed)]
    assert errors[1] < errors[0]


def test_round_to_nearest_has_no_use_for_it() -> None:
    model = pair()
    stats = lb.calibrate(model, [rows(8)], up_alone)
    rules = {"up": lb.uniform(4, group=16), "down": None}
    assert_same(arrays(lb.quantize(model, rules, stats=stats)), arrays(lb.quantize(model, rules)))


def test_inputs_that_were_always_zero_still_have_weights() -> None:
    model = pair()
    stats = lb.calibrate(model, [rows(8).at[:, :16].set(0.0)], up_alone)
    q = lb.quantize(model, {"up": BCQ, "down": None}, stats=stats)
    dense, decoded = model.up.kernel[...][:16], lb.dequantize(q.up.kernel.array)[:16]
    assert float(jnp.mean((dense - decoded) ** 2)) < 0.3 * float(jnp.mean(dense**2))


def test_what_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match=r"^no batches were given: nothing was measured$"):
        lb.calibrate(pair(), [], up_alone)
    with pytest.raises(ValueError, match=rf"^LayerNorm holds no {NAMES}: there is nothing to calibrate$"):
        lb.calibrate(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), [jnp.ones(4)])
    with pytest.raises(TypeError, match=r"^cannot calibrate the class Linear: give an nnx.Module$"):
        lb.calibrate(nnx.Linear, [jnp.ones(4)])  # type: ignore[arg-type]


def test_statistics_of_another_model() -> None:
    ones = jnp.ones(5)
    with pytest.raises(ValueError, match=r"^stats has 'middle', which is no layer of this Dict: calibrate it$"):
        lb.quantize(pair(), BCQ, stats={"middle": LayerStats(ones, ones, 1)})
    with pytest.raises(
        ValueError,
        match=r"^stats has 'second_moment' of layer 'up' with the shape \(5,\), but the weight's is \(32, 8\): calib",
    ):
        lb.quantize(pair(), BCQ, stats={"up": LayerStats(ones, ones, 1)})


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -1.0], ids=str)
def test_statistics_that_no_error_can_be_weighed_by(bad: float) -> None:
    moment = jnp.ones(32).at[3].set(bad)
    why = "has 1 NaN, inf or negative numbers among its 32: measure it on data for which all values of the model are "
    with pytest.raises(ValueError, match=f"^'second_moment' of layer 'up' in stats {why}finite$"):
        lb.quantize(pair(), BCQ, stats={"up": LayerStats(moment, None, 1)})
    with pytest.raises(ValueError, match=f"^the importance of the weight {why}finite$"):
        lb.quantize_array(jnp.ones((32, 4)), BCQ, importance=moment)


def test_known_weights_and_statistics_within_a_trace() -> None:
    model, stats = pair(), {"up": LayerStats(jnp.ones(32), None, 1)}
    abstract = nnx.eval_shape(lambda: lb.quantize(model, {"up": BCQ, "down": None}, stats=stats))
    assert abstract.up.kernel.type.format == BCQ


def test_layers_without_statistics_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = pair()
    stats = lb.calibrate(model, [rows(8)], up_alone)
    lb.quantize(model, {"up": BCQ, "down": lb.uniform(4)}, stats=stats)
    lb.quantize(model, [lb.Rule("**", lb.bcq(1), lb.greedy())])
    assert caplog.messages == []  # none needed
    lb.quantize(model, [lb.Rule("**", lb.bcq(1), lb.greedy())], stats=stats)
    assert caplog.messages == ["lowbit: stats has nothing of down: all their errors weigh the same"]


@pytest.mark.parametrize("names", ["second_moment", ("second_moment", "rows"), ("gram",)], ids=repr)
def test_a_quantizer_that_weighs_by_what_is_no_statistic(names: tuple[str, ...]) -> None:
    rules = [lb.Rule("up", BCQ, lb.alternating(weighs_by=names))]
    with pytest.raises(
        ValueError, match=r"^rule 'up': weighs_by=.* must be a tuple of some of second_moment, largest, "
    ):
        lb.calibrate(pair(), [rows(8)], up_alone, rules=rules)


def test_layers_of_one_name() -> None:
    model = nnx.Dict({"a/b": nnx.Linear(4, 4, rngs=nnx.Rngs(0)), "a": nnx.Dict(b=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))})
    for call in (lambda: lb.calibrate(model, []), lambda: lb.quantize(model, BCQ)):
        with pytest.raises(
            ValueError, match=r"^two layers are named 'a/b': rename one, so that rules can tell them ap"
        ):
            call()


def test_no_layer_that_can_be_quantized() -> None:
    abstract = nnx.eval_shape(pair)
    with pytest.raises(
        ValueError, match=r"^there is nothing to calibrate: layer 'down' cannot be quantized: its weight is abstract;"
    ):
        lb.calibrate(abstract, [rows(8)], up_alone)


def test_a_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lb.calibrate(pair(), iter([rows(3)]), up_alone, progress=True)
    assert "calibrating" in capsys.readouterr().err
