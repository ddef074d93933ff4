"""Quantized `LinearGeneral`, `Einsum` and `Conv` against the dense layers over the same weight: equal, not close."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.nn.kinds import KINDS, dense_matrices
from lowbit.nn.view import View
from lowbit.testing.tolerance import gamma
from tests.models import fast, inputs, whole, wholes

ONE = lb.bcq(1, group=4)
FREE: Any = {"kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)}
"""The tests put weights of their own in place: random ones would only have to be compiled."""
DENSE = "; leave it dense with a rule for its path with the format None"


def general(*args: Any, **options: Any) -> nnx.LinearGeneral:
    return nnx.LinearGeneral(*args, **FREE, **options)


def einsum(*args: Any, **options: Any) -> nnx.Einsum:
    return nnx.Einsum(*args, **FREE, **options)


def conv(*args: Any, **options: Any) -> nnx.Conv:
    return nnx.Conv(*args, **FREE, **options)


LAYERS = [
    (lambda: general(6, (2, 3)), (2, 5, 6), (6, 6)),
    (lambda: general((3, 2), 4, axis=(-1, 1)), (4, 3, 2), (6, 4)),  # Flax sorts the axes, not the features
    (lambda: general((2, 3), (4, 5), axis=(0, -1)), (2, 4, 3), (6, 20)),
    (lambda: general(6, (2, 3), batch_axis={0: 4}), (4, 5, 6), (4, 6, 6)),
    (lambda: general((6, 3), 2, axis=(2, 4), batch_axis={0: 4, 1: 2}), (4, 2, 6, 5, 3), (4, 2, 18, 2)),
    (lambda: general((6, 3), 2, axis=(-2, -1), use_bias=False), (6, 3), (18, 2)),
    (lambda: einsum("BTD,NDH->BTNH", (4, 6, 3)), (2, 3, 6), (6, 12)),
    (lambda: einsum("BTNH,NHD->BTD", (4, 6, 3), (3,)), (2, 3, 4, 6), (24, 3)),
    (lambda: einsum("nta,hab->nthb", (8, 2, 4), (8, 4)), (3, 5, 2), (2, 32)),
    (lambda: einsum("...d,fd->f...", (3, 6), (3,)), (2, 4, 6), (3, 6)),
    (lambda: einsum("... d, df -> ...f", (6, 3), (3,)), (6,), (6, 3)),
    (lambda: einsum("ebd,efd->bef", (4, 5, 6), (4, 5)), (4, 3, 6), (4, 5, 6)),
    (lambda: conv(4, 6, (1, 1), padding=0), (2, 5, 5, 4), (4, 6)),
    (lambda: conv(4, 6, 1, strides=2, padding=1), (2, 5, 4), (4, 6)),
    (lambda: conv(4, 6, (2, 2)), (5, 5, 4), (16, 6)),
    (lambda: conv(4, 6, (3, 2), strides=(2, 1), padding="VALID"), (2, 3, 7, 5, 4), (24, 6)),
    (lambda: conv(4, 6, (3, 2), padding="CIRCULAR", kernel_dilation=(1, 2)), (2, 7, 5, 4), (24, 6)),
    (lambda: conv(4, 6, (3, 2), padding="REFLECT"), (1, 7, 5, 4), (24, 6)),
    (lambda: conv(4, 6, 3, padding="CAUSAL", kernel_dilation=2, use_bias=False), (2, 7, 4), (12, 6)),
    (lambda: conv(4, 6, (3, 3), padding=(1, (0, 2)), input_dilation=2, strides=None), (2, 4, 4, 4), (36, 6)),
    (lambda: conv(4, 6, (3, 3), feature_group_count=2), (2, 4, 4, 4), (2, 18, 3)),
    (lambda: conv(4, 8, (2, 2), feature_group_count=4), (2, 4, 4, 4), (4, 4, 2)),
    (lambda: conv(4, 6, 1, feature_group_count=2), (2, 4, 4), (2, 2, 3)),
]
QUICK = (0, 3, 5, 10, 11, 13, 16, 17, 20)
"""Of each kind of layer, batch, padding and group of features one."""


@pytest.mark.parametrize(
    ("make", "shape", "matrices"),
    [pytest.param(*case, marks=() if i in QUICK else pytest.mark.slow) for i, case in enumerate(LAYERS)],
)
def test_equals_the_dense_layer(
    make: Callable[[], nnx.Module], shape: tuple[int, ...], matrices: tuple[int, ...]
) -> None:
    layer, x = whole(make(), group=4), wholes(*shape)
    q = lb.quantize(layer, fast(ONE))
    assert type(q) is KINDS[type(layer)].quantized and q.kernel.shape == matrices
    np.testing.assert_array_equal(q.view.kernel(lb.dequantize(q.kernel.array)), layer.kernel[...])
    y, want = q(x), layer(x)
    assert y.dtype == want.dtype
    np.testing.assert_array_equal(y, want)
    for name, value in vars(layer).items():  # what others read of a layer is still there
        if name in vars(q) and name not in ("kernel", "bias") and not name.startswith("_"):
            assert getattr(q, name) == value, name


@pytest.mark.parametrize(("make", "shape", "matrices"), LAYERS)
def test_outputs_are_rows_times_matrices(
    make: Callable[[], nnx.Module], shape: tuple[int, ...], matrices: tuple[int, ...]
) -> None:
    layer, x = whole(make(), group=4), wholes(*shape)
    if layer.bias is not None:
        layer.bias.set_value(jnp.zeros_like(layer.bias[...]))
    kind, w = KINDS[type(layer)], np.asarray(dense_matrices(layer))
    w = w if kind.view(layer).dims[0] == "k" else w.swapaxes(-1, -2)
    rows = np.asarray(kind.rows(layer, x))
    want = rows.reshape(*w.shape[:-2], -1, w.shape[-2]) @ w
    np.testing.assert_array_equal(np.asarray(kind.outputs(layer, layer(x))).reshape(want.shape), want)


@pytest.mark.parametrize("index", [9, pytest.param(20, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_dense_layer(index: int) -> None:
    make, shape, _ = LAYERS[index]
    layer, x = whole(make(), group=4), wholes(*shape)
    q = lb.quantize(layer, fast(ONE))
    weigh = wholes(*layer(x).shape, seed=2)
    grad = nnx.jit(nnx.grad(lambda m, x: (m(x) * weigh).sum(), argnums=(0, 1)))
    (of_q, dx), (of_layer, want) = grad(q, x), grad(layer, x)
    np.testing.assert_array_equal(dx, want)
    np.testing.assert_array_equal(of_q.bias[...], of_layer.bias[...])
    # d alpha of a group is the sum of its signs times the dense gradient.
    dense, d = (q.view.matrices(a[...]) for a in (layer.kernel, of_layer.kernel))
    signed = jnp.sign(dense) * d
    signed = signed if q.view.dims[0] == "n" else signed.swapaxes(-1, -2)
    padded = jnp.pad(signed, [(0, 0)] * (signed.ndim - 1) + [(0, -signed.shape[-1] % 4)])
    groups = padded.reshape(*signed.shape[:-1], -1, 4).sum(-1)
    np.testing.assert_array_equal(of_q.kernel.alpha[...][..., 0, :, :], groups)


@pytest.mark.parametrize("index", [3, 11, 20])
def test_promotes_as_flax_does(index: int) -> None:
    make, shape, _ = LAYERS[index]
    layer = make()
    for given, x_dtype in ((None, "bfloat16"), ("bfloat16", "float32"), (None, "int32")):
        layer.dtype = None if given is None else jnp.dtype(given)
        x = jax.ShapeDtypeStruct(shape, x_dtype)
        got = nnx.eval_shape(lambda m, x: lb.quantize(m, ONE)(x), layer, x)
        assert got == nnx.eval_shape(lambda m, x: m(x), layer, x), (given, x_dtype)


def test_groups_lie_in_the_order_that_is_promised() -> None:
    """Each filter of a convolution, and each head's slice, is a group with a magnitude of its own."""
    sign = np.random.default_rng(0).choice([-1.0, 1.0], (2, 2, 3, 5))
    layer = conv(3, 5, (2, 2))
    layer.kernel[...] = jnp.asarray(sign * np.arange(1, 16).reshape(1, 1, 3, 5), "float32")
    q = lb.quantize(layer, fast(lb.bcq(1, group=4)))
    np.testing.assert_array_equal(q.kernel.alpha[0], np.arange(1, 16).reshape(3, 5).T)
    heads = einsum("BTNH,NHD->BTD", (3, 4, 5))
    heads.kernel[...] = jnp.asarray(sign.reshape(3, 4, 5) * np.arange(1, 16).reshape(3, 1, 5), "float32")
    q = lb.quantize(heads, fast(lb.bcq(1, group=4)))
    np.testing.assert_array_equal(q.kernel.alpha[0], np.arange(1, 16).reshape(3, 5).T)


@pytest.mark.slow
def test_attention_of_flax() -> None:
    attention = nnx.MultiHeadAttention(2, 8, decode=False, **FREE)
    for name in ("query", "key", "value", "out"):
        whole(getattr(attention, name), group=4)
    q = lb.quantize(attention, fast(ONE))
    assert type(q.query) is type(q.out) is lb.nn.LinearGeneral
    x = wholes(2, 5, 8)
    np.testing.assert_array_equal(q.query(x), attention.query(x))
    # Query, key and value are exact, the softmax is the same program; `out` sums eight products of any size.
    bound = np.abs(attention.value(x)).max() * np.abs(attention.out.kernel[...]).max() * 8 * gamma(2 * 9 + 6, "float32")
    np.testing.assert_allclose(q(x), attention(x), rtol=0, atol=2 * bound)


@pytest.mark.slow
def test_stacked_by_vmap_and_run_by_scan() -> None:
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs: nnx.Rngs) -> nnx.Conv:
        return nnx.Conv(4, 4, 3, feature_group_count=2, **{**FREE, "rngs": rngs})

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, layer: nnx.Module) -> jax.Array:
        return jnp.clip(layer(x), -9, 9)

    layers, x = whole(create(nnx.Rngs(0)), group=4), wholes(2, 5, 4)
    q = lb.quantize(layers, fast(ONE))
    assert q.kernel.shape == (3, 2, 6, 2)
    np.testing.assert_array_equal(run(x, q), run(x, layers))


@pytest.mark.slow
def test_a_weight_shared_by_layers_of_any_kind() -> None:
    """One table: looked up, multiplied by an einsum, and by a linear layer the other way round."""
    model = nnx.Dict(
        embed=nnx.Embed(6, 8, rngs=nnx.Rngs(0)),
        head=einsum("bd,vd->bv", (6, 8)),
        general=general(6, (8,), use_bias=False),
        linear=nnx.Linear(6, 8, use_bias=False, rngs=nnx.Rngs(1)),
    )
    model.head.kernel = model.embed.embedding
    model.general.kernel = model.linear.kernel
    q = lb.quantize(model, fast(ONE))
    assert q.head.kernel is q.embed.embedding and q.general.kernel is q.linear.kernel
    assert set(lb.nn.kernels(q)) == {"embed/embedding", "general/kernel"}
    assert [r.weights for r in lb.report(q).rows] == [48, 48]
    x = wholes(2, 8)
    np.testing.assert_array_equal(q.head(x), q.embed.attend(x))
    # The same array as two other matrices is stored twice: the groups run along the other axis.
    model.linear.kernel = model.embed.embedding
    apart = lb.quantize(model, fast(ONE))
    assert apart.linear.kernel is not apart.embed.embedding
    assert lb.dequantize(apart.linear.kernel.array).shape == (6, 8)


@pytest.mark.slow
def test_calibration_and_comparison_know_them() -> None:
    model = nnx.Dict(
        conv=whole(conv(4, 6, (2, 2), feature_group_count=2), group=4),
        general=whole(general((3, 6), 2, axis=(-2, -1)), group=4),
        einsum=whole(einsum("bf,fg->bg", (2, 3)), group=4),
    )
    run = lambda m, x: m.einsum(m.general(m.conv(x)[:, 0]))  # noqa: E731
    x = wholes(2, 3, 3, 4)
    stats = lb.calibrate(model, [x], run)
    assert {p: s.second_moment.shape for p, s in stats.items()} == {"conv": (2, 8), "general": (18,), "einsum": (2,)}
    assert {p: s.rows for p, s in stats.items()} == {"conv": 18, "general": 2, "einsum": 2}
    hidden = model.conv(x)[:, 0].reshape(2, 18)
    np.testing.assert_array_equal(stats["general"].second_moment, (hidden**2).mean(0))
    np.testing.assert_array_equal(stats["conv"].largest[1, 0], jnp.abs(x[..., 2]).max())
    assert lb.quantize(model, fast(ONE), stats=stats).conv.kernel.shape == (2, 8, 3)
    q = lb.quantize(model, fast(ONE))
    found = lb.compare(model, q, x, run)
    assert [(r.layer, r.relative_error) for r in found.rows] == [
        ("conv", 0.0), ("general", 0.0), ("einsum", 0.0), ("(output)", 0.0),
    ]  # fmt: skip
    for layer in (q.conv, q.general, q.einsum):
        assert "decode" in lb.explain(layer)


@pytest.mark.slow
def test_squared_gradients_of_any_kind_are_weights_of_errors() -> None:
    """Of the second group of features, with the axes in the order that is promised for k."""
    model, x = nnx.Dict(up=conv(4, 6, 2, padding="VALID", feature_group_count=2)), wholes(2, 3, 4)
    model.up.kernel.set_value(inputs(2, 2, 6))
    loss = lambda m, x: (m.up(x) * jnp.arange(6)[None, None]).sum()  # noqa: E731
    solver = lb.alternating(0, weighs_by=("gradient_square", "output_gradient"))
    rules = [lb.Rule("up", ONE, solver)]
    stats = lb.calibrate(model, [x], rules=rules, loss=loss)["up"]
    np.testing.assert_array_equal(stats.gradient_square, nnx.grad(loss)(model, x).up.kernel[...] ** 2)
    np.testing.assert_array_equal(stats.output_gradient, np.arange(6).reshape(2, 3) ** 2)
    second = lambda a: jnp.asarray(a)[..., 3:].transpose(1, 0, 2).reshape(4, 3)  # noqa: E731
    weighs = second(stats.gradient_square) * jnp.arange(3, 6)[None] ** 2
    want = lb.quantize_array(second(model.up.kernel[...]), ONE, solver, importance=weighs)
    got = lb.quantize(model, rules, stats={"up": stats}).up.kernel.array
    assert all(np.array_equal(got.fields[name][1], want.fields[name]) for name in want.fields)


# ---- what is refused

ALONE = "over one operand alone, which is no product"
REFUSED = [
    (
        lambda: einsum("bd,...df->bf", (6, 3)),
        "einsum 'bd,...df->bf' has an ellipsis that is not one of both input and output",
    ),
    (lambda: einsum("bdd,df->bf", (6, 3)), "einsum 'bdd,df->bf' repeats a letter within the input"),
    (lambda: einsum("bd,df->bf", (2, 6, 3)), "einsum 'bd,df->bf' names 2 axes of a kernel with the shape (2, 6, 3)"),
    (lambda: einsum("bd,dfg->bf", (6, 3, 2)), f"einsum 'bd,dfg->bf' sums 'g' {ALONE}"),
    (lambda: einsum("btd,df->bf", (6, 3)), f"einsum 'btd,df->bf' sums 't' {ALONE}"),
    (lambda: einsum("bd,dc->bdc", (6, 3)), "einsum 'bd,dc->bdc' sums over no axis of the kernel, which is no product"),
    (lambda: einsum("bd,df->bf", (6, 3), einsum_op=lambda *a: None), "einsum_op is not the default one"),
    (lambda: conv(4, 6, 3, mask=jnp.ones((3, 4, 6))), "mask is not the default one"),
    (lambda: conv(4, 6, 3, conv_general_dilated=lambda *a: None), "conv_general_dilated is not the default one"),
    (lambda: general(4, 6, dot_general_cls=lambda: None), "dot_general_cls is not the default one"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_layers_that_are_no_product_are_refused(make: Callable[[], nnx.Module], reason: str) -> None:
    text = f"layer 'up' cannot be quantized: its {reason}{DENSE}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        lb.quantize(nnx.Dict(up=make()), ONE)


@pytest.mark.slow
def test_a_layer_that_cannot_be_quantized_is_not_measured() -> None:
    model = nnx.Dict(a=einsum("bd,dc->bdc", (6, 3)), b=nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    run = lambda m, x: m.b(m.a(x))  # noqa: E731
    assert set(lb.calibrate(model, [wholes(2, 6)], run)) == {"b"}
    assert set(lb.calibrate(model, [wholes(2, 6)], run, rules={"a": None, "b": ONE})) == {"b"}
    with pytest.raises(ValueError, match=r"^layer 'a' cannot be quantized: its einsum 'bd,dc->bdc' sums over no axis"):
        lb.calibrate(model, [wholes(2, 6)], run, rules=ONE)


def test_calls_that_do_not_fit() -> None:
    q = lb.quantize(nnx.Dict(g=general((2, 3), 4, axis=(-2, -1)), e=einsum("bd,df->bf", (6, 3)), c=conv(4, 6, 3)), ONE)
    with pytest.raises(
        ValueError, match=r"^the input has shape \(5, 3, 2\): its axes \(1, 2\) must have the sizes \(2, 3\)$"
    ):
        q.g(wholes(5, 3, 2))
    with pytest.raises(ValueError, match=r"^the input has shape \(6,\), but 'bd,df->bf' names 2 axes of it$"):
        q.e(wholes(6))
    with pytest.raises(ValueError, match=r"^the kernel was quantized for 'bd,df->bf', it cannot compute 'bd,df->fb'$"):
        q.e(wholes(2, 6), "bd,df->fb")
    assert q.e(wholes(2, 6), "bd, df -> bf").shape == (2, 3)
    text = "the input has shape (5, 3): it must be [*batch, *space, features] with 1 axes of space and 4 features"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        q.c(wholes(5, 3))
    with pytest.raises(NotImplementedError, match=r"^out_sharding='x': quantized layers leave the sharding to"):
        q.g(wholes(5, 2, 3), out_sharding="x")
    with pytest.raises(ValueError, match=r"^CAUSAL padding is for one axis of space, not for a window \(3, 3\)$"):
        lb.quantize(conv(4, 6, (3, 3), padding="CAUSAL"), fast(ONE))(wholes(1, 5, 5, 4))


def test_a_view_and_back() -> None:
    view = View((2, 3, 8), (1,), (3, 0), (2,), (2, 3, 2, 4))
    kernel = inputs(7, 2, 3, 8)
    matrices = view.matrices(kernel)
    assert view.dims == ("k", "n") and matrices.shape == (7, 3, 8, 2)
    np.testing.assert_array_equal(matrices[5, 1, 3 * 2 + 1], kernel[5, 1, 1].reshape(2, 4)[:, 3])
    np.testing.assert_array_equal(view.kernel(matrices), kernel)


@pytest.mark.slow
def test_a_bias_of_two_dims_is_no_weight(caplog: pytest.LogCaptureFixture) -> None:
    """That of a layer over several axes, and those of a stack of layers."""
    stacked = nnx.vmap(lambda rngs: nnx.Linear(8, 4, rngs=rngs))(nnx.Rngs(0).split(3))
    model = nnx.Dict(general=nnx.LinearGeneral(8, (2, 4), rngs=nnx.Rngs(0)), stacked=stacked)
    q = lb.quantize(model, fast(ONE))
    assert caplog.messages == []
    dense, small = lb.report(model), lb.report(q)
    assert [(r.layer, r.weights) for r in dense.rows] == [(r.layer, r.weights) for r in small.rows]
    assert [(r.layer, r.weights) for r in small.rows] == [("general", 64), ("stacked", 96)]
    assert dense.other_bytes == small.other_bytes == 4 * (8 + 3 * 4)
