"""The schedule `mma_dx`: its twin in the Mosaic GPU interpreter against the oracle, and how gradients come to it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.array import QuantArray, laid_out
from lowbit.compat import interpret_params, races_found
from lowbit.ir.build import contract, param
from lowbit.ir.dtypes import short
from lowbit.kernels.memory import SHARED, dx_beside, dx_stage
from lowbit.kernels.mma import Shape, Tuning
from lowbit.kernels.mma_dx import input_gradient, tuning
from lowbit.kernels.verbs import Twin
from lowbit.quant_type import QuantType, kernel_layout, readings
from lowbit.testing import random_array
from lowbit.testing.checks import random_rows, stored
from lowbit.testing.terms import kernel_dx_term
from lowbit.testing.tolerance import assert_within, exact_and_bound, rounded


def array(fmt: lb.Format, n: int, k: int, dtype: Any = "bf16") -> QuantArray:
    return random_array(QuantType((("k", k), ("n", n)), dtype, fmt))


# ---------------------------------------------------------------- the twin


def assert_dx(dx: Any, dy: Any, w: QuantArray) -> None:
    """dx [m, k] is dy [m, n] times the transpose of w, as exactly as the kernel computes it."""
    m, env = len(dy), {**stored(w), "dy": np.asarray(dy)}
    plain = contract((param("dy", short(dy.dtype), None, m=m, n=dict(w.type.dims)["n"]), w.type.decode), ("n",))
    exact, _ = exact_and_bound(plain, env, ("m", "k"))
    _, bound = exact_and_bound(kernel_dx_term(m, w.type, short(dy.dtype)), env, ("m", "k"))
    assert dx.shape == exact.shape and dx.dtype == dy.dtype
    assert_within(dx, exact, rounded(exact, bound, dy.dtype), "dx [m, k]")


def check(fmt: lb.Format, kind: str, m: int, n: int, k: int, parts: int = 1) -> None:
    w, dy = array(fmt, n, k), random_rows(m, n, dtype=kind)
    verbs, at = Twin(interpret_params(detect_races=True)), readings(w.type).index(w.type.decode)
    tuned = Tuning(columns=64, parts=parts, depth=2)
    dx = input_gradient(kernel_layout(w.type), jnp.asarray(dy), laid_out(w).fields, tuned, verbs, at)
    assert_dx(np.asarray(dx), dy, w)
    assert not races_found()


@pytest.mark.parametrize(
    ("fmt", "kind"),
    [
        (lb.uniform(4, group=32), "bfloat16"),
        (lb.bcq(3), "float16"),
        (lb.any_precision(3, 5, width=4), "float16"),  # tables in registers and in shared memory, new for every tile
        (lb.codebook(1, 8, vec=4, group=128), "float16"),  # another order of inputs
        (lb.nested_fp(), "float16"),
        pytest.param(lb.any_precision(3, 5, width=5), "bfloat16", marks=pytest.mark.slow),
        pytest.param(lb.any_bcq(2, 3, group=128), "bfloat16", marks=pytest.mark.slow),
        pytest.param(lb.bcq(4, group=512), "bfloat16", marks=pytest.mark.slow),
        pytest.param(lb.codebook(1, 4, vec=16, scale_dtype="bfloat16"), "bfloat16", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_is_the_oracles_gradient(fmt: lb.Format, kind: str) -> None:
    check(fmt, kind, 3, 140, 70)  # two steps


def test_parts_of_n_are_summed() -> None:
    check(lb.uniform(4, group=64), "float16", 3, 140, 70, parts=2)


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
