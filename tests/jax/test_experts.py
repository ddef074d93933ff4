"""`lb.grouped_matmul` and `lb.nn.Experts` against `jax.lax.ragged_dot` over the same weights."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

import lowbit as lb
from lowbit.array import QuantArray
from lowbit.nn.importance import importance
from tests.models import fast, inputs, whole, wholes

ONE = lb.bcq(1, group=4)


def experts(count: int, seed: int = 0) -> lb.nn.Experts:
    return whole(lb.nn.Experts(count, 8, 3, rngs=nnx.Rngs(0)), group=4, seed=seed)


def quantized(count: int) -> tuple[QuantArray, jax.Array]:
    dense = experts(count).kernel[...]
    return lb.quantize_array(dense, ONE, lb.greedy()), dense


@jax.jit
def both(x: jax.Array, w: QuantArray, dense: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lb.grouped_matmul(x, w, sizes), lax.ragged_dot(x, dense, sizes)


ROWS = {
    # More rows than experts: tiles of 4, which sizes fill, leave ragged, or do not touch.
    10: ([4, 2, 4], [10, 0, 0], [0, 0, 10], [0, 9, 1], [3, 3, 3], [1, 1, 1], [0, 0, 0], [7, 7, 7], [0, 20, 0]),
    12: ([4, 4, 4], [1, 10, 1], [5, 5, 2]),
    3: ([1, 1, 1], [0, 3, 0], [0, 0, 1], [2, 2, 2]),  # as many rows as experts, or fewer: one row at a time
    1: ([0, 1, 0], [0, 0, 0]),
}


@pytest.mark.parametrize("rows", ROWS)
def test_is_ragged_dot(rows: int) -> None:
    w, dense = quantized(3)
    x = wholes(rows, 8)
    for sizes in ROWS[rows]:
        got, want = both(x, w, dense, jnp.array(sizes))
        np.testing.assert_array_equal(got, want, err_msg=str(sizes))


def test_export_with_any_number_of_rows() -> None:
    w, dense = quantized(3)
    (rows,) = export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((rows, 8), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    back = export.export(jax.jit(lambda x, sizes: lb.grouped_matmul(x, w, sizes)))(*shapes)
    x = wholes(5, 8)
    for sizes in ([2, 0, 3], [0, 5, 0], [1, 2, 0], [0, 0, 0], [4, 4, 4]):
        np.testing.assert_array_equal(back.call(x, jnp.array(sizes)), lax.ragged_dot(x, dense, jnp.array(sizes)))


@pytest.mark.slow
def test_group_sizes_of_narrow_types() -> None:
    w, dense = quantized(3)
    x, sizes = wholes(300, 8), [100, 120, 80]
    want = lax.ragged_dot(x, dense, jnp.array(sizes))
    np.testing.assert_array_equal(lb.grouped_matmul(x, w, jnp.array(sizes, jnp.uint8)), want)


@pytest.mark.parametrize("rows", [pytest.param(7, marks=pytest.mark.slow), 2])
def test_gradients_are_those_of_ragged_dot(rows: int) -> None:
    """Also where rows of no expert hold NaN."""
    w, dense = quantized(3)
    x, weigh, sizes = wholes(rows, 8), wholes(rows, 3, seed=2), jnp.array([1, 0, rows - 2])
    x = x.at[-1].set(jnp.nan)

    def loss(x: jax.Array, alpha: jax.Array) -> jax.Array:
        y = lb.grouped_matmul(x, QuantArray({**w.fields, "alpha": alpha}, w.type), sizes)
        return (y * weigh).sum()

    dx, dalpha = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, w.fields["alpha"])
    want, dense_grad = jax.grad(lambda x, d: (lax.ragged_dot(x, d, sizes) * weigh).sum(), argnums=(0, 1))(x, dense)
    np.testing.assert_array_equal(dx, want)
    signed = (jnp.sign(dense) * dense_grad).swapaxes(1, 2).reshape(3, 3, 2, 4).sum(-1)
    np.testing.assert_array_equal(dalpha[:, 0], signed)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [lb.bcq(2, group=4, offset=True), lb.uniform(3, group=4)], ids=str)
def test_rows_of_no_expert_are_zero_in_any_format(fmt: lb.Format) -> None:
    w = lb.quantize_array(inputs(2, 8, 3), fmt)
    for rows in (2, 5):
        y = lb.grouped_matmul(inputs(rows, 8).astype(jnp.bfloat16), w, jnp.array([0, 1]))
        assert y.dtype == jnp.bfloat16 and np.any(y[0]) and not np.any(y[1:])
    assert lb.grouped_matmul(jnp.ones((0, 8)), w, jnp.array([0, 0])).shape == (0, 3)


@pytest.mark.slow
def test_no_dense_stack_is_made() -> None:
    """Of 16 experts, compiled: less temporary memory than four of them dense."""
    w = lb.quantize_array(inputs(16, 256, 256), lb.uniform(2, group=64))
    for rows in (2, 64):
        run = jax.jit(lb.grouped_matmul).lower(jnp.ones((rows, 256)), w, jnp.full(16, rows // 16)).compile()
        assert run.memory_analysis().temp_size_in_bytes < 4 * 256 * 256 * 4


def test_a_layer_of_experts() -> None:
    layer, x, sizes = experts(3), wholes(10, 8), jnp.array([4, 1, 5])
    q = lb.quantize(nnx.Dict(moe=layer), fast(ONE)).moe
    assert type(q) is lb.nn.QuantizedExperts and q.kernel.shape == (3, 8, 3)
    assert (q.num_experts, q.in_features, q.out_features) == (3, 8, 3)
    call = nnx.jit(lambda m, x, sizes: m(x, sizes))
    np.testing.assert_array_equal(call(q, x, sizes), call(layer, x, sizes))
    assert call(q, x.astype(jnp.bfloat16), sizes).dtype == call(layer, x.astype(jnp.bfloat16), sizes).dtype == "float32"
    row = lb.report(nnx.Dict(moe=q)).rows[0]
    assert (row.weights, row.bytes) == (72, 3 * 3 * 2 * (1 + 4))
    assert np.std(lb.nn.Experts(2, 64, 64, rngs=nnx.Rngs(0)).kernel[...]) == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_forward_mode(rows: int) -> None:
    w, _ = quantized(3)
    x, product = wholes(rows, 8), lambda x: lb.grouped_matmul(x, w, jnp.array([1, 0, rows - 1]))
    with lb.ops.differentiable("jvp"):
        y, dy = jax.jvp(product, (x,), (2 * x,))
    np.testing.assert_array_equal(dy, 2 * y)
    with pytest.raises(TypeError, match=r"^lb.matmul is differentiated in forward mode, "):
        jax.jvp(product, (x,), (x,))


@pytest.mark.slow
def test_experts_weigh_errors_by_what_they_share_and_by_their_own() -> None:
    model, x, sizes = nnx.Dict(moe=experts(3)), wholes(10, 8), jnp.array([4, 1, 5])
    names = ("second_moment", "output_gradient", "gradient_square")
    solver = lb.alternating(0, weighs_by=names)
    rules = [lb.Rule("moe", lb.bcq(1), solver)]
    stats = lb.calibrate(model, [x], rules=rules, loss=lambda m, x: (m.moe(x, sizes) * jnp.arange(1, 4)[None]).sum())
    s = stats["moe"]
    np.testing.assert_array_equal(s.output_gradient, [1, 4, 9])
    np.testing.assert_array_equal(s.gradient_square[1], np.outer(x[4], [1, 2, 3]) ** 2)
    weighs = s.second_moment[:, None] * s.gradient_square[1] * s.output_gradient[None]
    want = lb.quantize_array(model.moe.kernel[1], lb.bcq(1), solver, importance=weighs)
    got = lb.quantize(model, rules, stats=stats).moe.kernel.array
    assert all(np.array_equal(got.fields[name][1], want.fields[name]) for name in want.fields)


@pytest.mark.slow
def test_experts_are_measured_together() -> None:
    model, x, sizes = nnx.Dict(moe=experts(3)), wholes(10, 8), jnp.array([4, 1, 5])
    run = lambda m, x: m.moe(x, sizes)  # noqa: E731
    stats = lb.calibrate(model, [x], run)
    assert stats["moe"].rows == 10
    np.testing.assert_array_equal(stats["moe"].largest, jnp.abs(x).max(0))
    q = lb.quantize(model, fast(lb.bcq(1)), stats=stats)
    one = lb.quantize_array(model.moe.kernel[1], lb.bcq(1), lb.greedy(), importance=stats["moe"].second_moment)
    np.testing.assert_array_equal(q.moe.kernel.alpha[1], one.fields["alpha"])
    assert [r.layer for r in lb.compare(model, q, x, run).rows] == ["moe", "(output)"]


def test_experts_share_the_products_of_inputs() -> None:
    model, x, fmt = nnx.Dict(moe=lb.nn.Experts(2, 8, 8, rngs=nnx.Rngs(0))), wholes(10, 8), lb.codebook(1, 4, vec=2)
    rule = lb.Rule("moe", fmt, lb.additive_codebooks(1))
    stats = lb.calibrate(model, [x], lambda m, x: m.moe(x, jnp.array([4, 6])), rules=[rule])
    np.testing.assert_array_equal(stats["moe"].gram, x.T @ x / 10)
    np.testing.assert_array_equal(importance(stats, "moe", rule, model.moe), (x.T @ x / 10)[None])


@pytest.mark.slow
def test_experts_stacked_by_vmap_and_run_by_scan() -> None:
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> lb.nn.Experts:
        return lb.nn.Experts(3, 8, 8, rngs=rngs)

    sizes = jnp.array([2, 0, 3])

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, layer: nnx.Module) -> jax.Array:
        return layer(x, sizes)

    layers, x = whole(create(nnx.Rngs(0)), group=4), wholes(5, 8)
    q = lb.quantize(layers, fast(ONE))
    np.testing.assert_array_equal(run(x, q), run(x, layers))
    stats = lb.calibrate(nnx.Dict(moe=layers), [x], lambda m, x: run(x, m.moe))
    assert stats["moe"].second_moment.shape == (2, 8)
    lb.quantize(nnx.Dict(moe=layers), fast(ONE), stats=stats)
    text = "the weight is a stack [2, 3] of f32[k=8 n=8] as bcq(bits=1, group=4), and this layer multiplies a stack [3]"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        q(x, sizes)


W = lb.quantize_array(jnp.ones((2, 8, 3)), lb.uniform(2))
NAME = "f32[k=8 n=3] as uniform(bits=2)"


@pytest.mark.parametrize(
    ("error", "text", "args"),
    [
        (TypeError, "x is int32[4, 8]; grouped_matmul takes floating activations: cast it",
         (jnp.ones((4, 8), "int32"), W, jnp.array([2, 2]))),
        (TypeError, "group_sizes are float32[2]: give the rows of each as integers",
         (jnp.ones((4, 8)), W, jnp.ones(2))),
        (ValueError, f"w has the stack []; grouped_matmul takes a stack [experts] of {NAME}",
         (jnp.ones((4, 8)), jax.tree.map(lambda a: a[0], W), jnp.array([2, 2]))),
        (ValueError, f"x has shape (4, 7), but w is a stack [2] of {NAME}: x must be [rows, 8]",
         (jnp.ones((4, 7)), W, jnp.array([2, 2]))),
        (ValueError, f"x has shape (2, 4, 8), but w is a stack [2] of {NAME}: x must be [rows, 8]",
         (jnp.ones((2, 4, 8)), W, jnp.array([2, 2]))),
        (ValueError, "group_sizes has shape (3,), but w is a stack [2]: one for each",
         (jnp.ones((4, 8)), W, jnp.array([2, 1, 1]))),
        (TypeError, "grouped_matmul takes a QuantArray, not a ArrayImpl: see lb.quantize_array",
         (jnp.ones((4, 8)), jnp.ones((2, 8, 3)), jnp.array([2, 2]))),
    ],
)  # fmt: skip
def test_what_does_not_fit(error: type[Exception], text: str, args: Any) -> None:
    with pytest.raises(error, match=f"^{re.escape(text)}$"):
        lb.grouped_matmul(*args)
