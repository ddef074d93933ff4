"""What programs do with the kernels' products on a GPU: gradients, vmap, scan, export, whole models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.array import QuantArray, laid_out, own
from lowbit.backward import planned_dx
from lowbit.ir.build import param
from lowbit.ir.dtypes import short
from lowbit.ir.oracle import evaluate
from lowbit.ir.transpose import transpose
from lowbit.ir.walk import params
from lowbit.passes.choose import choose
from lowbit.planning import machine_of
from lowbit.testing.checks import (
    assert_dx,
    assert_product,
    check_export,
    random_array,
    random_rows,
    stored,
)
from lowbit.testing.terms import kernel_term, product_term
from lowbit.testing.tolerance import assert_within, exact_and_bound, rounded
from tests.hopper import needed

needed()

N, K, M = 192, 512, 5
arranged = jax.jit(laid_out)
FORMATS = {
    "uniform4": lb.uniform(4, group=128, scale_dtype="float16"),
    "bcq3": lb.bcq(3, group=128, scale_dtype="float16"),
}
HALF = "bfloat16"


def array(name: str, seed: int = 0) -> QuantArray:
    return random_array(lb.QuantType((("k", K), ("n", N)), "f32", FORMATS[name]), seed)


def check_by_kernel(y: Any, x: Any, w: QuantArray) -> None:
    """y [m, n] is what the kernel computes of x and an array in its format's own layout."""
    assert_product(y, np.asarray(x), w, kernel_term(len(x), w.type, short(x.dtype)))


@pytest.mark.parametrize("name", FORMATS)
def test_gradients(name: str) -> None:
    """Of x, and of every float field through the layout, against the oracle."""
    w, x = array(name), random_rows(M, K, dtype=HALF)
    dy = (random_rows(M, N, dtype=HALF, seed=3) / 64).astype(x.dtype)
    floats = {field: a for field, a in w.fields.items() if jnp.issubdtype(a.dtype, jnp.floating)}

    @jax.jit
    def pull(x: jax.Array, floats: dict[str, jax.Array], dy: jax.Array) -> Any:
        def product(x: jax.Array, floats: dict[str, jax.Array]) -> jax.Array:
            return lb.matmul(x, laid_out(QuantArray({**w.fields, **floats}, w.type)))

        return jax.vjp(product, x, floats)[1](dy)

    dx, dfloats = pull(jnp.asarray(x), floats, jnp.asarray(dy))
    assert planned_dx(M, replace(w.type, layout="mma"), "bf16", "gpu").choice().name == "mma_dx"
    assert_dx(dx, dy, w)
    term, leaf_dy = product_term(M, w.type, short(x.dtype)), param("dy", short(dy.dtype), None, m=M, n=N)
    env = {**stored(w), "x": x, "dy": dy}
    for field, got in dfloats.items():
        leaf = params(term)[field]
        pulled = transpose(term, leaf, leaf_dy)
        order = [list(pulled.dims).index(d) for d in leaf.dims]
        exact = evaluate(pulled, env).transpose(order)
        _, bound = exact_and_bound(choose(pulled, machine_of("gpu")), env, list(leaf.dims))
        assert_within(got, exact, rounded(exact, bound, leaf.dtype), f"the cotangent of {field!r}")


@pytest.mark.parametrize("name", FORMATS)
def test_vmap_over_x_and_over_a_stack(name: str) -> None:
    ws = [array(name, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *map(arranged, ws))
    x = random_rows(3, M, K, dtype=HALF)
    shared = jax.jit(jax.vmap(lb.matmul, in_axes=(0, None)))(jnp.asarray(x), arranged(ws[0]))
    each = jax.jit(jax.vmap(lb.matmul))(jnp.asarray(x), stack)
    for i, w in enumerate(ws):
        check_by_kernel(shared[i], x[i], ws[0])
        check_by_kernel(each[i], x[i], w)


def test_scan_over_a_stack() -> None:
    ws = [array("bcq3", seed) for seed in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *map(arranged, ws))
    x = random_rows(M, K, dtype=HALF)
    _, ys = jax.jit(lambda x, ws: jax.lax.scan(lambda x, w: (x, lb.matmul(x, w)), x, ws))(jnp.asarray(x), stack)
    for y, w in zip(ys, ws, strict=True):
        check_by_kernel(y, x, w)


@pytest.mark.parametrize("name", FORMATS)
def test_export(name: str) -> None:
    w, x = arranged(array(name)), random_rows(M, K, dtype=HALF)
    check_export(x, w)
    program = jax.jit(lb.matmul)
    both = jax.export.export(program, platforms=("cuda", "cpu"))(jnp.asarray(x), w)
    y = jax.export.deserialize(both.serialize()).call(jnp.asarray(x), w)
    assert np.asarray(y).tobytes() == np.asarray(program(jnp.asarray(x), w)).tobytes()


def test_a_prepared_model() -> None:
    rngs = nnx.Rngs(0)
    dense = nnx.Sequential(
        nnx.Linear(K, N, dtype=jnp.bfloat16, rngs=rngs), nnx.relu, nnx.Linear(N, 64, dtype=jnp.bfloat16, rngs=rngs)
    )
    small = lb.prepare(lb.quantize(dense, lb.uniform(4, group=64)))
    kernel = small.layers[0].kernel
    assert kernel.type.layout == "mma"
    assert lb.plan((M, K), kernel.type, dtype=HALF).choice().name == "mma"
    x = random_rows(M, K, dtype=HALF)
    y = nnx.jit(lambda layer, x: layer(x))(small.layers[0], jnp.asarray(x))
    check_by_kernel(y, x, own(kernel.array))
    assert np.isfinite(np.asarray(nnx.jit(lambda m, x: m(x))(small, jnp.asarray(x)), np.float32)).all()
