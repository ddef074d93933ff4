"""The kernel of products in 8-bit integers: lane programs and twin against the oracle's integers, and the choice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.array import QuantArray, laid_out
from lowbit.autotuning.search import candidates
from lowbit.by_kernel import by_mma
from lowbit.compat import interpret_params, races_found
from lowbit.ir import evaluate, param
from lowbit.kernels import int8, int8_lanes
from lowbit.kernels.alu import NumpyAlu
from lowbit.kernels.choice import int8_choice
from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.int8_lanes import Integers
from lowbit.kernels.mma import Shape, Tuning
from lowbit.kernels.verbs import Twin
from lowbit.passes.in_int8 import product_in_int8
from lowbit.quant_type import QuantType, kernel_layout, readings
from lowbit.testing import random_array
from lowbit.testing.checks import random_rows
from lowbit.testing.tolerance import assert_within, gamma
from tests.fp3 import fp3_rows

FORMATS = (
    lb.bcq(2, group=128),
    lb.bcq(3, group=256, scale_dtype="float16"),
    lb.bcq(3),
    lb.bcq(4, group=128, scale_dtype="bfloat16"),
    lb.uniform(2),
    lb.uniform(3, group=128),
    lb.uniform(4, group=128),
    pytest.param(lb.any_precision(2, 2), marks=pytest.mark.slow),
    lb.any_precision(2, 4, width=2),
    pytest.param(lb.any_precision(2, 4, width=3), marks=pytest.mark.slow),
    lb.any_precision(2, 4, width=4),
    lb.any_precision(1, 4),
    lb.any_precision(3, 4),
    lb.any_precision(4, 4, table_dtype="float32"),
    lb.any_bcq(2, 4, group=128, width=3),
    lb.any_bcq(2, 4, group=128),
    lb.any_bcq(1, 4, group=128),
)


def array(fmt: lb.Format, n: int, k: int) -> QuantArray:
    return random_array(QuantType((("k", k), ("n", n)), "f32", fmt))


def place(w: QuantArray) -> tuple[Any, int]:
    return kernel_layout(w.type), readings(w.type).index(w.type.decode)


def product(x: np.ndarray, w: QuantArray) -> np.ndarray:
    """x [m, k] of integers, each row with one from 64 to 126, so that they are what rows are rounded to; exact."""
    e = product_in_int8(param("x", "f32", m=len(x), k=x.shape[1]), w.type.decode, "int8")
    y = evaluate(e, {**{name: np.asarray(a) for name, a in w.fields.items()}, "x": x.astype(np.float32)})
    return y.transpose([list(e.dims).index(d) for d in ("m", "n")])


def integers(m: int, k: int) -> np.ndarray:
    x = np.random.default_rng(1).integers(-126, 127, (m, k)).astype(np.int8)
    x[:, 0] = 126
    return x


# ---------------------------------------------------------------- lane programs


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_lanes_make_the_integers_of_the_oracle(fmt: lb.Format) -> None:
    w = array(fmt, 128, STAGE)
    of, at = place(w)
    program, stored = of.integers(at), {name: np.asarray(a) for name, a in laid_out(w).fields.items()}
    words = [stored[name][0, 0] for name in of.words_read(at)]
    if program.of_rows:
        bytes_, scales = int8._rounded(of, program, stored)
        inputs, factors = list(np.asarray(bytes_[0, 0])), np.asarray(scales)[None, :ROWS]
    else:
        inputs = [stored[e.leaf.name][0, g, of.leaves[e.leaf.name].index(e)] for e, g in program.halves.inputs]
    made, found = int8_lanes.in_numpy(program, words, *inputs)
    factors = factors if program.of_rows else found
    got = np.zeros((ROWS, STAGE))
    got[:, np.asarray(int8._in_order(jnp.arange(STAGE)[None], program))[0]] = made
    got *= np.repeat(factors.T.astype(np.float64), STAGE // len(factors), 1)
    if program.affine:
        zero, scale = (np.asarray(w.fields[name], np.float64)[:ROWS] for name in ("zero", "scale"))
        got -= np.repeat(zero * scale, STAGE // zero.shape[1], 1)
    one_by_one = product(126 * np.eye(STAGE, dtype=np.int8), w)[:, :ROWS].T / 126
    if program.affine:
        np.testing.assert_allclose(got, one_by_one, rtol=1e-12, atol=1e-12)  # in float64, but for the order
    else:
        np.testing.assert_array_equal(got, one_by_one)


def test_bytes_are_negated_without_a_carry() -> None:
    every = np.arange(-127, 128, dtype=np.int8)
    words = np.stack([every, every[::-1], np.zeros_like(every), np.full_like(every, -127)], -1).copy()
    got = int8_lanes._negated(NumpyAlu(), words.view("<u4")[:, 0])
    np.testing.assert_array_equal(got.view(np.int8).reshape(-1, 4), -words)


def test_scales_that_are_no_numbers_make_factors_that_are_none() -> None:
    w = array(lb.bcq(3, group=128), 128, STAGE)
    alpha = w.fields["alpha"].at[:, 5, 0].set(jnp.inf).at[1, 9, 1].set(jnp.nan).at[:, 7].set(0)
    of, at = place(w)
    stored = laid_out(QuantArray({**w.fields, "alpha": alpha}, w.type)).fields
    inputs = [
        np.asarray(stored[e.leaf.name])[0, g, of.leaves[e.leaf.name].index(e)] for e, g in of.integers().halves.inputs
    ]
    made, factors = int8_lanes.in_numpy(of.integers(at), [np.asarray(stored["words"])[0, 0]], *inputs)
    assert np.argwhere(np.isnan(factors)).tolist() == [[0, 5], [1, 9]]
    assert not made[7].any()


# ---------------------------------------------------------------- the twin


@pytest.mark.parametrize(
    ("fmt", "m", "parts"),
    [
        (lb.bcq(2, group=128), 3, 2),
        pytest.param(lb.bcq(3), 3, 1, marks=pytest.mark.slow),
        pytest.param(lb.bcq(4, group=512), 9, 1, marks=pytest.mark.slow),
        pytest.param(lb.uniform(4, group=128), 3, 2, marks=pytest.mark.slow),
        pytest.param(lb.uniform(3, group=512), 3, 1, marks=pytest.mark.slow),
        pytest.param(lb.any_precision(2, 4), 9, 2, marks=pytest.mark.slow),
        pytest.param(lb.any_precision(2, 4, width=2), 3, 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_sums_the_integers_of_the_oracle(fmt: lb.Format, m: int, parts: int) -> None:
    w, x = array(fmt, 65, 301), integers(m, 301)
    verbs, (of, at) = Twin(interpret_params(detect_races=True)), place(w)
    tuned = Tuning(columns=-(-m // 8) * 8, parts=parts, depth=2)
    got = int8.product_of_integers(of, jnp.asarray(x), laid_out(w).fields, at, tuned, verbs)
    assert got.shape == (m, 65) and got.dtype == jnp.float32
    assert not races_found()
    want = product(x, w)
    if fmt.name == "uniform":  # its scales are no powers of two: sums in float32 round
        size = np.abs(x).astype(np.float64) @ np.abs(np.asarray(lb.dequantize(w), np.float64))
        zero = np.asarray(w.fields["scale"], np.float64) * np.asarray(w.fields["zero"], np.float64)
        size += np.abs(x).sum(1)[:, None] * np.abs(zero).max(1)
        assert_within(got, want, gamma(12, "f32") * 2 * size)
    else:
        np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["int8", "int8x2"])
def test_the_kernels_product_is_that_of_the_term(numerics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    verbs = Twin(interpret_params(detect_races=True))
    monkeypatch.setattr(int8, "product_of_integers", partial(int8.product_of_integers, verbs=verbs))
    w, x = array(lb.any_precision(2, 3), 13, 70), jnp.asarray(random_rows(3, 70))
    x = x.at[1, 0].set(jnp.nan)
    there = laid_out(QuantArray(w.fields, replace(w.type, numerics=numerics)))
    got = by_mma(there.type, x, there.fields)
    want = lb.matmul(x, w, numerics=numerics)
    assert got.dtype == x.dtype and np.isnan(np.asarray(got)[1]).all()
    size = np.abs(np.asarray(want)) + 256 * gamma(4, "f32")
    assert_within(np.asarray(got)[::2], np.asarray(want)[::2], (gamma(4, "f32") * size)[::2])


# ---------------------------------------------------------------- programs, and the choice

K, N = 300, 100
THERE = laid_out(array(lb.bcq(3, group=128), N, K))


def for_cuda(x: jax.Array, w: QuantArray) -> str:
    run = jax.jit(partial(lb.matmul, numerics="int8x2"))
    return str(run.trace(x, w).lower(lowering_platforms=("cuda",)).as_text())


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "float32"])
def test_a_program_for_cuda_holds_the_kernel(dtype: str) -> None:
    x = jnp.asarray(random_rows(5, K), dtype)
    assert "mosaic_gpu" in for_cuda(x, THERE)
    assert "mosaic_gpu" not in str(jax.jit(partial(lb.matmul, numerics="int8x2")).lower(x, THERE).as_text())
    plain = lb.matmul(x, array(lb.bcq(3, group=128), N, K), numerics="int8x2")
    np.testing.assert_array_equal(lb.matmul(x, THERE, numerics="int8x2"), plain)


def test_the_kernel_is_listed_or_refused() -> None:
    def line(w: QuantArray, platform: str = "gpu") -> str:
        table = str(lb.plan((2, dict(w.type.dims)["k"]), replace(w.type, numerics="int8x2"), platform)).splitlines()
        return next(row for row in table if row.startswith("mma "))

    assert f"{THERE.type.bits // 8 + 2 * 2 * K:,}" in line(THERE)  # every stored byte, and two columns of x
    assert "refused: it is for GPUs" in line(THERE, "cpu")
    for w, why in (
        (array(lb.bcq(3, group=128), N, K), "the weight is in its format's own layout: lb.prepare the model"),
        (laid_out(array(lb.bcq(3, group=64), N, K)), "in 8 bits a group has 128 inputs at the least"),
        (laid_out(array(lb.bcq(1), N, K)), "in 8 bits it decodes codes of 2 to 4 bits, not OneBit"),
        (laid_out(array(lb.any_precision(3, 5), N, K)), "in 8 bits it decodes codes of 2 to 4 bits, not Wide"),
        (laid_out(array(lb.bcq(2, offset=True), N, K)), "in 8 bits a table is one of a row as it is stored, or of"),
        (laid_out(array(fp3_rows(), N, K)), "in 8 bits a table is one of a row as it is stored, or of planes of signs"),
    ):
        assert f"refused: {why}" in line(w)


def test_parameters_of_its_own_choice() -> None:
    of = kernel_layout(QuantType((("k", 4096), ("n", 4096)), "f32", lb.bcq(4, group=128), layout="mma"))
    for m in (8, 16, 64):
        tuned = int8.tuning(Shape(m, of.tiles, of.stages), of.integers())
        assert m % tuned.columns == 0 and of.stages % tuned.parts == 0 and tuned.depth >= 2


def test_schedules_to_be_measured() -> None:
    t = QuantType((("k", 4096), ("n", 4096)), "f32", lb.bcq(2, group=128), layout="mma", numerics="int8x2")
    found = [c for c in candidates(3, t, "f32", "gpu") if c.lowering == "mma"]
    assert found[0].schedule is None and len(found) > 1
    for chosen in found[1:]:
        assert chosen.schedule is not None and chosen.schedule[0] % 8 == 0 and 16 % chosen.schedule[1] == 0


def test_it_is_predicted_to_read_no_more_than_the_weight_and_x() -> None:
    of = kernel_layout(THERE.type)
    assert isinstance(of.integers(), Integers)
    one, two = (int8_choice(64, c, readings(THERE.type), 0, 1000, "mma", "gpu") for c in (1, 2))
    assert (one.bytes, two.bytes) == (1000 + 64 * K, 1000 + 2 * 64 * K) and one.refused is None
