"""The schedule `mma_dx`: its twin in the Mosaic GPU interpreter against the oracle, and how gradients come to it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit import backward, planning
from lowbit.array import QuantArray, laid_out
from lowbit.compat import interpret_params, races_found
from lowbit.kernels.memory import SHARED, dx_beside, dx_stage
from lowbit.kernels.mma import Shape, Tuning
from lowbit.kernels.mma_db import table_gradients
from lowbit.kernels.mma_dw import parameter_gradients
from lowbit.kernels.mma_dx import input_gradient, tuning
from lowbit.kernels.verbs import Twin
from lowbit.quant_type import QuantType, kernel_layout, readings
from lowbit.testing import random_array
from lowbit.testing.checks import assert_dx, random_rows
from tests.parameter_gradients import check_parameter_gradients, check_table_gradients

KERNEL = "mosaic_gpu"
"""In the name of what a program calls."""


def array(fmt: lb.Format, n: int, k: int, dtype: Any = "bf16") -> QuantArray:
    return random_array(QuantType((("k", k), ("n", n)), dtype, fmt))


# ---------------------------------------------------------------- the twin


def check(fmt: lb.Format, kind: str, m: int, n: int, k: int, parts: int) -> None:
    w, dy = array(fmt, n, k), random_rows(m, n, dtype=kind)
    verbs, at = Twin(interpret_params(detect_races=True)), readings(w.type).index(w.type.decode)
    tuned = Tuning(columns=64, parts=parts, depth=2)
    dx = input_gradient(kernel_layout(w.type), jnp.asarray(dy), laid_out(w).fields, tuned, verbs, at)
    assert_dx(np.asarray(dx), dy, w)
    assert not races_found()


@pytest.mark.parametrize(
    ("fmt", "kind", "parts"),
    [
        pytest.param(lb.uniform(4, group=32), "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param(lb.bcq(3), "float16", 2, marks=pytest.mark.slow),
        # tables in registers and in shared memory, new for every tile
        pytest.param(lb.any_precision(3, 5, width=4), "float16", 1, marks=pytest.mark.slow),
        (lb.codebook(1, 8, vec=4, group=128), "float16", 1),  # another order of inputs
        pytest.param(lb.nested_fp(), "float16", 1, marks=pytest.mark.slow),
        pytest.param(lb.any_precision(3, 5, width=5), "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param(lb.any_bcq(2, 3, group=128), "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param(lb.bcq(4, group=512), "bfloat16", 1, marks=pytest.mark.slow),
        pytest.param(lb.codebook(1, 4, vec=16, scale_dtype="bfloat16"), "bfloat16", 1, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_is_the_oracles_gradient(fmt: lb.Format, kind: str, parts: int) -> None:
    check(fmt, kind, 3, 140, 70, parts)  # two steps, or two parts of one


@pytest.mark.slow
def test_more_than_a_block() -> None:
    check(lb.bcq(2, group=512), "bfloat16", 70, 300, 600, parts=3)


@pytest.mark.parametrize("fmt", [lb.bcq(4), lb.any_precision(3, 8, width=4), lb.codebook(2, 8, vec=8), lb.nested_fp()])
@pytest.mark.parametrize("m", [64, 4096])
def test_what_is_in_flight_fits_beside_the_decoded_tiles(fmt: lb.Format, m: int) -> None:
    t = QuantType((("k", 4096), ("n", 4096)), "f32", fmt, layout="mma")
    of, shape = kernel_layout(t), Shape(m, 64, 16)
    program = of.program("bf16", readings(t).index(t.decode))
    chosen = tuning(shape, program)
    assert dx_beside(program) + chosen.depth * dx_stage(program) <= SHARED and chosen.depth >= 2
    assert shape.rows // 2 % chosen.parts == 0 and (chosen.parts > 1) == (m == 64)  # 16 blocks, or enough


def test_only_halves_are_multiplied() -> None:
    w = array(lb.bcq(2), 13, 70)
    with pytest.raises(TypeError, match="dy is float32: the matrix unit multiplies float16 and bfloat16"):
        input_gradient(kernel_layout(w.type), jnp.ones((1, 13)), laid_out(w).fields)


# ---------------------------------------------------------------- programs, and the choice

W = array(lb.uniform(4, group=64), 100, 300)
THERE = laid_out(W)
DY = jnp.asarray(random_rows(5, 100, dtype="bfloat16"))
X = jnp.asarray(random_rows(5, 300, dtype="bfloat16"))


def dx_of(x: jax.Array, w: QuantArray, **how: Any) -> jax.Array:
    dx: jax.Array = jax.vjp(lambda x: lb.matmul(x, w, **how), x)[1](DY.astype(x.dtype))[0]
    return dx


def for_cuda(f: Any, *args: Any) -> str:
    return str(jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


def test_a_program_for_cuda_holds_the_kernel() -> None:
    kernels = for_cuda(dx_of, X, THERE).count("custom_call @mosaic_gpu")
    assert kernels == 1  # the product itself is not computed
    assert KERNEL not in for_cuda(dx_of, X, W)
    assert KERNEL not in for_cuda(dx_of, X.astype("float32"), THERE)
    assert KERNEL not in str(jax.jit(dx_of).lower(X, THERE).as_text())


def test_on_a_cpu_gradients_are_those_of_the_plain_array() -> None:
    np.testing.assert_array_equal(np.asarray(jax.jit(dx_of)(X, THERE)), np.asarray(jax.jit(dx_of)(X, W)))


def test_gradients_of_gradients_are_those_of_the_plain_array() -> None:
    def slope(dy: jax.Array, w: QuantArray) -> jax.Array:
        dx: jax.Array = jax.vjp(lambda x: lb.matmul(x, w), X)[1](dy)[0]
        return (dx.astype("float32") ** 2).sum()

    got, want = (np.asarray(jax.jit(jax.grad(slope))(DY, w)) for w in (THERE, W))
    np.testing.assert_array_equal(got, want)
    assert KERNEL in for_cuda(slope, DY, THERE)


def test_explain_lists_the_ways_to_the_gradient() -> None:
    def line(w: QuantArray, platform: str = "gpu", dtype: str = "bfloat16") -> str:
        table = lb.explain(w, batch=64, platform=platform, dtype=dtype, gradient=True).split("\n\n")[1].splitlines()
        assert table[0] == f"dx[64, k] of x @ {w.type} on {platform}"
        return next(row for row in table if row.startswith("mma_dx "))

    assert "us" in line(THERE)
    assert f"{THERE.type.bits // 8 + 2 * 64 * 100:,}" in line(THERE)  # every stored bit, and dy
    nested, books = array(lb.nested_fp(8), 64, 256, "f16"), array(lb.codebook(3, 8, vec=4), 64, 256)
    for w, platform, dtype, why in (
        (THERE, "cpu", "bfloat16", "it is for GPUs"),
        (W, "gpu", "bfloat16", "the weight is in its format's own layout: lb.prepare the model for its GPU"),
        (THERE, "gpu", "float32", "x is f32, and it multiplies halves: cast x to bfloat16 or float16"),
        (laid_out(nested), "gpu", "float16", "a weight is not one step alone, of whole bytes"),
        (laid_out(books), "gpu", "float16", "a block needs 248,832 bytes of shared memory, and there are 231,424"),
    ):
        assert f"refused: {why}" in line(w, platform, dtype)
    assert "dx[" not in lb.explain(THERE)


def test_lowering_names_the_way_to_the_gradient() -> None:
    np.testing.assert_array_equal(dx_of(X, THERE, lowering="xla_dx"), dx_of(X, THERE))
    y = lb.matmul(X, THERE, lowering="mma_dx")  # which says nothing of the product
    np.testing.assert_array_equal(y, lb.matmul(X, THERE))
    for way in (lambda: dx_of(X, THERE, lowering=["decode", "mma_dx"]), lambda: jax.jit(forced_from_outside)(X)):
        with pytest.raises(planning.LoweringError) as refused:
            way()
        message = str(refused.value)
        assert message.startswith(f"lowering 'mma_dx' cannot run dx[5, k] of x @ {THERE.type}: use one of xla_dx")
        assert "mma_dx   refused: it is for GPUs" in message


def forced_from_outside(x: jax.Array) -> jax.Array:
    with lb.testing.lowering("mma_dx"):
        return dx_of(x, THERE)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU that is a Hopper one. Programs are still made for the CPU."""
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    _forget()
    yield device
    _forget()


def _forget() -> None:
    jax.clear_caches()
    planning.planned.cache_clear()
    backward.planned_dx.cache_clear()
    backward.planned_dw.cache_clear()
    backward.planned_db.cache_clear()


@pytest.mark.slow
def test_on_a_hopper_gpu_the_cheapest_way_runs(hopper: SimpleNamespace) -> None:
    assert KERNEL in for_cuda(dx_of, X, THERE)
    assert KERNEL not in for_cuda(lambda x: dx_of(x, THERE, lowering="xla_dx"), X)
    hopper.compute_capability = "10.0"
    _forget()
    assert KERNEL not in for_cuda(dx_of, X, THERE)
    assert "mma_dx   refused: compute capability 10.0: lowbit has schedules for WGMMA" in lb.explain(
        THERE, gradient=True
    )


@pytest.mark.slow
def test_a_model_is_differentiated_through_the_kernel(hopper: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(t: QuantType, dy: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
        ran.append(dy.shape)
        return input_gradient(kernel_layout(t), dy, fields, verbs=Twin(interpret_params()))

    def loss(x: jax.Array, w: QuantArray) -> jax.Array:
        with lb.testing.lowering("decode"):
            return (lb.matmul(x, w, lowering=how).astype("float32") ** 2).sum()

    ran: list[Any] = []
    monkeypatch.setattr(backward, "by_mma_dx", twin)
    monkeypatch.setattr(backward, "by_platform", lambda cuda, default, *args: cuda(*args))
    w, x = array(lb.uniform(4, group=64), 100, 70), X[:, :70]
    how, there = "mma_dx", laid_out(w)
    dy = 2 * np.asarray(lb.matmul(x, w, lowering="decode"))
    assert_dx(np.asarray(jax.jit(jax.grad(loss))(x, there)), dy, w)
    assert ran == [(5, 100)]
    how = "xla_dx"
    assert_dx(np.asarray(jax.jit(jax.grad(loss))(x, there)), dy, w, by_kernel=False)
    assert len(ran) == 1


@pytest.mark.slow
def test_scales_are_differentiated_through_the_kernel(hopper: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array) -> dict[str, jax.Array]:
        return parameter_gradients(kernel_layout(t), x, dy, fields, verbs=Twin(interpret_params()))

    def loss(scale: jax.Array) -> jax.Array:
        w = QuantArray({**THERE.fields, "scale": scale}, THERE.type)
        return (lb.matmul(X, w, lowering=("decode", "mma_dw")).astype("float32") * DY).sum()

    monkeypatch.setattr(backward, "by_mma_dw", twin)
    monkeypatch.setattr(backward, "by_platform", lambda cuda, default, *args: cuda(*args))
    scale = jax.jit(jax.grad(loss))(THERE.fields["scale"])
    check_parameter_gradients({"scale": scale}, np.asarray(X), np.asarray(DY), THERE)


@pytest.mark.slow
def test_codebooks_are_differentiated_through_the_kernel(
    hopper: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twin(t: QuantType, x: jax.Array, fields: dict[str, jax.Array], dy: jax.Array) -> dict[str, jax.Array]:
        return table_gradients(kernel_layout(t), x, dy, fields, verbs=Twin(interpret_params()))

    def loss(books: jax.Array) -> jax.Array:
        there = QuantArray({**w.fields, "codebooks": books}, w.type)
        return (lb.matmul(X, there, lowering=("decode", "mma_db")).astype("float32") * DY).sum()

    w = laid_out(array(lb.codebook(1, 4, vec=4, group=32), 100, 300))
    monkeypatch.setattr(backward, "by_mma_db", twin)
    monkeypatch.setattr(backward, "by_platform", lambda cuda, default, *args: cuda(*args))
    books = jax.jit(jax.grad(loss))(w.fields["codebooks"])
    check_table_gradients({"codebooks": books}, np.asarray(X), np.asarray(DY), w)
