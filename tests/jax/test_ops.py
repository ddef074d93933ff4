"""`lb.matmul`, its gradients and `take`, against dense float64 references."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit import ops
from lowbit.array import QuantArray
from lowbit.formats import Format
from lowbit.ir import Concat, Merge, const, param, params, slice_, transpose
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.ops import take
from lowbit.passes import choose
from lowbit.passes.choose import TIE
from lowbit.passes.lower_xla import emit
from lowbit.planning import MACHINES
from lowbit.quant_type import QuantType
from lowbit.testing import random_array
from lowbit.testing.checks import check_gradients, check_product, random_rows, stored
from lowbit.testing.terms import product_term
from lowbit.testing.tolerance import assert_within, exact_and_bound, gamma, rounded, tiny
from tests.terms import environment

Array = np.ndarray[Any, Any]


def quant(
    fmt: Format, k: int, n: int, *, dims: tuple[str, str] = ("k", "n"), dtype: Any = "f32", seed: int = 0
) -> QuantArray:
    """Random stored arrays, random bits in the padding too: no reading may look at it."""
    t = QuantType(tuple((d, {"k": k, "n": n}[d]) for d in dims), short(dtype), fmt)
    return QuantArray.of(environment(t.decode, seed, exact=False), t)


def activation(*shape: int, dtype: Any = np.float32, seed: int = 9) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def dense(w: QuantArray) -> Array:
    """The exact weights, [k, n]."""
    return exact_and_bound(w.type.decode, stored(w), ("k", "n"))[0]


# ---------------------------------------------------------------- values

WIDTHS = [
    fmt
    for bits in range(1, 9)
    for fmt in (
        lb.bcq(bits, group=[128, 33, 1, None, 500][bits % 5]),
        lb.bcq(bits, group=[33, 16, None, 1][bits % 4], offset=True, scale_dtype=["float16", "bfloat16"][bits % 2]),
        lb.uniform(bits, group=[None, 33, 16, 1][bits % 4], scale_dtype=["float32", "float16"][bits % 2]),
    )
]


@pytest.mark.parametrize("fmt", WIDTHS, ids=str)
def test_every_width(fmt):
    check_product(activation(3, 140), quant(fmt, 140, 5))


@pytest.mark.parametrize("fmt", [lb.bcq(3, 16, offset=True), lb.uniform(4, 16)], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (2, 1, 3), (1, 64, 7), (5, 13, 1), (7, 131, 11)])
def test_odd_shapes(m, k, n, fmt):
    check_product(activation(m, k), quant(fmt, k, n))


@pytest.mark.parametrize("dims", [("k", "n"), ("n", "k")])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_activation_dtypes_and_order(dtype, dims):
    check_product(activation(4, 70, dtype=dtype), quant(lb.bcq(3, 33, offset=True), 70, 6, dims=dims, dtype=dtype))


def test_activations_in_any_order_in_memory():
    w = random_array(lb.QuantType((("k", 40), ("n", 7)), "f32", lb.bcq(3, group=8)))
    x = random_rows(6, 80)
    want = lb.matmul(jnp.asarray(x[::2, ::2]), w)
    for strided in (x[::2, ::2], np.asfortranarray(x[::2, ::2]), x.T.copy().T[::2, ::2], jnp.asarray(x.T[::2, ::2]).T):
        np.testing.assert_array_equal(lb.matmul(strided, w), want)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3), (2, 0, 3), (1,)])
def test_batch_shapes(batch):
    w = quant(lb.uniform(4, 16), 40, 3)
    if 0 in batch:
        assert lb.matmul(jnp.ones((*batch, 40)), w).shape == (*batch, 3)
    else:
        check_product(activation(*batch, 40), w)
    assert lb.matmul(jnp.ones((*batch, 40), jnp.bfloat16), w).dtype == jnp.bfloat16


LARGE = (lb.bcq(3, group=128), lb.bcq(4, group=128, offset=True), lb.uniform(4, group=128))


@pytest.mark.parametrize("m", [1, 4, 64, 256])
@pytest.mark.parametrize("fmt", LARGE, ids=str)
def test_temporary_memory_of_a_large_product(fmt, m):
    """16 MiB at 4096 x 4096, where the dense weight has 64 and one 32-bit index for every byte of 3 planes 24."""
    t = QuantType((("k", 4096), ("n", 4096)), "f32", fmt)
    fields = {n: jax.ShapeDtypeStruct(tuple(f.dims.values()), numpy_dtype(f.dtype)) for n, f in t.fields.items()}
    w, x = QuantArray(fields, t), jax.ShapeDtypeStruct((m, 4096), "float32")
    assert jax.jit(lb.matmul).lower(x, w).compile().memory_analysis().temp_size_in_bytes <= 16 << 20


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("fmt", LARGE, ids=str)
def test_one_row_on_other_devices_decodes_in_the_loop_that_sums(fmt, platform):
    """At batch 1 a GPU or TPU reads the stored bytes once: no decoded weight is written for a library's product."""
    t = QuantType((("k", 512), ("n", 256)), "bf16", fmt)
    chosen = lb.plan((1, 512), t, platform, "bfloat16").term
    leaves = params(chosen).values()
    env = {p.name: jax.ShapeDtypeStruct(tuple(p.dims.values()), numpy_dtype(p.dtype)) for p in leaves}
    traced = jax.jit(lambda env: emit(chosen, env, MACHINES[platform].style)).trace(env)
    program = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else "tpu",)).as_text()
    assert "dot_general" not in program and "gather" not in program and "while" not in program


def test_plan_is_sorted_and_printed():
    p = lb.plan((2, 3, 4096), quant(lb.bcq(3, 128), 4096, 8).type)
    first, *rest = [f.nanoseconds for f in p.forms]
    assert rest == sorted(rest) and first <= TIE * rest[0]
    lines = str(p).splitlines()
    assert lines[0] == "x[6, k] @ f32[k=4096 n=8] as bcq(bits=3, group=128) on cpu"
    assert [line.split()[0] for line in lines[2:]] == [*p.names, "mma", "sums", "dense"]
    assert all("refused: it is for GPUs" in line for line in lines[-2:])
    assert lb.plan((6, 4096), p_type := quant(lb.bcq(3, 128), 4096, 8).type, platform="tpu").machine == "tpu"
    assert lb.plan((6, 4096), p_type) is lb.plan((2, 3, 4096), p_type)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("fmt", [lb.bcq(4, 500, offset=True, scale_dtype="bfloat16"), lb.bcq(8, 1)], ids=str)
def test_gradients(fmt):
    check_gradients(activation(3, 70), quant(fmt, 70, 5))


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (4, 13, 1), (2, 1, 3)])
def test_gradients_of_odd_shapes(m, k, n):
    check_gradients(activation(m, k), quant(lb.bcq(2, 8, offset=True), k, n))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_gradients_of_narrow_activations_under_jit(dtype):
    check_gradients(activation(3, 40, dtype=dtype), quant(lb.bcq(2, 16, offset=True), 40, 5, dims=("n", "k")))


def test_gradients_with_a_split_field():
    fmt = lb.bcq(3, 16, scale_dtype="float16")
    t = QuantType((("k", 40), ("n", 5)), "f32", fmt, (("alpha", "p", 1),))
    w = QuantArray.of(environment(t.decode, 0, exact=False), t)
    assert set(w.fields) == {"planes", "alpha_first", "alpha_rest"}
    check_product(activation(3, 40), w)
    check_gradients(activation(3, 40), w)


def test_no_rows_no_gradient():
    w, x = quant(lb.bcq(2, 16), 40, 3), jnp.asarray(activation(0, 40))

    def loss(alpha: jax.Array, x: jax.Array) -> jax.Array:
        return lb.matmul(x, QuantArray({**w.fields, "alpha": alpha}, w.type)).sum()

    dalpha, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(w.fields["alpha"], x)
    assert dalpha.shape == w.fields["alpha"].shape and not jnp.any(dalpha) and dx.shape == (0, 40)


def test_forward_mode_is_refused():
    w, x = quant(lb.bcq(2, 16), 40, 3), jnp.asarray(activation(2, 40))
    with pytest.raises(
        TypeError, match=r'differentiated in forward mode, .*: pass differentiable="jvp", or for a whole'
    ):
        jax.jvp(lambda x: lb.matmul(x, w), (x,), (x,))
    with pytest.raises(ValueError, match="differentiable must be 'vjp' or 'jvp', not 'both'"):
        lb.matmul(x, w, differentiable="both")


@pytest.mark.parametrize("m", [1, 5])
def test_forward_mode_of_x_and_scales(m):
    """The product is linear in each: the tangent is the product with the tangent, and the gradients are the same."""
    w, x = quant(lb.bcq(2, 16), 40, 3), jnp.asarray(activation(m, 40))
    other = QuantArray({**w.fields, "alpha": w.fields["alpha"][::-1]}, w.type)

    def product(x, alpha):
        return lb.matmul(x, QuantArray({**w.fields, "alpha": alpha}, w.type), differentiable="jvp")

    _, by_x = jax.jvp(lambda x: product(x, w.fields["alpha"]), (x,), (2 * x,))
    np.testing.assert_array_equal(by_x, 2 * lb.matmul(x, w))
    _, by_alpha = jax.jvp(lambda a: product(x, a), (w.fields["alpha"],), (other.fields["alpha"],))
    exact, bound = exact_and_bound(product_term(m, w.type, "f32"), {**stored(other), "x": np.asarray(x)})
    assert_within(by_alpha, exact, bound)
    with ops.differentiable("jvp"):
        (_, within), got = (
            jax.jvp(lambda x: lb.matmul(x, w), (x,), (2 * x,)),
            jax.grad(lambda x: lb.matmul(x, w).sum())(x),
        )
    np.testing.assert_array_equal(within, by_x)
    np.testing.assert_allclose(got, jax.grad(lambda x: lb.matmul(x, w).sum())(x), rtol=1e-5)


# ---------------------------------------------------------------- transformations


@pytest.mark.parametrize("fmt", [lb.bcq(3, 16), lb.uniform(4, 16)], ids=str)
def test_a_batch_of_symbolic_size(fmt):
    w = quant(fmt, 40, 3)
    shape = jax.export.symbolic_shape("b, 2, 40")
    exported = jax.export.export(jax.jit(lambda x: lb.matmul(x, w)))(jax.ShapeDtypeStruct(shape, jnp.float32))
    term = lb.plan((1, 40), w.type).term
    for b in (1, 5):
        x = activation(b, 2, 40)
        y = np.asarray(exported.call(x))
        for row, got in zip(x.reshape(-1, 1, 40), y.reshape(-1, 1, 3), strict=True):
            assert_within(got, *exact_and_bound(term, {**stored(w), "x": row}, ("m", "n")))


def test_vmap_over_stacked_weights_and_its_gradient():
    ws = [quant(lb.bcq(2, 16, offset=True), 40, 5, seed=s) for s in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *ws)
    x = activation(3, 2, 40)
    got = jax.jit(jax.vmap(lb.matmul))(jnp.asarray(x), stacked)

    def loss(alpha: jax.Array) -> jax.Array:
        return jax.vmap(lb.matmul)(jnp.asarray(x), QuantArray({**stacked.fields, "alpha": alpha}, stacked.type)).sum()

    slope = jax.grad(loss)(stacked.fields["alpha"])
    term = lb.plan((2, 40), ws[0].type).term
    leaf, dy = params(product_term(2, ws[0].type, "f32"))["alpha"], param("dy", "f32", None, m=2, n=5)
    down = choose(transpose(product_term(2, ws[0].type, "f32"), leaf, dy), MACHINES["cpu"])
    for i, w in enumerate(ws):
        env = {**stored(w), "x": x[i], "dy": np.ones((2, 5), np.float32)}
        for value, form, dims in ((got, term, ("m", "n")), (slope, down, tuple(leaf.dims))):
            exact, bound = exact_and_bound(form, env, dims)
            assert_within(value[i], exact, rounded(exact, bound, "f32"))


def test_a_second_call_does_not_trace_again(monkeypatch):
    traces = []
    fmt = lb.bcq(2, 8)
    monkeypatch.setattr("lowbit.by_term.emit", lambda *args: traces.append(1) or emit(*args))
    a, b = (quant(fmt, 24, 7, seed=s) for s in (0, 1))
    x = jnp.asarray(activation(2, 24))
    first = lb.matmul(x, a)
    assert len(traces) == 1
    assert not np.array_equal(lb.matmul(x, b), first)
    assert np.array_equal(lb.matmul(x.reshape(1, 2, 24), a)[0], first) and len(traces) == 1


# ---------------------------------------------------------------- errors

W = quant(lb.bcq(2, 16), 40, 3)


@pytest.mark.parametrize("shape", [(2, 41), (40, 2), (3,), (0, 39)])
def test_wrong_k(shape):
    message = f"x has shape {shape}, but w is f32[k=40 n=3] as bcq(bits=2, group=16): x's last dim must be k = 40"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lb.matmul(jnp.ones(shape), W)


def test_scalar_x():
    with pytest.raises(ValueError, match=r"^x has shape \(\), but w is "):
        lb.matmul(jnp.float32(1), W)


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64"])
def test_x_not_floating(dtype):
    message = f"x is {dtype}[2, 40]; matmul takes floating activations: cast it"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        lb.matmul(jnp.ones((2, 40), dtype), W)


# ---------------------------------------------------------------- take

TABLES = [lb.bcq(3, 16, offset=True), pytest.param(lb.uniform(4, 33, scale_dtype="float16"), marks=pytest.mark.slow)]


@pytest.mark.parametrize("fmt", TABLES, ids=str)
def test_take_is_rows_of_the_dense_table(fmt):
    w = quant(fmt, 40, 300, dims=("n", "k"))
    ids = np.array([[0, 299, 7], [-1, 7, -300]], np.int32)
    got = take(w, jnp.asarray(ids))
    exact, bound = exact_and_bound(w.type.decode, stored(w), ("n", "k"))
    assert got.shape == (2, 3, 40) and got.dtype == np.float32
    assert_within(got, exact[ids], rounded(exact, bound, "f32")[ids])
    assert np.array_equal(jax.jit(take)(w, jnp.asarray(ids)), got)
    assert np.array_equal(take(w, 7), got[0, 2])


@lb.register_format("rows_in_pairs")
def rows_in_pairs(n, k):
    return Merge(param("w", "f32", a=n // 2, r=2, k=k), ("a", "r"), "n")


@lb.register_format("rows_swapped")
def rows_swapped(n, k):
    w = param("w", "f32", n=n, k=k)
    return Concat((slice_(w, "n", n // 2, n), slice_(w, "n", 0, n // 2)), "n")


@lb.register_format("rows_weighted")
def rows_weighted(n, k):
    return param("w", "f32", n=n, k=k) * const(np.arange(n), "f32", "n")


@pytest.mark.parametrize("fmt", [rows_in_pairs(), rows_swapped(), rows_weighted()], ids=str)
def test_take_where_a_row_is_more_than_its_own_codes(fmt):
    w = quant(fmt, 4, 8, dims=("n", "k"))
    for ids in ([7, 6, 5, 4, 3, 2, 1, 0], [5]):
        assert np.array_equal(take(w, jnp.asarray(ids)), lb.dequantize(w)[np.asarray(ids)])


@pytest.mark.parametrize("ids", [[300], [-301], [2**31 - 1], [-(2**31)]])
def test_take_out_of_range_is_nan(ids):
    w = quant(lb.bcq(2, 16), 40, 300, dims=("n", "k"))
    got = take(w, jnp.asarray([*ids, 5], jnp.int32))
    assert np.isnan(got[0]).all() and np.isfinite(got[1]).all()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "uint32"])
def test_take_by_narrow_or_unsigned_ids(dtype):
    """A table longer than the id type counts: neither the comparison nor the wrap may overflow."""
    w = quant(lb.bcq(2, 16), 40, 300, dims=("n", "k"))
    ids = [0, 100, 127]
    assert np.array_equal(take(w, jnp.asarray(ids, dtype)), take(w, jnp.asarray(ids, jnp.int32)))


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_take_nothing(shape):
    w = quant(lb.bcq(2, 16), 40, 300, dims=("n", "k"), dtype=jnp.bfloat16)
    got = take(w, jnp.zeros(shape, jnp.int32))
    assert got.shape == (*shape, 40) and got.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_take_by_what_is_no_integer(dtype):
    with pytest.raises(TypeError, match=rf"^ids are {dtype}\[2\]; rows are taken by integer ids$"):
        take(W, jnp.ones(2, dtype))


@pytest.mark.parametrize("fmt", TABLES, ids=str)
def test_gradient_of_take(fmt):
    """Each scale collects the cotangents of the rows that were taken, repeated ids twice; other rows get zero."""
    w = quant(fmt, 40, 30, dims=("n", "k"))
    ids, dy = np.array([3, 7, 3, -1]), activation(4, 40)
    name = "scale" if fmt.name == "uniform" else "alpha"

    def loss(scale: jax.Array) -> jax.Array:
        return (take(QuantArray({**w.fields, name: scale}, w.type), jnp.asarray(ids)) * dy).sum()

    got = np.asarray(jax.grad(loss)(w.fields[name])).astype(np.float64)
    spread = np.zeros((30, 40), np.float32)
    np.add.at(spread, ids, dy)  # the two of row 3 meet here in float32: one of the roundings below
    leaf = w.type.fields[name]
    down = transpose(w.type.decode, leaf, param("dy", "f32", None, n=30, k=40))
    exact, _ = exact_and_bound(down, {**stored(w), "dy": spread}, tuple(leaf.dims))
    # Per weight |d w / d scale| is 1 for a plane and |code - zero| else; a group's are summed in float32, then rounded
    # to the scale's type, in which the rows meet.
    slope = np.abs(dense(w).T) / np.repeat(np.abs(stored(w)[name]), fmt["group"], 1)[:, :40] if name == "scale" else 1.0
    size = np.pad(np.abs(spread) * slope, ((0, 0), (0, -40 % fmt["group"]))).reshape(30, -1, fmt["group"]).sum(-1)
    bound = size * ((1 + gamma(2 * fmt["group"] + 3, "f32")) * (1 + gamma(3, leaf.dtype)) - 1) + 3 * tiny(leaf.dtype)
    assert_within(got, exact, np.broadcast_to(bound, got.shape), name)
    untouched = [i for i in range(30) if i not in (3, 7, 29)]
    assert not np.any(np.take(got, untouched, list(leaf.dims).index("n")))
