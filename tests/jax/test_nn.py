"""Quantized layers against their dense namesakes, and in NNX: grad, jit, vmap, optimizers, split, export, orbax."""

import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export

import lowbit as lb
from lowbit.testing.tolerance import assert_within, gamma, unit
from tests.models import TOKENS, Net, Shared, arrays, assert_same, dense, fast, inputs, largest, product_bound

MORE = [lb.bcq(2, group=8, offset=True), lb.bcq(3, group=12, scale_dtype="bfloat16"), lb.uniform(4, group=16)]
"""Formats whose tests are slow ones."""
RULES = fast(
    {
        "embed": lb.uniform(4, group=8),
        "layers/*/mlp/up": lb.bcq(3, group=8),
        "layers/**": lb.bcq(2, offset=True),
        "head/layers/0": lb.bcq(3, group=8),
        "head/layers/2": None,
    }
)


def net(seed: int = 0) -> Net:
    return Net(nnx.Rngs(seed))


def small(seed: int = 0) -> Net:
    return lb.quantize(net(seed), RULES)


def loss(model: Net) -> jax.Array:
    return jnp.mean(model(TOKENS) ** 2)


def filled(layer: nnx.Linear) -> nnx.Linear:
    """With a bias that is not 0."""
    if layer.bias is not None:
        layer.bias[...] = inputs(*layer.bias.shape, seed=5, dtype=layer.bias.dtype)
    return layer


@nnx.jit
def call(layer: nnx.Module, x: jax.Array) -> jax.Array:
    return layer(x)


@nnx.jit
def attend(layer: nnx.Module, x: jax.Array) -> jax.Array:
    return layer.attend(x)


# ---- layers


@pytest.mark.parametrize(
    ("fmt", "bias"),
    [
        (lb.bcq(3), True),
        (lb.bcq(3), False),
        (lb.uniform(3), True),
        *(pytest.param(fmt, True, marks=pytest.mark.slow) for fmt in MORE),
    ],
    ids=str,
)
def test_linear_is_the_dense_layer_over_the_decoded_weight(fmt: lb.Format, bias: bool) -> None:
    layer = filled(nnx.Linear(20, 12, use_bias=bias, rngs=nnx.Rngs(0)))
    q = lb.quantize(layer, fast(fmt))
    assert type(q) is lb.nn.Linear
    assert (q.in_features, q.out_features, q.use_bias, q.dtype) == (20, 12, bias, None)
    x = inputs(3, 20)
    exact = np.asarray(x, np.float64) @ dense(q.kernel.array)
    shift = np.asarray(layer.bias[...], np.float64)[None] if bias else np.zeros((1, 12))
    bound = product_bound(x, q.kernel.array, "float32") + unit("float32") * (np.abs(exact) + np.abs(shift)) * 2
    y = q(x)
    assert_within(y, exact + shift, bound, fmt)

    layer.kernel[...] = lb.dequantize(q.kernel.array)
    # Flax sums 20 products of weights that are rounded from at most 2 bits + 4 terms.
    flax = np.abs(np.asarray(x, np.float64)) @ largest(q.kernel.array) * gamma(20 + 2 * fmt["bits"] + 4, "float32")
    assert_within(y, layer(x), bound + flax + 2 * unit("float32") * np.abs(shift), fmt)
    for shape in ((20,), (0, 20), (2, 3, 20)):
        assert nnx.eval_shape(call, q, inputs(*shape)) == nnx.eval_shape(call, layer, inputs(*shape))


@pytest.mark.parametrize(
    ("given", "param", "x_dtype"),
    [
        (None, "bfloat16", "float32"),
        (None, "bfloat16", "bfloat16"),
        pytest.param(None, "float32", "bfloat16", marks=pytest.mark.slow),
        pytest.param(None, "float16", "bfloat16", marks=pytest.mark.slow),
        ("bfloat16", "float32", "float32"),
        pytest.param("float32", "bfloat16", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_linear_promotes_as_flax_does(given: str | None, param: str, x_dtype: str) -> None:
    layer = filled(nnx.Linear(16, 8, dtype=given, param_dtype=param, rngs=nnx.Rngs(0)))
    q = lb.quantize(layer, fast(lb.bcq(3)))
    assert q.kernel.dtype == layer.kernel.dtype and q.bias is not layer.bias
    x = inputs(4, 16, dtype=x_dtype)
    layer.kernel[...] = lb.dequantize(q.kernel.array)
    y, want = call(q, x), call(layer, x)
    assert y.dtype == want.dtype
    out = y.dtype
    rounded = jnp.asarray(x, out)
    exact = np.asarray(rounded, np.float64) @ dense(q.kernel.array)
    bias = np.abs(np.asarray(layer.bias[...], np.float64))[None]
    size = np.abs(np.asarray(rounded, np.float64)) @ largest(q.kernel.array)
    # Ours: the product, then the bias, rounded to it and added. Flax: the weight in its own dtype and in the result's,
    # sums of 16 in any precision down to the result's (a CPU may add bfloat16 up in bfloat16), and the same bias.
    ours = product_bound(rounded, q.kernel.array, out) + 2 * unit(out) * (np.abs(exact) + bias)
    flax = size * (unit(param) + unit(out) + gamma(16 + 1, out)) * 1.01 + 2 * unit(out) * (np.abs(exact) + bias)
    assert_within(y, want, ours + flax, (given, param, x_dtype))


@pytest.mark.parametrize(
    ("fmt", "param"),
    [
        (lb.uniform(3), "float32"),
        pytest.param(lb.bcq(3), "bfloat16", marks=pytest.mark.slow),
        *(pytest.param(fmt, "float32", marks=pytest.mark.slow) for fmt in (lb.bcq(3), *MORE)),
    ],
    ids=str,
)
def test_embed_looks_up_and_attends(fmt: lb.Format, param: str) -> None:
    layer = nnx.Embed(12, 20, param_dtype=param, rngs=nnx.Rngs(0))
    q = lb.quantize(layer, fast(fmt))
    assert type(q) is lb.nn.Embed
    assert (q.num_embeddings, q.features, q.embedding.shape) == (12, 20, (12, 20))
    table, size = dense(q.embedding.array), largest(q.embedding.array)
    ids = jnp.array([[0, 11, 5], [5, 5, 1]])
    rows = call(q, ids)
    # A weight is a sum of at most 2 bits + 4 roundings in float32, and one to the table's dtype.
    bound = size * (gamma(2 * fmt["bits"] + 4, "float32") * 2 + unit(param))
    assert_within(rows, table[np.asarray(ids)], bound[np.asarray(ids)], fmt)
    layer.embedding[...] = lb.dequantize(q.embedding.array)
    assert rows.dtype == layer(ids).dtype == param
    assert q(ids[0, 0]).shape == (20,) and nnx.eval_shape(call, q, ids[:0]).shape == (0, 3, 20)

    x = inputs(3, 20, dtype=param)
    y = attend(q, x)
    assert y.dtype == layer.attend(x).dtype
    assert_within(y, np.asarray(x, np.float64) @ table.T, product_bound(x, q.embedding.array, param), fmt)
    wide = jax.ShapeDtypeStruct((2, 3, 20), "float32")
    assert nnx.eval_shape(attend, q, wide) == nnx.eval_shape(attend, layer, wide)


@pytest.mark.slow
def test_embed_follows_its_dtype_option() -> None:
    layer = nnx.Embed(12, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    q = lb.quantize(layer, fast(lb.bcq(3)))
    for f, x in ((call, jnp.arange(3)), (attend, inputs(2, 16))):
        assert f(q, x).dtype == f(layer, x).dtype == jnp.bfloat16


def test_a_tied_head_is_one_array() -> None:
    q = small()
    fields = [v for _, v in nnx.to_flat_state(nnx.state(q, lb.Code)) if v.shape == q.embed.embedding.planes.shape]
    assert len(fields) == 1
    before = call(q, TOKENS)
    q.embed.embedding.scale[...] *= 2
    assert not np.allclose(before, call(q, TOKENS))
    # The gradient is the sum of what the look-up and the head each give.
    w, x = q.embed, inputs(1, 16)
    both, table, head = (
        nnx.jit(nnx.grad(f, argnums=nnx.DiffState(0, lb.Scale)))(w).embedding.scale[...]
        for f in (
            lambda m: jnp.sum(m.attend(x)) + jnp.sum(m(jnp.array([3]))),
            lambda m: jnp.sum(m(jnp.array([3]))),
            lambda m: jnp.sum(m.attend(x)),
        )
    )
    # A group of 8 terms x (code - zero), each of the two at most 15, and as many again that the table gives.
    bound = 3 * gamma(8 * 4 + 4, "float32") * 2 * 15 * (np.abs(np.asarray(x)).sum() + 8)
    assert_within(both, np.asarray(table, np.float64) + head, bound)
    assert np.any(table) and np.any(head)


def test_the_kernel_explains_itself() -> None:
    kernel = small().layers[0].mlp["up"].kernel
    assert kernel.shape == (16, 32) and kernel.dtype == np.float32
    text = (
        "this kernel is quantized (bcq(bits=3, group=8)) and holds no dense array: use lb.dequantize(kernel.array) "
        "for the f32[16, 32] weight, or kernel.alpha[...] for a field"
    )
    text = f"^{re.escape(text)}$"
    with pytest.raises(AttributeError, match=text):
        _ = kernel.value
    with pytest.raises(TypeError, match=text):
        kernel[...]
    with pytest.raises(TypeError, match=text):
        kernel.get_value()
    assert not hasattr(kernel, "value")  # tools that probe for it see none
    assert {type(kernel.alpha), type(kernel.planes)} == {lb.Scale, lb.Code}


# ---- transformations


def test_grad_reaches_floats_and_no_codes() -> None:
    q = small()
    grads = nnx.jit(nnx.grad(loss))(q)
    types = {type(v) for _, v in nnx.to_flat_state(grads)}
    assert types == {nnx.Param, lb.Scale}
    assert {p for p, _ in nnx.to_flat_state(grads)} == {p for p, _ in nnx.to_flat_state(nnx.state(q, nnx.Param))}
    assert all(np.isfinite(v).all() and np.any(v) for v in jax.tree.leaves(nnx.state(grads, lb.Scale)))


@pytest.mark.slow
def test_jit_takes_the_model_as_argument() -> None:
    q, traces = small(), []

    @nnx.jit
    def run(model: Net, tokens: jax.Array) -> jax.Array:
        traces.append(1)
        return model(tokens)

    eager, jitted = q(TOKENS), run(q, TOKENS)
    # Both orders of operations err by at most what ten layers of sums of 32 terms of 8 roundings do to numbers that a
    # layer norm keeps near 1; relative to the largest logit.
    np.testing.assert_allclose(eager, jitted, rtol=0, atol=10 * gamma(32 * 8, "float32") * np.abs(eager).max())
    run(small(1), TOKENS)
    assert len(traces) == 1, "another model with the same types must not trace again"


@pytest.mark.slow
def test_vmap_over_stacked_models_and_over_inputs() -> None:
    @nnx.jit
    @partial(nnx.vmap, in_axes=0)
    def make(key: jax.Array) -> lb.nn.Linear:
        return lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(key)), fast(lb.bcq(2, group=8)))

    keys = jax.random.split(jax.random.key(0), 3)
    stacked = make(keys)  # in one trace, with `lb.quantize` inside
    assert stacked.kernel.alpha.shape == (3, 2, 8, 2)
    x = inputs(3, 4, 16)
    each = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(0, 0)))(stacked, x)
    one = lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(keys[1])), fast(lb.bcq(2, group=8)))
    assert_within(each[1], one(x[1]), 2 * product_bound(x[1], one.kernel.array, "float32"))
    same = nnx.jit(nnx.vmap(lambda m, x: m(x), in_axes=(None, 0)))(one, x)
    bound = product_bound(x.reshape(12, 16), one.kernel.array, "float32").reshape(3, 4, 8)
    assert_within(same, one(x), 2 * bound)


@pytest.mark.slow
def test_scan_over_stacked_layers() -> None:
    layers = [lb.quantize(nnx.Linear(8, 8, rngs=nnx.Rngs(i)), fast(lb.bcq(2))) for i in range(3)]
    graph, first = nnx.split(layers[0])
    states = [nnx.split(layer)[1] for layer in layers]
    stacked = nnx.merge(graph, jax.tree.map(lambda *a: jnp.stack(a), first, *states[1:]))

    @nnx.jit
    @partial(nnx.scan, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x: jax.Array, layer: lb.nn.Linear) -> jax.Array:
        return layer(x)

    x, want = inputs(2, 8), inputs(2, 8)
    size = np.abs(np.asarray(x, np.float64))
    for layer in layers:
        want, size = layer(want), size @ largest(layer.kernel.array)
    # Each product errs by its bound of the magnitudes that reach it, and carries on what came before.
    terms = 8 * 8 + 8
    assert_within(forward(x, stacked), want, 2 * 3 * 3 * gamma(terms, "float32") * size * 1.01)


def test_split_merge_and_filters() -> None:
    q = small()
    graph, codes, scales, rest = nnx.split(q, lb.Code, lb.Scale, ...)
    assert all(v.dtype == np.uint8 for v in jax.tree.leaves(codes))
    assert len(jax.tree.leaves(scales)) == 1 + 2 * 1 + 2 * 2 + 1  # embed, up: alpha; down: alpha, beta; head
    assert not {type(v) for _, v in nnx.to_flat_state(rest)} & {lb.Code, lb.Scale}
    again = nnx.merge(graph, codes, scales, rest)
    assert_same(arrays(again), arrays(q))
    np.testing.assert_array_equal(call(again, TOKENS), call(q, TOKENS))
    assert {type(v) for _, v in nnx.to_flat_state(nnx.state(q, lb.Codebook))} == set()


def test_eval_shape_gives_the_same_types() -> None:
    abstract = nnx.eval_shape(lambda: lb.quantize(net(), RULES))
    q = small()
    for path, kernel in lb.nn.kernels(q).items():
        assert lb.nn.kernels(abstract)[path].type == kernel.type
    for (p, a), (r, b) in zip(nnx.to_flat_state(nnx.state(abstract)), nnx.to_flat_state(nnx.state(q)), strict=True):
        assert p == r and type(a) is type(b) and (a.shape, a.dtype) == (b.shape, b.dtype)
        assert isinstance(a.get_value(), jax.ShapeDtypeStruct)


@pytest.mark.parametrize("train", ["scales", pytest.param("parameters", marks=pytest.mark.slow)])
def test_optimizer_trains_scales_alone(train: str) -> None:
    q = small()
    wrt = lb.Scale if train == "scales" else nnx.Param
    optimizer = nnx.Optimizer(q, optax.adam(1e-2), wrt=wrt)
    before = arrays(q)

    @nnx.jit
    def step(model: Net, optimizer: nnx.Optimizer[Net]) -> jax.Array:
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(q, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    after = arrays(q)
    for path, variable in nnx.to_flat_state(nnx.state(q)):
        name = "/".join(map(str, path))
        trained = isinstance(variable, wrt)
        assert (before[name].tobytes() != after[name].tobytes()) == trained, name
    scales = sum(v.size for v in jax.tree.leaves(nnx.state(q, wrt)))
    assert sum(v.size for v in jax.tree.leaves(nnx.state(optimizer.opt_state))) == 2 * scales + 1


@pytest.mark.slow
def test_sharing_survives_training() -> None:
    q = lb.quantize(Shared(nnx.Rngs(0)), fast(lb.bcq(3)))
    optimizer = nnx.Optimizer(q, optax.sgd(0.1), wrt=lb.Scale)

    @nnx.jit
    def step(model: Shared, optimizer: nnx.Optimizer[Shared]) -> jax.Array:
        f = nnx.value_and_grad(lambda m: jnp.mean(m(inputs(4, 16)) ** 2), argnums=nnx.DiffState(0, lb.Scale))
        value, grads = f(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(q, optimizer)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert q.z is q.sub[0] and q.sub[1] is q.a["q"] and q.z is not q.sub[1]


# ---- files of others


def test_export_of_a_forward() -> None:
    q = small()
    exported = export.export(jax.jit(lambda tokens: q(tokens)))(jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype))
    back = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(back.call(TOKENS), jax.jit(lambda tokens: q(tokens))(TOKENS))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_export_of_look_ups_of_any_number(dtype: str) -> None:
    table = lb.quantize(nnx.Embed(6, 16, rngs=nnx.Rngs(0)), lb.bcq(2, group=8))
    (batch,) = export.symbolic_shape("batch")
    exported = export.export(jax.jit(lambda ids: table(ids)))(jax.ShapeDtypeStruct((batch, 2), dtype))
    ids = jnp.array([[1, 5], [0, 7], [5, 2]], dtype)
    np.testing.assert_array_equal(exported.call(ids), table(ids))


@pytest.mark.slow
def test_export_with_the_weights_as_arguments() -> None:
    w = small().layers[0].mlp["up"].kernel.array
    x = inputs(2, 16)
    back = export.deserialize(export.export(jax.jit(lb.matmul))(x, w).serialize())
    np.testing.assert_array_equal(back.call(x, w), jax.jit(lb.matmul)(x, w))
    other = lb.quantize_array(inputs(16, 32), lb.bcq(2), lb.greedy())
    with pytest.raises(ValueError, match=re.escape("as bcq(bits=2)")):
        back.call(x, other)


def test_orbax_round_trip(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # orbax's own
        import orbax.checkpoint as ocp

        q = small()
        abstract = nnx.eval_shape(lambda: lb.quantize(net(), RULES))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(q)))
            checkpointer.wait_until_finished()
            graph, state = nnx.split(abstract)
            restored = checkpointer.restore(tmp_path / "model", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    back = nnx.merge(graph, state)
    assert_same(arrays(back), arrays(q))
    np.testing.assert_array_equal(call(back, TOKENS), call(q, TOKENS))
