"""Products in 8-bit integers: values and their bound, gradients, layers, files."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx

import lowbit as lb
from lowbit.array import QuantArray, laid_out
from lowbit.ir import evaluate, param
from lowbit.ir.expr import Call
from lowbit.passes.in_int8 import COLUMNS
from lowbit.passes.int8_rows import CODES, SCALE
from lowbit.passes.lower_xla import emit
from lowbit.passes.pointwise import UnsuitableError
from lowbit.quant_type import QuantType, type_from_json, type_to_json
from lowbit.testing import random_array
from lowbit.testing.checks import check_product, random_rows
from lowbit.testing.tolerance import assert_within, gamma, unit

N, K, GROUP = 13, 70, 32
NUMERICS = tuple(COLUMNS)


def array(fmt: lb.Format, numerics: Any = "int8x2", dtype: Any = "f32") -> QuantArray:
    return random_array(QuantType((("k", K), ("n", N)), dtype, fmt, numerics=numerics))


def largest(w: QuantArray) -> np.ndarray:
    """[k, n]: the largest magnitude that is looked up where a weight is; zero where nothing is rounded."""
    if w.type.format.name == "bcq":
        tops = np.abs(np.asarray(w.fields["alpha"], np.float64)).sum(0)  # all planes of one sign
        return np.repeat(tops, GROUP, 1)[:, :K].T
    if w.type.format.name == "any_precision":
        tables = np.asarray(w.fields[f"table{w.type.format['width'] or 3}"], np.float64)
        return np.broadcast_to(np.abs(tables).max(1), (K, N))
    return np.zeros((K, N))


def exact_and_bound(x: np.ndarray, w: QuantArray, numerics: Any) -> tuple[np.ndarray, np.ndarray]:
    """The product of floats, and how far that of integers may be from it: half a step of x, and of each table; and what
    sums in float32, of a term for each group and column that has four factors, add."""
    x = x.astype(np.float64)
    dense = np.asarray(lb.dequantize(QuantArray(w.fields, replace(w.type, dtype="f32"))), np.float64)
    step = np.abs(x).max(1, keepdims=True) / 63.5
    off_x, off_w = step / 2 * 256.0 ** (1 - COLUMNS[numerics]), largest(w) / 63.5 / 2
    off = off_x * np.abs(dense).sum(0) + np.abs(x) @ off_w + off_x * off_w.sum(0)
    terms, size = 2 * -(-K // GROUP), np.abs(dense) + off_w
    if w.type.format.name == "uniform":  # whose zero points are multiplied apart
        zeros = np.asarray(w.fields["scale"], np.float64) * np.asarray(w.fields["zero"], np.float64)
        size = size + 2 * np.repeat(zeros, GROUP, 1)[:, :K].T
    arithmetic = gamma(terms + 8, "f32") * ((np.abs(x) + step) @ size)
    return x @ dense, off + arithmetic


FORMATS = (
    lb.bcq(3, group=GROUP),
    lb.bcq(1, group=GROUP),
    lb.uniform(4, group=GROUP),
    lb.any_precision(2, 3),
    lb.any_precision(2, 3, width=2, table_dtype="float32"),
)


@pytest.mark.parametrize(
    ("fmt", "numerics"),
    [
        # of every format one is quick, of both numerics some
        pytest.param(fmt, numerics, marks=() if i % 2 == j else pytest.mark.slow, id=f"{fmt}-{numerics}")
        for (i, fmt), (j, numerics) in product(enumerate(FORMATS), enumerate(NUMERICS))
    ],
)
def test_products_are_within_their_bound(fmt: lb.Format, numerics: Any) -> None:
    x = random_rows(5, K)
    x[1, ::8] *= 100  # outliers
    x[2] = 0
    w = array(fmt, numerics)
    exact, bound = exact_and_bound(x, w, numerics)
    y = np.asarray(lb.matmul(x, w))
    assert_within(y, exact, bound, str(w.type))
    assert not y[2].any()
    halves = x.astype(jnp.bfloat16)
    exact, bound = exact_and_bound(halves, w, numerics)
    y = lb.matmul(jnp.asarray(halves), w)
    assert_within(y, exact, bound + unit("bf16") * (np.abs(exact) + bound), "bfloat16")


@pytest.mark.parametrize(
    "fmt",
    [
        pytest.param(lb.bcq(3, group=12), marks=pytest.mark.slow),
        pytest.param(lb.bcq(2, offset=True), marks=pytest.mark.slow),
        lb.uniform(4, group=GROUP),
    ],
    ids=str,
)
def test_every_form_is_the_oracles_product(fmt: lb.Format) -> None:
    w, x = array(fmt), random_rows(3, K)
    for name in lb.plan(x.shape, w.type).names:
        check_product(x, w, name)


def test_xla_rounds_rows_to_the_integers_of_the_oracle() -> None:
    x = random_rows(6, K) * np.float32(10.0) ** np.arange(-30, 30, 10, dtype=np.float32)[:, None]
    x = np.concatenate([x, np.zeros((4, K), np.float32)])
    x[7, 0], x[8, 1], x[9, 2] = np.inf, np.nan, 3.4e38
    leaf = param("x", "f32", m=10, k=K)
    for name in (*CODES.values(), SCALE):
        e = Call(name, (leaf,))
        got = jax.jit(lambda x, e=e: emit(e, {"x": x}))(x)
        np.testing.assert_array_equal(np.asarray(got, np.float64), evaluate(e, {"x": x}))


@pytest.mark.parametrize("entries", [[127, -3, 1], [-127, 127, 64], [126, 3, 1], [64, 1, 0]])
@pytest.mark.parametrize("power", [-40, 0, 7])
def test_whole_numbers_up_to_127_times_a_power_of_two_are_exact(entries: list[int], power: int) -> None:
    x = np.array([entries], np.float32) * np.float32(2.0) ** power
    codes, scale = (evaluate(Call(name, (param("x", "f32", m=1, k=3),)), {"x": x}) for name in (CODES[1], SCALE))
    np.testing.assert_array_equal(codes * scale, x)


def test_rows_with_inf_or_nan_become_nan_and_others_do_not() -> None:
    x = random_rows(4, K)
    x[1, 3], x[2, 5] = np.inf, np.nan
    w = array(lb.bcq(3, group=GROUP))
    y = np.asarray(lb.matmul(x, w))
    assert np.isnan(y[1:3]).all() and np.isfinite(y[[0, 3]]).all()
    alpha = w.fields["alpha"].at[0, 4, 1].set(jnp.nan)
    y = np.asarray(lb.matmul(x[:1], QuantArray({**w.fields, "alpha": alpha}, w.type)))
    assert np.isnan(y[:, 4]).all() and np.isfinite(np.delete(y, 4, 1)).all()


def test_no_rows_vectors_and_stacks() -> None:
    w, x = array(FORMATS[0]), random_rows(2, K)
    assert lb.matmul(x[:0], w).shape == (0, N)
    y = np.asarray(lb.matmul(x, w))
    np.testing.assert_array_equal(np.asarray(lb.matmul(x[None], w))[0], y)
    stack = jax.tree.map(lambda *a: jnp.stack(a), w, w)
    np.testing.assert_allclose(lb.matmul(np.stack([x, x]), stack)[1], y, rtol=1e-5)


def test_numerics_of_a_product_alone() -> None:
    x, w = random_rows(2, K), array(FORMATS[0], "float")
    for numerics in NUMERICS:
        of_type = QuantArray(w.fields, replace(w.type, numerics=numerics))
        np.testing.assert_array_equal(lb.matmul(x, w, numerics=numerics), lb.matmul(x, of_type))
        np.testing.assert_array_equal(lb.matmul(x, of_type, numerics="float"), lb.matmul(x, w))
    nested = array(lb.any_precision(2, 3), "float")
    got = lb.matmul(x, nested, width=jnp.int32(2), numerics="int8")
    at_two = QuantArray(nested.fields, replace(nested.type.at(2), numerics="int8"))
    np.testing.assert_array_equal(got, lb.matmul(x, at_two))


@pytest.mark.parametrize("layout", [lambda w: w, laid_out], ids=["own", "kernels"])
def test_gradients_are_those_of_the_product_in_floats(layout: Any) -> None:
    x, w = random_rows(2, K), layout(array(FORMATS[0], "float"))
    dy = random_rows(2, N, seed=1)
    want, got = (
        jax.vjp(lambda x, w, n=numerics: lb.matmul(x, w, numerics=n), jnp.asarray(x), w)[1](jnp.asarray(dy))
        for numerics in ("float", "int8x2")
    )
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1].fields["alpha"], want[1].fields["alpha"])
    assert got[1].type.numerics == "float"


def test_the_kits_gradients() -> None:
    lb.testing.check_gradients(random_rows(2, K), array(lb.any_precision(2, 2)))


def test_forward_mode() -> None:
    x, w = random_rows(2, K), array(FORMATS[0])

    def f(x: jax.Array) -> jax.Array:
        return lb.matmul(x, w, differentiable="jvp")

    y, dy = jax.jvp(f, (jnp.asarray(x),), (jnp.asarray(x),))
    np.testing.assert_array_equal(y, lb.matmul(x, w))
    np.testing.assert_allclose(dy, lb.matmul(x, w, numerics="float"), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- refusals


def test_refusals() -> None:
    x, w = random_rows(2, K), array(lb.nested_fp(8), "float", "f16")
    with pytest.raises(UnsuitableError, match=r"^nested_fp\(width=8\) has no products in int8: it encodes activations"):
        lb.matmul(x, w, numerics="int8")
    with pytest.raises(ValueError, match=r"^nested_fp\(\) has no products in int8x2: its weights are no integers"):
        lb.matmul(x, QuantArray(w.fields, w.type.at(16)), numerics="int8x2")
    with pytest.raises(ValueError, match=r"^numerics must be one of 'float', 'int8', 'int8x2', not 'int4'"):
        lb.matmul(x, array(FORMATS[0]), numerics="int4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^matmul takes a QuantArray"):
        lb.matmul(x, x, numerics="int8")  # type: ignore[arg-type]


# ---------------------------------------------------------------- layers, files, plans


def model() -> nnx.Sequential:
    return nnx.Sequential(nnx.Linear(K, N, rngs=nnx.Rngs(0)), nnx.Linear(N, 4, rngs=nnx.Rngs(1)))


RULES = [lb.Rule("layers/0", lb.uniform(3), numerics="int8x2"), lb.Rule("layers/1", lb.uniform(4))]


def test_a_rule_gives_its_layers_numerics_that_stay(tmp_path: Path) -> None:
    small = lb.quantize(model(), RULES)
    first, second = (small.layers[i].kernel for i in range(2))
    assert (first.type.numerics, second.type.numerics) == ("int8x2", "float")
    x = jnp.asarray(random_rows(3, K))
    np.testing.assert_array_equal(small.layers[0](x), lb.matmul(x, first.array, numerics="int8x2"))
    assert "uniform(bits=3) in int8x2" in str(lb.report(small))
    there = lb.prepare(small, "hopper")
    assert there.layers[0].kernel.type == replace(first.type, layout="mma")
    np.testing.assert_array_equal(there.layers[0](x), small.layers[0](x))
    lb.save(there, path := tmp_path / "small.safetensors")
    again = lb.load(path, into=nnx.eval_shape(lambda: small))
    assert again.layers[0].kernel.type == first.type
    np.testing.assert_array_equal(again(x), small(x))
    other = nnx.eval_shape(lambda: lb.quantize(model(), [replace(RULES[0], numerics="float"), RULES[1]]))
    with pytest.raises(lb.CheckpointError, match=r"in int8x2, but the model has .* as uniform\(bits=3\)$"):
        lb.load(path, into=other)


def test_a_run_that_goes_on_takes_layers_of_other_numerics(tmp_path: Path) -> None:
    first = lb.quantize(model(), RULES, resume=tmp_path)
    rules = [replace(RULES[0], numerics="int8"), RULES[1]]
    kept = len(list(tmp_path.iterdir()))
    again = lb.quantize(model(), rules, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == kept and again.layers[0].kernel.type.numerics == "int8"
    np.testing.assert_array_equal(again.layers[0].kernel.scale[...], first.layers[0].kernel.scale[...])


def test_rules_that_cannot_be() -> None:
    why = r"nested_fp\(width=8\) has no products in int8: it encodes"
    with pytest.raises(ValueError, match=f"^layer 'layers/0' cannot be quantized: {why}"):
        lb.quantize(model(), [lb.Rule("layers/0", lb.nested_fp(), numerics="int8")])
    with pytest.raises(ValueError, match=r"^numerics must be one of .*, not 'int7'"):
        lb.quantize(model(), [lb.Rule("**", lb.uniform(2), numerics="int7")])  # type: ignore[arg-type]


def test_preparing_names_layers_that_no_kernel_multiplies_in_their_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    rules = [replace(RULES[0], format=lb.uniform(3, group=GROUP)), RULES[1]]
    there = lb.prepare(lb.quantize(model(), rules), "hopper")
    assert [there.layers[i].kernel.type.layout for i in range(2)] == ["own", "mma"]
    assert said == ["no kernel decodes layers/0/kernel (in 8 bits a group has 128 inputs at the least)"]


def test_types_in_files() -> None:
    t = array(FORMATS[0]).type
    assert type_from_json(type_to_json(t)) == t
    assert "numerics" not in type_to_json(replace(t, numerics="float"))
    with pytest.raises(ValueError, match=r"^numerics must be one of .*, not 'int3'"):
        type_from_json({**type_to_json(t), "numerics": "int3"})


def test_plans_say_so() -> None:
    t = array(FORMATS[0]).type
    said = str(lb.plan((3, K), t, "gpu", "bfloat16"))
    assert said.startswith(f"x[3, k] @ f32[k={K} n={N}] as bcq(bits=3, group=32) in int8x2 on gpu\n")
    assert "dense    refused: it multiplies x as it is, and this product is in int8x2" in said
    assert "int8x2_codes" in str(lb.plan((3, K), t).term)


@pytest.mark.slow
def test_adapters_multiply_x_as_it_is() -> None:
    small = lb.nn.lora(lb.quantize(model(), RULES), 2, rngs=nnx.Rngs(0))
    x = jnp.asarray(random_rows(3, K))
    assert small.layers[0].kernel.type.encoding.endswith("in int8x2")
    base = lb.quantize(model(), RULES)
    np.testing.assert_allclose(small.layers[0](x), base.layers[0](x), rtol=1e-5, atol=1e-5)  # B begins with zeros


@pytest.mark.slow
def test_what_it_costs_in_quality() -> None:
    """Of weights that were quantized to 3 bits, rounding tables and activations adds little to the error."""
    dense = random_rows(K, 64, seed=3)
    w = lb.quantize_array(dense, lb.any_precision(3, 3))
    x = random_rows(16, K, seed=2)
    exact = x @ np.asarray(dense)
    errors = {n: float(np.mean((np.asarray(lb.matmul(x, w, numerics=n)) - exact) ** 2)) for n in ("float", *NUMERICS)}
    assert errors["int8x2"] < 1.02 * errors["float"] and errors["int8"] < 1.1 * errors["float"]
