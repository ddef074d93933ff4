"""Stacks of quantized matrices, and layers stacked by `nnx.vmap` and run by `nnx.scan`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit as lb
import lowbit.io
from lowbit.array import QuantArray
from lowbit.ops import take
from lowbit.testing.tolerance import assert_within
from tests.models import arrays, assert_same, fast, inputs, product_bound, whole, wholes

BCQ = lb.bcq(2, group=8)
ONE = lb.bcq(1, group=4)


def stack(*shape: int, fmt: lb.Format = BCQ, k: int = 12, n: int = 5) -> QuantArray:
    return lb.quantize_array(inputs(*shape, k, n), fmt, lb.greedy() if fmt.name == "bcq" else None)


def at(w: QuantArray, *index: int) -> QuantArray:
    return jax.tree.map(lambda a: a[index], w)


class Scanned(nnx.Module):
    """Three layers made and run as in Flax's guides."""

    def __init__(self) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(8, 8, kernel_init=nnx.initializers.zeros, rngs=rngs)

        self.blocks = whole(create(nnx.Rngs(0)), group=4)
        self.head = whole(nnx.Linear(8, 4, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)), group=4)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: jax.Array, up: nnx.Module) -> jax.Array:
            return nnx.relu(up(x))

        return self.head(forward(x, self.blocks))


@nnx.jit
def call(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)


# ---- arrays


@pytest.mark.slow
def test_a_stack_has_the_type_of_a_slice() -> None:
    w = stack(2, 3)
    assert (w.stack, w.shape, w.ndim) == ((2, 3), (2, 3, 12, 5), 4)
    assert w.type == stack().type and stack().stack == () and stack().shape == (12, 5)
    assert repr(w).startswith("QuantArray(stack [2, 3] of f32[k=12 n=5] as bcq(bits=2, group=8), ")
    assert QuantArray.of(w.fields, w.type).stack == (2, 3)
    seen = []
    jax.vmap(lambda w: seen.append(w.stack))(w)
    assert seen == [(3,)]


def test_slices_are_quantized_one_by_one() -> None:
    dense, sizes = inputs(2, 3, 12, 5), []

    def solver(w: jax.Array, fmt: lb.Format) -> Any:
        sizes.append(w.shape)
        return lb.greedy()(w, fmt)

    w = lb.quantize_array(dense, BCQ, solver)
    assert sizes == [(5, 12)] * 6
    for i, j in np.ndindex(2, 3):
        one = lb.quantize_array(dense[i, j], BCQ, lb.greedy())
        assert all(np.array_equal(one.fields[f], w.fields[f][i, j]) for f in one.fields)
        np.testing.assert_array_equal(lb.dequantize(w)[i, j], lb.dequantize(one))
    bad = dense.at[1, 2].set(1e6)
    text = "the weight, slice [1, 2],: 'alpha' overflows float16; use scale_dtype='float32' or 'bfloat16'"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        lb.quantize_array(bad, lb.bcq(2, scale_dtype="float16"), lb.greedy())


@pytest.mark.slow
def test_importance_of_all_slices_or_of_each() -> None:
    dense, f = inputs(2, 12, 5), jnp.asarray(np.random.default_rng(3).uniform(0, 9, (2, 12)), jnp.float32)
    each = lb.quantize_array(dense, BCQ, importance=f)
    same = lb.quantize_array(dense, BCQ, importance=f[1])
    for i in (0, 1):
        for got, weights in ((each, f[i]), (same, f[1])):
            want = lb.quantize_array(dense[i], BCQ, importance=weights)
            assert all(np.array_equal(want.fields[n], got.fields[n][i]) for n in want.fields)
    text = "the weight has 12 inputs and the shape (2, 12, 5), but the importance has shape (3, 12)"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        lb.quantize_array(dense, BCQ, importance=jnp.ones((3, 12)))


@pytest.mark.parametrize("fmt", [BCQ, pytest.param(lb.uniform(3, group=8), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("rows", [(), (4,), (2, 2)])
def test_each_slice_multiplies_its_own_rows(fmt: lb.Format, rows: tuple[int, ...]) -> None:
    w, x = stack(2, 3, fmt=fmt), inputs(2, 3, *rows, 12)
    y = jax.jit(lb.matmul)(x, w)
    assert y.shape == (2, 3, *rows, 5)
    for i, j in np.ndindex(2, 3):
        flat = x[i, j].reshape(-1, 12)
        bound = product_bound(flat, at(w, i, j), "float32")
        assert_within(y[i, j].reshape(-1, 5), lb.matmul(flat, at(w, i, j)), 2 * bound)


def test_gradients_reach_the_scales_of_each_slice() -> None:
    w, x = stack(3, fmt=ONE), wholes(3, 4, 12)
    w = QuantArray({**w.fields, "alpha": jnp.ones_like(w.fields["alpha"])}, w.type)  # whole numbers: exact

    def loss(x: jax.Array, w: QuantArray) -> jax.Array:
        return lb.matmul(x, w).sum()

    dx, dw = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, w)
    for i in range(3):
        one, of_w = jax.grad(loss, argnums=(0, 1), allow_int=True)(x[i], at(w, i))
        np.testing.assert_array_equal(dx[i], one)
        np.testing.assert_array_equal(dw.fields["alpha"][i], of_w.fields["alpha"])


@pytest.mark.slow
def test_forward_mode_of_each_slice() -> None:
    w, x = stack(2, fmt=ONE), inputs(2, 3, 12)
    y, dy = jax.jvp(lambda x: lb.matmul(x, w, differentiable="jvp"), (x,), (2 * x,))
    np.testing.assert_array_equal(dy, 2 * y)
    with pytest.raises(TypeError, match=r"^lb.matmul is differentiated in forward mode"):
        jax.jvp(lambda x: lb.matmul(x, w), (x,), (x,))


@pytest.mark.slow
def test_an_exact_conversion_of_a_stack() -> None:
    w = stack(2, 3, fmt=lb.uniform(3, group=8))
    np.testing.assert_array_equal(lb.dequantize(at(lb.to_bcq(w), 1, 2)), lb.dequantize(lb.to_bcq(at(w, 1, 2))))


@pytest.mark.parametrize("shape", [(3, 4, 12), (2,), (12,), (4, 12)])
def test_what_does_not_begin_with_the_stack(shape: tuple[int, ...]) -> None:
    text = (
        f"x has shape {shape}, but w is a stack [2] of f32[k=12 n=5] as bcq(bits=2, group=8): x must begin with the "
        "axes of the stack and end with k = 12; jnp.broadcast_to gives every slice the same x"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        lb.matmul(jnp.ones(shape), stack(2))


def test_fields_of_unequal_stacks() -> None:
    w = stack(2)
    text = (
        "'alpha' is a stack [2] of f32[p=2 n=5 g=2], but 'planes' is a stack [1] of u8[p=2 n=5 g=2 j=1]: every field "
        "has the same leading axes"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        QuantArray.of({**w.fields, "planes": w.fields["planes"][:1]}, w.type)


@pytest.mark.slow
def test_rows_are_taken_of_one_table() -> None:
    w = lb.quantize_array(inputs(2, 5, 12), BCQ, lb.greedy(), dims=("n", "k"))
    text = "w is a stack [2] of f32[n=5 k=12] as bcq(bits=2, group=8): take rows of one table, or use jax.vmap or scan"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        take(w, jnp.arange(3))
    rows = jax.vmap(take, in_axes=(0, None))(w, jnp.arange(3))
    np.testing.assert_array_equal(rows[1], take(at(w, 1), jnp.arange(3)))


def test_a_stack_in_a_file(tmp_path: Path) -> None:
    w = stack(2, 3)
    lowbit.io.write(tmp_path / "w.safetensors", {"w": w, "one": at(w, 0, 1)})
    back = lowbit.io.read(tmp_path / "w.safetensors")
    assert back["w"].type == back["one"].type == w.type and back["w"].stack == (2, 3)
    assert all(np.array_equal(back["w"].fields[f], w.fields[f]) for f in w.fields)


# ---- layers


def test_a_scanned_model_runs_as_it_was_written() -> None:
    model, x = Scanned(), wholes(2, 8)
    q = lb.quantize(model, fast(ONE))
    assert type(q.blocks) is lb.nn.Linear and q.blocks.kernel.shape == (3, 8, 8) and q.blocks.in_features == 8
    np.testing.assert_array_equal(lb.dequantize(q.blocks.kernel.array), model.blocks.kernel[...])
    np.testing.assert_array_equal(call(q, x), call(model, x))
    doubled = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(0, None)))(q.blocks, x)
    np.testing.assert_array_equal(doubled, nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(model.blocks, x))
    graph, state = nnx.split(q.blocks)
    second = nnx.merge(graph, jax.tree.map(lambda a: a[1], state))
    np.testing.assert_array_equal(second(x), doubled[1])


@pytest.mark.slow
def test_scales_of_a_scanned_model_train(tmp_path: Path) -> None:
    q = lb.quantize(Scanned(), fast(ONE))
    tuning = lb.tune.alpha_tuning(q)
    assert tuning.trainable == 3 * 8 * 2 + 4 * 2
    optimizer = tuning.optimizer(optax.adam(1e-2))

    @nnx.jit
    def step(model: Scanned, optimizer: nnx.Optimizer[Scanned]) -> jax.Array:
        loss = lambda m: jnp.mean((m(wholes(4, 8)) / 10 - 1) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, lb.Scale))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(tuning.model, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    folded = lb.tune.fold(tuning.model)
    assert folded.blocks.kernel.type == q.blocks.kernel.type
    moved = np.asarray(folded.blocks.kernel.alpha[...] - q.blocks.kernel.alpha[...])
    assert moved.shape == (3, 1, 8, 2) and all(np.any(moved[i]) for i in range(3))
    path = tmp_path / "model.safetensors"
    lb.save(folded, path)
    abstract = nnx.eval_shape(lambda: lb.quantize(Scanned(), fast(ONE)))
    assert_same(arrays(lb.load(path, into=abstract)), arrays(folded))
    short = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape[1:]), a.dtype), nnx.state(abstract.blocks))
    nnx.update(abstract.blocks, short)
    with pytest.raises(
        lb.CheckpointError, match=r"is stored as float32\[3, 8\], but the model's Param is float32\[2, 8\]$"
    ):
        lb.load(path, into=abstract)


def test_the_report_counts_every_slice() -> None:
    model = Scanned()
    model.blocks.kernel[...] = inputs(3, 8, 8) * jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    q = lb.quantize(model, fast(ONE))
    row = next(r for r in lb.report(q).rows if r.layer == "blocks")
    assert (row.weights, row.bytes) == (3 * 64, 3 * 8 * 2 * (1 + 4))  # two groups of a byte and a scale for each output
    dense = np.asarray(model.blocks.kernel[...], np.float64)
    error = np.linalg.norm(dense - np.asarray(lb.dequantize(q.blocks.kernel.array), np.float64)) / np.linalg.norm(dense)
    assert row.relative_error == pytest.approx(error, rel=1e-5)
    assert lb.explain(q.blocks).startswith("x[1, k] @ f32[k=8 n=8] as bcq(bits=1, group=4) on ")


def test_calibrating_a_scanned_model_measures_each_slice() -> None:
    model, x = Scanned(), wholes(4, 8)
    stats = lb.calibrate(model, [x])
    assert stats["blocks"].second_moment.shape == (3, 8) and stats["blocks"].rows == 4
    np.testing.assert_array_equal(stats["blocks"].second_moment[0], (x**2).mean(0))
    weights, bias = model.blocks.kernel[0], model.blocks.bias[0]
    second = nnx.relu(x @ weights + bias.reshape(1, -1))
    np.testing.assert_array_equal(stats["blocks"].second_moment[1], (second**2).mean(0))
    lb.quantize(model, fast(ONE), stats=stats)
    gram = lb.calibrate(model, [x], statistics=["gram"])["blocks"].gram
    np.testing.assert_array_equal(gram[1], second.T @ second / 4)


@pytest.mark.slow
def test_gradient_statistics_of_each_slice() -> None:
    model, x = Scanned(), wholes(4, 8)
    loss = lambda m, x: m(x).sum() / 4096  # noqa: E731
    names = ["gradient_square", "output_gradient"]
    stats = lb.calibrate(model, [x], statistics=names, loss=loss)["blocks"]
    np.testing.assert_array_equal(stats.gradient_square, nnx.grad(loss)(model, x).blocks.kernel[...] ** 2)
    assert stats.output_gradient is not None and stats.output_gradient.shape == (3, 8)
    through = (model.head.kernel[...].sum(1) / 4096)[None] * (x[:, :1] * 0 + 1)
    assert np.all(stats.output_gradient[2] <= (through**2).mean(0))  # what relu lets through of each row
    rules = [lb.Rule("blocks", ONE, lb.alternating(0, weighs_by=("second_moment", *names)))]
    both = lb.calibrate(model, [x], rules=rules, loss=loss)
    model.blocks.kernel.set_value(inputs(3, 8, 8))  # of which no magnitude is exact, so that weights matter
    got, s = lb.quantize(model, rules, stats=both).blocks.kernel.array, both["blocks"]
    weighs = s.second_moment[1][:, None] * s.gradient_square[1] * s.output_gradient[1][None]
    want = lb.quantize_array(model.blocks.kernel[1], ONE, rules[0].quantizer, importance=weighs)
    assert all(np.array_equal(got.fields[name][1], want.fields[name]) for name in want.fields)


@pytest.mark.slow
def test_adapters_on_each_slice() -> None:
    q, x = lb.quantize(Scanned(), fast(ONE)), wholes(2, 8)
    adapted = lb.nn.lora(q, rank=2, rngs=nnx.Rngs(0))
    assert adapted.blocks.kernel.lora_a.shape == (3, 8, 2) and adapted.blocks.kernel.lora_b.shape == (3, 2, 8)
    np.testing.assert_array_equal(call(adapted, x), call(q, x))  # B is zero
    grads = nnx.grad(lambda m: m(x).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(adapted)
    assert all(np.any(grads.blocks.kernel.lora_b[i]) for i in range(3))


@pytest.mark.slow
def test_comparing_scanned_models_has_a_row_a_slice() -> None:
    model = Scanned()
    found = lb.compare(model, lb.quantize(model, fast({"blocks": ONE, "head": lb.bcq(1)})), wholes(4, 8))
    assert [r.layer for r in found.rows] == ["blocks"] * 3 + ["head", "(output)"]
    assert [r.relative_error for r in found.rows[:3]] == [0.0] * 3 and found.rows[3].relative_error > 0


@pytest.mark.slow
def test_comparing_layers_that_vmap_runs() -> None:
    model = nnx.Dict(blocks=Scanned().blocks)
    q = lb.quantize(model, lb.uniform(2))
    run = lambda m, x: nnx.vmap(lambda layer, x: layer(x))(m.blocks, x)  # noqa: E731
    rows = lb.compare(model, q, wholes(3, 2, 8), run).rows
    assert [r.layer for r in rows] == ["blocks"] * 3 + ["(output)"] and 0 < rows[0].relative_error < 1


@pytest.mark.slow
def test_embeddings_stacked_by_vmap() -> None:
    @partial(nnx.vmap, in_axes=0)
    def create(key: jax.Array) -> nnx.Embed:
        return nnx.Embed(6, 8, rngs=nnx.Rngs(key))

    table = whole(create(jax.random.split(jax.random.key(0), 2)), group=4)
    q = lb.quantize(table, fast(ONE))
    both = nnx.vmap(lambda m, ids: (m(ids), m.attend(m(ids))), in_axes=(0, None))
    for got, want in zip(both(q, jnp.arange(6)), both(table, jnp.arange(6)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_stack_called_as_one_layer() -> None:
    q = lb.quantize(Scanned(), fast(ONE)).blocks
    text = (
        "the weight is a stack [3] of f32[k=8 n=8] as bcq(bits=1, group=4), and this layer multiplies a stack []: call "
        "stacked layers in nnx.scan or nnx.vmap, or slice their state"
    )
    for x in (wholes(2, 8), wholes(3, 8)):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            q(x)


def test_layers_stacked_along_another_axis() -> None:
    @partial(nnx.vmap, in_axes=0, out_axes=1)
    def create(key: jax.Array) -> nnx.Linear:
        return nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(key))

    text = (
        "layer '' cannot be quantized: its weight has shape (8, 3, 8), but the layer says (8, 8), after the axes of a "
        "stack if nnx.vmap made one; stack along axis 0; leave it dense with a rule for its path with the format None"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        lb.quantize(create(jax.random.split(jax.random.key(0), 3)), fast(ONE))
