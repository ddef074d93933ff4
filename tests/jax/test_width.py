"""Models whose weights are read at several widths: lb.at_width, and what trains at one."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lowbit as lb
from tests.models import Two, arrays

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)), jnp.float32)


@pytest.fixture(scope="module")
def model() -> Any:
    return lb.quantize(Two(), lb.any_bcq(1, 3, group=8))


def tables() -> Any:
    """Layers of every kind that computes in a way of its own, filled at random."""
    fmt = lb.any_precision(1, 2, table_dtype="float32")

    def fill(w: jax.Array, fmt: lb.Format) -> Any:
        n, k = w.shape
        return dict(lb.testing.random_array(lb.QuantType((("n", n), ("k", k)), "f32", fmt)).fields)

    layers = {
        "embed": nnx.Embed(6, 16, rngs=nnx.Rngs(0)),
        "experts": lb.nn.Experts(2, 16, 4, rngs=nnx.Rngs(1)),
        "einsum": nnx.Einsum("bi,bio->bo", (4, 16, 3), rngs=nnx.Rngs(2)),
    }
    return lb.quantize(nnx.Dict(layers), [lb.Rule("**", fmt, fill)])


def test_a_static_width_is_another_type_over_the_same_arrays(model: Any) -> None:
    low = lb.at_width(model, 2)
    assert low.first.kernel.type == model.first.kernel.type.at(2)
    assert low.first.kernel.planes.get_value() is model.first.kernel.planes.get_value()
    assert model.first.kernel.type.format["width"] is None
    alone = lb.QuantArray(model.second.kernel.array.fields, model.second.kernel.type.at(2))
    assert np.array_equal(low.second(X), lb.matmul(X, alone))
    assert "any_bcq(group=8, hi=3, lo=1, width=2)" in str(lb.report(low))


def test_reports_leave_out_errors_of_another_width(model: Any) -> None:
    def errors(of: Any) -> list[Any]:
        return [r.relative_error for r in lb.report(of).rows]

    assert errors(lb.at_width(model, 3)) == errors(model) and None not in errors(model)
    assert errors(lb.at_width(model, {"first": 2})) == [None, errors(model)[1]]
    assert errors(lb.at_width(lb.at_width(model, jnp.int32(3)), 3)) == [None, None]
    abstract = nnx.eval_shape(lambda: lb.quantize(Two(), lb.any_bcq(1, 3, group=8)))
    assert isinstance(lb.at_width(abstract, 2).first.kernel.stats.get_value(), jax.ShapeDtypeStruct)


def test_a_width_that_may_change_is_explained_at_every_width(model: Any) -> None:
    text = lb.explain(lb.at_width(model, jnp.int32(2)).first, batch=2)
    assert text == "\n\n".join(lb.explain(lb.at_width(model, b).first, batch=2) for b in (1, 2, 3))


def test_a_width_in_an_array_may_change_within_one_compiled_function(model: Any) -> None:
    traced: list[str] = []

    def counted(name: str, out: Any) -> Any:
        traced.append(name)
        return out

    run = nnx.jit(lambda m, x, width: counted("run", lb.at_width(m, width)(x)))
    held = nnx.jit(lambda m, x: counted("held", m(x)))
    for width in (1, 2, 3):
        expected = nnx.jit(lambda m, x: m(x))(lb.at_width(model, width), X)
        assert np.array_equal(run(model, X, jnp.int32(width)), expected)
        assert np.array_equal(held(lb.at_width(model, jnp.int32(width)), X), expected)
    assert np.array_equal(run(model, X, jnp.int32(9)), run(model, X, jnp.int32(3)))  # the nearest there is
    assert sorted(traced) == ["held", "run"]
    again = lb.at_width(lb.at_width(model, jnp.int32(1)), 3)
    assert again.first.kernel.width is None


def test_layer_by_layer(model: Any) -> None:
    mixed = lb.at_width(model, {"first": 1, "**": jnp.int32(2)})
    assert mixed.first.kernel.type.format["width"] == 1 and mixed.first.kernel.width is None
    assert mixed.second.kernel.width.get_value() == 2
    assert lb.at_width(model, {"second": 1}).first.kernel.type == model.first.kernel.type


@pytest.mark.slow
def test_every_kind_of_layer_reads_at_its_width() -> None:
    calls = {"embed": (jnp.array([0, 5]),), "experts": (X, jnp.array([1, 3])), "einsum": (X,)}
    whole = tables()
    for name, inputs in calls.items():
        results = []
        for width in (1, 2):
            static, traced = (lb.at_width(whole, w)[name](*inputs) for w in (width, jnp.int32(width)))
            assert np.array_equal(static, traced)
            results.append(static)
        assert not np.array_equal(*results)
    assert lb.at_width(whole, jnp.int32(1)).embed.attend(X).shape == (4, 6)


@pytest.mark.slow
def test_widths_that_do_not_follow_one_another() -> None:
    small = lb.quantize(Two(), lb.nested_fp())
    low, high = (lb.at_width(small, width)(X) for width in (8, 16))
    assert np.array_equal(high, small(X)) and not np.array_equal(low, high)
    assert np.array_equal(lb.at_width(small, {"**": jnp.int32(8)})(X), low)


@pytest.mark.slow
def test_layers_in_a_scan() -> None:
    stacked = nnx.vmap(lambda key: nnx.Linear(16, 16, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))
    small = lb.quantize(stacked, lb.any_bcq(1, 2))
    run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    low = lb.at_width(small, jnp.int32(1))
    assert low.kernel.width.get_value().shape == (2,)
    assert np.array_equal(run(X, low), run(X, lb.at_width(small, 1)))


def test_a_width_is_saved(model: Any, tmp_path: Any) -> None:
    path = os.path.join(tmp_path, "model.safetensors")
    low = lb.at_width(model, jnp.int32(2))
    lb.save(low, path)
    again = lb.load(path, into=nnx.eval_shape(lambda: lb.at_width(model, jnp.int32(3))))
    assert again.first.kernel.width.get_value() == 2
    with pytest.raises(lb.CheckpointError, match="the model lacks 'first/kernel/width'"):
        lb.load(path, into=nnx.eval_shape(lambda: model))


def test_an_adapter_leaves_the_width_as_it_is(model: Any) -> None:
    adapted = lb.nn.lora(lb.at_width(model, {"first": jnp.int32(1)}), rank=2, rngs=nnx.Rngs(0), rules="first")
    assert adapted.first.kernel.width.get_value() == 1


# --- Training --------------------------------------------------------------------------------------------------------


def loss(model: Any) -> jax.Array:
    return jnp.mean((model(X) - 1) ** 2)


def changed(before: Any, after: Any) -> set[str]:
    old, new = arrays(before), arrays(after)
    assert old.keys() == new.keys()
    return {name for name in old if not np.array_equal(old[name], new[name], equal_nan=True)}


@pytest.mark.parametrize("which", [pytest.param("first", marks=pytest.mark.slow), "all"])
def test_tuning_a_width_changes_its_scales_alone(model: Any, which: Any) -> None:
    """With weight decay too, which would shrink scales that have no gradient."""
    tuning = lb.tune.alpha_tuning(lb.at_width(model, 2), which)
    assert tuning.trainable == (1 if which == "first" else 2) * (16 * 2 + 8 * 2)
    optimizer = tuning.optimizer(optax.adamw(1e-2, weight_decay=0.1))
    before = loss(tuning.model)
    for _ in range(3):
        optimizer.update(tuning.model, nnx.grad(loss, argnums=nnx.DiffState(0, lb.Scale))(tuning.model))
    assert loss(tuning.model) < before
    folded = lb.tune.fold(tuning.model)
    assert changed(lb.at_width(model, 2), folded) == {"first/kernel/alpha2", "second/kernel/alpha2"}
    assert np.array_equal(lb.at_width(folded, 3)(X), lb.at_width(model, 3)(X))
    other = lb.tune.alpha_tuning(lb.at_width(tuning.model, 1))  # goes on with another width
    assert changed(folded, lb.tune.fold(other.model)) == set()


@pytest.mark.slow
def test_all_widths_train_together(model: Any) -> None:
    trained = nnx.clone(model)
    optimizer = nnx.Optimizer(trained, optax.adam(1e-2), wrt=lb.Scale)
    gradients = nnx.grad(lambda m: sum(loss(lb.at_width(m, b)) for b in (1, 2, 3)), argnums=nnx.DiffState(0, lb.Scale))
    optimizer.update(trained, gradients(trained))
    assert changed(model, trained) == {f"{layer}/kernel/alpha{b}" for layer in ("first", "second") for b in (1, 2, 3)}


# --- Refusals --------------------------------------------------------------------------------------------------------


def test_what_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"^layer 'first': any_bcq\(.*\) is read at widths 1 to 3, not 4"):
        lb.at_width(model, 4)
    with pytest.raises(TypeError, match=r"^width is float32\[\]: give one integer"):
        lb.at_width(model, jnp.float32(2))
    with pytest.raises(TypeError, match=r"^width is int32\[2\]: give one integer"):
        lb.at_width(model, jnp.array([1, 2]))
    with pytest.raises(ValueError, match=r"^rule 'third' matches none of the 2 layers that are read at several widths"):
        lb.at_width(model, {"third": 2})
    with pytest.raises(ValueError, match=r"^Linear has no layer that is read at several widths"):
        lb.at_width(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 2)
    with pytest.raises(TypeError, match=r"^cannot read at a width a int"):
        lb.at_width(2, 2)
    with pytest.raises(ValueError, match=r"^layer 'first' is read at a width that may change: choose the one to tune"):
        lb.tune.alpha_tuning(lb.at_width(model, {"first": jnp.int32(2)}))


def test_linen_models_are_read_at_static_widths() -> None:
    dense = nnx.bridge.ToNNX(linen.Sequential([linen.Dense(8)]), nnx.Rngs(0)).lazy_init(X)
    small = lb.quantize(dense, lb.any_bcq(1, 2))
    assert not np.array_equal(lb.at_width(small, 1)(X), small(X))
    with pytest.raises(ValueError, match="is of a Linen model, whose widths are fixed: give an int, not an array"):
        lb.at_width(small, jnp.int32(1))
