"""What programs do with the kernels' products on a GPU: gradients, vmap, scan, export, whole models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lowbit as lb
from lowbit.array import QuantArray, laid_out, own
from lowbit.backward import planned_db, planned_dw, planned_dx
from lowbit.ir.dtypes import short
from lowbit.testing.checks import (
    assert_dx,
    assert_product,
    check_export,
    random_array,
    random_rows,
)
from lowbit.testing.terms import kernel_term
from tests.hopper import needed
from tests.parameter_gradients import check_parameter_gradients, check_table_gradients

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
    """Of x, and of every float field in the kernels' layout, against the oracle."""
    w, x = array(name), random_rows(M, K, dtype=HALF)
    dy, there = (random_rows(M, N, dtype=HALF, seed=3) / 64).astype(x.dtype), arranged(w)
    floats = {field: a for field, a in there.fields.items() if jnp.issubdtype(a.dtype, jnp.floating)}

    @jax.jit
    def pull(x: jax.Array, floats: dict[str, jax.Array], dy: jax.Array) -> Any:
        def product(x: jax.Array, floats: dict[str, jax.Array]) -> jax.Array:
            return lb.matmul(x, QuantArray({**there.fields, **floats}, there.type))

        return jax.vjp(product, x, floats)[1](dy)

    dx, dfloats = pull(jnp.asarray(x), floats, jnp.asarray(dy))
    for planned, kernel in ((planned_dx, "mma_dx"), (planned_dw, "mma_dw")):
        assert planned(M, there.type, "bf16", "gpu").choice().name == kernel
    assert_dx(dx, dy, w)
    check_parameter_gradients(dfloats, x, dy, there)


def test_gradients_of_codebooks() -> None:
    t = lb.QuantType((("k", K), ("n", N)), "f32", lb.codebook(1, 8, vec=4, group=128))
    w, x, dy = arranged(random_array(t)), random_rows(M, K, dtype=HALF), random_rows(M, N, dtype=HALF, seed=3)

    @jax.jit
    def pull(x: jax.Array, floats: dict[str, jax.Array], dy: jax.Array) -> Any:
        return jax.vjp(lambda floats: lb.matmul(x, QuantArray({**w.fields, **floats}, w.type)), floats)[1](dy)[0]

    made = pull(jnp.asarray(x), {name: w.fields[name] for name in ("codebooks", "scale")}, jnp.asarray(dy))
    assert planned_db(M, w.type, "bf16", "gpu").choice().name == "mma_db"
    check_table_gradients({"codebooks": made["codebooks"]}, x, dy, w)
    check_parameter_gradients({"scale": made["scale"]}, x, dy, w)


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
