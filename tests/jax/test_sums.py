"""The schedule `sums`: its twin in the Mosaic GPU interpreter against the oracle, and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit.array import QuantArray, laid_out
from lowbit.compat import interpret_params, races_found
from lowbit.kernels.product import product_by_sums
from lowbit.kernels.partial import Sums
from lowbit.kernels.verbs import Twin
from lowbit.passes.pipeline import PIPELINES
from lowbit.passes.pipeline import run as rewritten
from lowbit.passes.pointwise import UnsuitableError
from lowbit.quant_type import QuantType, kernel_layout
from lowbit.testing import random_array
from lowbit.testing.checks import assert_product, random_rows
from lowbit.testing.terms import product_term


def array(fmt: lb.Format, n: int, k: int) -> QuantArray:
    return random_array(QuantType((("k", k), ("n", n)), "f32", fmt))


def run(w: QuantArray, x: Any, count: int | None = None) -> jax.Array:
    verbs = Twin(interpret_params(detect_races=True))
    y = product_by_sums(kernel_layout(w.type), jnp.asarray(x), laid_out(w).fields, count, verbs)
    return jax.block_until_ready(y)


@pytest.mark.parametrize(
    ("fmt", "m", "n", "k", "count"),
    [
        (lb.codebook(1, 8, vec=4, group=128), 1, 200, 140, 1),
        (lb.codebook(2, 8, vec=8, group=32, scale_dtype="bfloat16"), 3, 65, 200, None),
        pytest.param(lb.codebook(1, 8, vec=4, scale_dtype="float16"), 6, 65, 140, None, marks=pytest.mark.slow),
        pytest.param(lb.codebook(2, 8, vec=8, group=256), 2, 200, 300, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_is_the_oracles_product(fmt: lb.Format, m: int, n: int, k: int, count: int | None) -> None:
    w, x = array(fmt, n, k), random_rows(m, k)
    y = run(w, x, count)
    assert y.shape == (m, n) and y.dtype == np.float32
    assert not races_found()
    assert_product(y, x, w, rewritten(product_term(m, w.type, "f32"), PIPELINES["table"]))


@pytest.mark.parametrize(
    ("fmt", "why"),
    [
        (lb.bcq(2, group=128), "its weights are no sums of vectors from codebooks"),
        (lb.codebook(1, 4, vec=4, group=128), "tables of sums are for at least 32 vectors of 4 and more, not 16 vec"),
        (lb.codebook(1, 8, vec=2), "tables of sums are for at least 32 vectors of 4 and more, not 256 vectors of 2"),
        (lb.codebook(1, 6, vec=4), "6 bits for 4 inputs do not fill 2 words of a lane with an even number of codes"),
        (lb.codebook(4, 8, vec=16), "a table of its sums and its vectors take 196608 bytes, and .* has 163840 for"),
    ],
    ids=str,
)
def test_a_table_that_lanes_cannot_read_is_refused(fmt: lb.Format, why: str) -> None:
    of = kernel_layout(QuantType((("k", 256), ("n", 64)), "f32", fmt, layout="mma"))
    with pytest.raises(UnsuitableError, match=why):
        Sums(of.program("f16"), 1)
