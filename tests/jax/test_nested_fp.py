"""Nested floats: every pattern of 16 bits, both readings, what cannot be stored, and products in 8 bits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

import lowbit as lb
from lowbit.formats.nested_fp import REBUILD, split_bytes
from lowbit.formats.row_codes import CODES, LARGEST, SCALE, e4m3_rows
from lowbit.ir import Bitcast, Call, DimError, cost, evaluate, param
from lowbit.ir.dtypes import short
from lowbit.ir.expr import Expr
from lowbit.ir.order import contraction_order
from lowbit.passes.lower_xla import emit
from lowbit.passes.tile import tile
from lowbit.testing.tolerance import assert_within, gamma, unit

FORMAT = lb.nested_fp()
TYPE = lb.QuantType((("k", 45), ("n", 7)), "f32", FORMAT)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 45)), jnp.float32)
PATTERNS = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture(scope="module")
def w() -> lb.QuantArray:
    return lb.testing.random_array(TYPE)


def both(e: Expr, env: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A term by the oracle and by XLA."""
    return evaluate(e, env), np.asarray(jax.jit(lambda env: emit(e, env))(env)).astype(np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", [FORMAT, lb.nested_fp(8)])
def test_the_kit(fmt: lb.Format) -> None:
    assert "quantizer" in lb.testing.check_format(fmt).passed["n=2 k=141"]


# ---------------------------------------------------------------- bit by bit


@pytest.mark.parametrize(
    ("value", "bits", "upper", "lower", "in_8_bits"),
    [
        (0.1, 0x2E66, 0x5D, 0x66, 0.1015625),
        (-0.0123, 0xA24C, 0xC5, 0x4C, -0.0126953125),
        (1.75, 0x3F00, 0x7E, 0x00, 1.75),
        (1.0, 0x3C00, 0x78, 0x00, 1.0),
        (0.546875, 0x3860, 0x71, 0x60, 0.5625),
        (2.0**-14, 0x0400, 0x08, 0x00, 2.0**-14),
        (-0.33325, 0xB555, 0xEB, 0x55, -0.34375),
        (1.8, 0x3F33, 0x7E, 0x33, 1.75),
    ],
)
def test_vectors_of_the_paper(value: float, bits: int, upper: int, lower: int, in_8_bits: float) -> None:
    half = np.float16(value)
    assert half.view(np.uint16) == bits
    assert [int(byte) for byte in split_bytes(jnp.asarray(half))] == [upper, lower]
    env = {"upper": np.array([[upper]], np.uint8), "lower": np.array([[lower]], np.uint8)}
    assert evaluate(FORMAT.decode(1, 1), env)[0, 0] == half
    assert evaluate(FORMAT.at(8).decode(1, 1), env)[0, 0] == in_8_bits


def test_every_pattern_of_16_bits() -> None:
    upper, lower = (np.asarray(a).reshape(256, 256) for a in split_bytes(jnp.asarray(PATTERNS)))
    env, halves = {"upper": upper, "lower": lower}, PATTERNS.reshape(256, 256)
    held = np.abs(halves) < 1.9375
    for decoded in both(FORMAT.decode(256, 256), env):
        assert np.array_equal(decoded.astype(np.float16).view(np.uint16)[held], halves.view(np.uint16)[held])
        assert np.isfinite(decoded).all()  # whatever the bytes are
    for decoded in both(FORMAT.at(8).decode(256, 256), env):
        eligible = np.abs(halves) <= 1.75
        with np.errstate(invalid="ignore"):
            nearest = (halves.astype(np.float32) * 256).astype(E4M3).astype(np.float64) / 256
        assert np.array_equal(decoded[eligible], nearest[eligible])
        assert np.array_equal(np.signbit(decoded[eligible]), np.signbit(halves[eligible]))
        assert (np.abs(decoded[(np.abs(halves) > 1.75) & (np.abs(halves) < 1.875)]) == 1.75).all()
        assert np.isnan(decoded[(np.abs(halves) >= 1.875) & held]).all()  # what must not be stored
    assert held.sum() == 2 * 0x3FC0 and eligible.sum() == 2 * 0x3F01


def test_every_pair_of_bytes_is_rebuilt_as_by_the_check_bit() -> None:
    """The bit that both bytes have tells whether the upper one was rounded up: sub = (a & 1) xor (b >> 7)."""
    a, b = np.indices((256, 256))
    sub = (a & 1) ^ (b >> 7)
    bits = (a & 0x80 | ((a - sub) >> 1) & 0x3F) << 8 | b
    for decoded in both(FORMAT.decode(256, 256), {"upper": a.astype(np.uint8), "lower": b.astype(np.uint8)}):
        assert np.array_equal(decoded.astype(np.float16).view(np.uint16), bits)


def test_the_rebuild_is_counted_and_made_in_parts() -> None:
    term = FORMAT.decode(64, 32)
    assert cost(term).fma == 7 * 64 * 32 and cost(term).read == {"u8": 2 * 64 * 32}
    assert cost(FORMAT.at(8).decode(64, 32)).read == {"u8": 64 * 32}
    product = TYPE.resized(n=4096, k=512).product(param("x", "f32", m=4, k=512))
    parts = tile(product, 1 << 20)
    assert parts is not None and parts.dim == "n" and parts.size == 512


def test_rows_are_decoded_alone(w: lb.QuantArray) -> None:
    table = lb.QuantArray(w.fields, replace(TYPE, dims=(("n", 7), ("k", 45))))
    for width in (8, 16):
        read = lb.QuantArray(table.fields, table.type.at(width))
        assert np.array_equal(lb.ops.take(read, jnp.array([6, 0])), lb.dequantize(read)[jnp.array([6, 0])])


def test_bytes_that_are_no_bytes() -> None:
    upper = param("upper", "u8", n=2, k=3)
    for other in (param("lower", "i8", n=2, k=3), param("lower", "u8", k=3, n=2), param("lower", "u8", n=2)):
        with pytest.raises(DimError, match=f"^{REBUILD} of u8.* give two arrays of bytes of the same dims"):
            Call(REBUILD, (upper, other))
    for width in (4, 12, 8.0, True):
        with pytest.raises(ValueError, match=f"^width must be 8 or 16, not {width}"):
            lb.nested_fp(width)  # type: ignore[arg-type]


# ---------------------------------------------------------------- activations in 8 bits


def encoded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes and scales of rows as XLA makes them, which are the oracle's, and what they stand for."""
    leaf = param("x", short(x.dtype), m=x.shape[0], k=x.shape[1])
    made = [both(Call(name, (leaf,)), {"x": x}) for name in (CODES, SCALE)]
    for oracle, xla in made:
        assert np.array_equal(oracle, xla, equal_nan=True)
    (_, codes), (_, scale) = made
    with np.errstate(invalid="ignore"):
        return codes, scale, codes * scale[:, None]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rows_use_all_of_e4m3(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((6, 300)) * 10.0 ** np.arange(-30, 30, 10)[:, None]).astype(dtype)
    codes, scale, values = encoded(x)
    assert (np.abs(codes).max(1) == LARGEST).all()
    exact = x.astype(np.float64)
    least = scale[:, None] * 2.0**-10  # half of the smallest e4m3, below which the spacing stays the same
    assert_within(values, exact, np.abs(exact) * (unit("e4m3") + gamma(4, "f32")) + least)


def test_rows_at_the_ends_of_the_range() -> None:
    x = np.zeros((5, 4), np.float32)
    x[1, 2], x[2, 0], x[3, 1], x[4, 3] = 3e38, 1e-36, np.inf, np.nan
    codes, scale, values = encoded(x)
    assert not codes[0].any() and scale[0] > 0
    assert np.allclose(values[1], x[1], rtol=gamma(4, "f32")) and np.isfinite(values[:3]).all()
    assert np.isnan(values[3]).any() and np.isnan(values[4]).all()


def test_what_has_no_rows() -> None:
    for leaf in (param("x", "i8", k=3), param("x", "f32")):
        with pytest.raises(DimError, match=r"^rows of .*: give floats with at least one dim"):
            e4m3_rows(leaf)


def test_the_product_in_8_bits_is_one_of_floats_of_8_bits(w: lb.QuantArray) -> None:
    product = jax.jit(lambda x, w: lb.matmul(x, w, width=8))
    exported = jax.export.export(product, platforms=["cuda"])(X, w)
    dots = re.findall(r"stablehlo.dot_general .*", exported.mlir_module())
    assert len(dots) == 1 and dots[0].count("xf8E4M3FN>") == 2 and "precision = [HIGHEST, HIGHEST]" in dots[0]
    assert "-> tensor<3x7xf32>" in dots[0]
    codes, scale, _ = encoded(np.asarray(X))
    dense = np.asarray(lb.dequantize(lb.QuantArray(w.fields, TYPE.at(8)))).astype(np.float64)
    bound = gamma(45 + 4, "f32") * scale[:, None] * (np.abs(codes) @ np.abs(dense))
    assert_within(product(X, w), scale[:, None] * (codes @ dense), bound)


def test_scales_of_rows_wait_for_the_product() -> None:
    """Where it would be less work to scale the activations first, they would no longer be floats of 8 bits."""
    term = TYPE.at(8).resized(n=64, k=8).product(param("x", "f32", m=4, k=8))
    first = contraction_order(term)[0]  # type: ignore[arg-type]
    assert {term.args[slot].dtype for slot in first.slots} == {"e4m3"}


def test_gradients_go_straight_through(w: lb.QuantArray) -> None:
    dense = np.asarray(lb.dequantize(lb.QuantArray(w.fields, TYPE.at(8)))).astype(np.float64)
    dy = np.random.default_rng(2).normal(size=(3, 7)).astype(np.float32)
    dx, dw = jax.vjp(lambda x, w: lb.matmul(x, w, width=8), X, w)[1](jnp.asarray(dy))
    bound = gamma(7 + 2, "f32") * (np.abs(dy) @ np.abs(dense.T))
    assert_within(dx, dy @ dense.T, bound)
    assert all(a.dtype == jax.dtypes.float0 for a in dw.fields.values())


@pytest.mark.slow
def test_forward_mode_goes_straight_through(w: lb.QuantArray) -> None:
    def f(x: jax.Array) -> jax.Array:
        return lb.matmul(x, w, width=8, differentiable="jvp")

    y, dy = jax.jvp(f, (X,), (X,))
    values = encoded(np.asarray(X))[2]
    dense = np.asarray(lb.dequantize(lb.QuantArray(w.fields, TYPE.at(8)))).astype(np.float64)
    assert_within(y, values @ dense, gamma(45 + 4, "f32") * (np.abs(values) @ np.abs(dense)))
    exact = np.asarray(X, np.float64)
    assert_within(dy, exact @ dense, gamma(45 + 4, "f32") * (np.abs(exact) @ np.abs(dense)))


def test_plans_say_what_activations_become() -> None:
    said = lb.explain(lb.testing.random_array(TYPE.at(8)), batch=3, platform="gpu", dtype="bfloat16")
    assert said.startswith("x[3, k] as e4m3 @ f32[k=45 n=7] as nested_fp(width=8) on gpu\n")
    assert "dense    refused: it multiplies x as it is, and nested_fp(width=8) turns it into e4m3" in said
    assert "e4m3_rows" in str(lb.plan((3, 45), TYPE.at(8)).term)
    assert lb.explain(lb.testing.random_array(TYPE), 3).startswith("x[3, k] @ ")


@lb.register_format("fp8_rows_with_scales", activations=e4m3_rows)
def fp8_rows(n: int, k: int) -> Expr:
    return Bitcast(param("code", "u8", n=n, k=k), "e4m3") * param("scale", "f32", n=n)


@pytest.mark.slow
def test_encoded_activations_reach_the_gradients_of_scales() -> None:
    lb.testing.check_format(fp8_rows(), shapes=[(3, 20)])


def test_an_encoding_keeps_the_dims_of_activations() -> None:
    @lb.register_format("loses_rows", activations=lambda x: x.sum("m"))
    def loses_rows(n: int, k: int) -> Any:
        return param("scale", "f32", n=n) * param("codes", "i8", n=n, k=k)

    with pytest.raises(ValueError, match=r"^format loses_rows\(\) makes activations f32\[k=45\] of f32\[m=3 k=45\]"):
        lb.matmul(X, lb.testing.random_array(replace(TYPE, format=loses_rows())))


# ---------------------------------------------------------------- the width


def test_a_width_is_chosen_when_it_runs(w: lb.QuantArray) -> None:
    product = jax.jit(lambda x, w, width: lb.matmul(x, w, width=width))
    for given, width in ((8, 8), (16, 16), (-100, 8), (12, 8), (13, 16), (99, 16)):  # the nearest there is
        assert np.array_equal(product(X, w, jnp.int8(given)), lb.matmul(X, w, width=width))
    assert product._cache_size() == 1
    compiled = product.lower(X, w, jnp.int8(8)).compile().as_text()
    assert compiled.count(" conditional(") == 1


def test_width_8_does_not_read_the_lower_bytes(w: lb.QuantArray) -> None:
    text = jax.jit(lambda x, w, width: lb.matmul(x, w, width=width)).lower(X, w, jnp.int32(8)).as_text()
    case = text[text.index("stablehlo.case") :]
    branches = re.findall(r"func\.call @(\w+)\(([^)]*)\)", case[: case.index("}) :")])
    assert len(branches) == 2 and [args.count("%arg") for _, args in branches] == [2, 3], branches


def test_widths_that_there_are_not(w: lb.QuantArray) -> None:
    with pytest.raises(ValueError, match=r"^nested_fp\(\) is read at widths \(8, 16\), not 12"):
        lb.matmul(X, w, width=12)


# ---------------------------------------------------------------- models


def model(dtype: Any = jnp.float16) -> nnx.Sequential:
    return nnx.Sequential(
        nnx.Linear(16, 8, param_dtype=dtype, rngs=nnx.Rngs(0)), nnx.relu,
        nnx.Linear(8, 4, param_dtype=dtype, rngs=nnx.Rngs(1)),
    )  # fmt: skip


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr("absl.logging.warning", lambda text, *args: found.append(text % args))
    return found


def test_layers_in_both_widths(logged: list[str], tmp_path: Path) -> None:
    dense = model()
    small = lb.quantize(dense, {"layers/0": lb.nested_fp(8), "layers/2": lb.nested_fp()})
    assert not logged
    assert np.array_equal(lb.dequantize(small.layers[2].kernel.array), dense.layers[2].kernel[...])
    rows = lb.report(small).rows
    assert [row.format for row in rows] == ["nested_fp(width=8)", "nested_fp()"]
    assert [row.bits_per_weight for row in rows] == [16, 16]
    assert rows[1].relative_error == 0 and 0 < rows[0].relative_error < unit("e4m3")
    lb.save(small, tmp_path / "small.safetensors")
    again = lb.load(tmp_path / "small.safetensors", into=nnx.eval_shape(lambda: small))
    x = jnp.ones((2, 16), jnp.float16)
    y = nnx.jit(lambda m, x: m(x))(small, x)
    assert y.shape == (2, 4) and np.array_equal(y, nnx.jit(lambda m, x: m(x))(again, x))


def test_an_abstract_model_is_quantized_without_its_weights(logged: list[str]) -> None:
    dense = model(jnp.float32)
    for abstract in (
        nnx.eval_shape(lambda m: lb.quantize(m, lb.nested_fp()), dense),
        nnx.eval_shape(lambda: lb.quantize(dense, lb.nested_fp())),  # whose weights are known, and traced nevertheless
    ):
        assert abstract.layers[0].kernel.upper.shape == (8, 16)
    assert not logged


@pytest.mark.slow
def test_a_stack_is_held_or_not_as_a_whole() -> None:
    stack = jnp.full((3, 4, 2), 0.5).at[1, 2, 0].set(1.8)
    with pytest.raises(lb.quantizers.IneligibleError, match=r"^the weight has \|w\| up to 1.8, and 1.75 is the limit"):
        lb.quantize_array(stack, FORMAT)
    held = lb.quantize_array(stack / 2, lb.nested_fp(8))
    assert held.stack == (3,) and np.array_equal(lb.dequantize(held)[0], stack[0] / 2)


def test_other_formats_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^SplitBytes\(\) makes nested_fp, not bcq\(bits=2\)$"):
        lb.quantize_array(jnp.ones((8, 4)), lb.bcq(2), lb.quantizers.SplitBytes())


@pytest.mark.slow
def test_without_scales_the_biases_train() -> None:
    small = lb.quantize(model(), lb.nested_fp(8))
    gradients = nnx.grad(lambda m, x: (m(x) ** 2).sum())(small, jnp.ones((2, 16), jnp.float16))
    assert sorted(str(path[-1]) for path in nnx.to_flat_state(gradients).paths) == ["bias", "bias"]
    assert not jax.tree.leaves(nnx.state(small, lb.Scale))
    nnx.Optimizer(small, optax.sgd(0.1), wrt=nnx.Param).update(small, gradients)
    with pytest.raises(ValueError, match=r"^Sequential has no layer with a field 'alpha'"):
        lb.tune.alpha_tuning(small)


def test_what_is_too_large_stays_dense_and_is_named(logged: list[str]) -> None:
    dense = model()
    dense.layers[0].kernel[...] = dense.layers[0].kernel[...].at[3, 5].set(-2.5)
    small = lb.quantize(dense, lb.nested_fp())
    assert logged == ["lowbit: layer 'layers/0' has |w| up to 2.5, and 1.75 is the limit: it has to stay dense"]
    assert type(small.layers[0]) is nnx.Linear
    assert [row.format for row in lb.report(small).rows] == ["nested_fp()", "dense float16"]
    small = lb.quantize(dense, lb.nested_fp(), donate=True)
    assert np.isfinite(small.layers[0].kernel[...]).all()  # and is not freed


def test_what_cannot_be_stored() -> None:
    limit = jnp.full((2, 3), -1.7504, jnp.float32)  # 1.75 as float16
    assert lb.dequantize(lb.quantize_array(limit, FORMAT))[0, 0] == -1.75
    assert lb.dequantize(jax.jit(lambda w: lb.quantize_array(w, FORMAT))(limit * 2))[0, 0] == -1.75
    for w, largest in ((limit * 1.01, "1.768"), (limit * 1e30, r"1.75e\+30")):
        with pytest.raises(ValueError, match=rf"^the weight has \|w\| up to {largest}, and 1.75 is the limit: it has"):
            lb.quantize_array(w, FORMAT)
    with pytest.raises(ValueError, match=r"^the weight has 1 NaN or inf among its 6 entries"):
        lb.quantize_array(limit.at[0, 0].set(jnp.nan), FORMAT)


def test_what_the_cast_loses_is_said(logged: list[str]) -> None:
    w = jnp.array([[1.0, 2.0**-17, 2.0**-26], [0.0, 3 * 2.0**-25, -0.5]], jnp.bfloat16)
    lb.quantize_array(w, FORMAT, name="layer 'up'")
    assert logged == [
        "lowbit: the cast from bfloat16 to float16 changes 2 of the 6 weights of layer 'up', by at most 1 of their size"
    ]
    lb.quantize_array(w[:1, :2], FORMAT)
    assert len(logged) == 1


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_nan_are_refused(w: lb.QuantArray, tmp_path: Path, code: int) -> None:
    upper = np.asarray(w.fields["upper"]).copy()
    upper[1, 2] = upper[3, 4] = code
    for width in (8, 16):
        with pytest.raises(ValueError, match=r"^'upper' holds 2 codes among 315 that are NaN or inf, read as e4m3"):
            lb.QuantArray.of({**w.fields, "upper": upper}, TYPE.at(width))
    broken, file = lb.QuantArray({**w.fields, "upper": jnp.asarray(upper)}, TYPE), tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match=r"^'up' is not a valid QuantArray: 'upper' holds 2 codes"):
        lb.io.write(file, {"up": broken})
    with pytest.MonkeyPatch.context() as without:
        without.setattr("lowbit.array._check_finite", lambda *_: None)
        lb.io.write(file, {"up": broken})
    with pytest.raises(lb.CheckpointError, match=r"layer 'up' is not what its type says \('upper' holds 2 codes among"):
        lb.io.read(file)
