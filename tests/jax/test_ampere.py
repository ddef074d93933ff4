"""The schedule `mma` for compute capability 8: its twin in the interpreter against the oracle, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lowbit as lb
from lowbit import compat, devices, planning
from lowbit.array import laid_out
from lowbit.compat import interpret_params, races_found
from lowbit.ir.dtypes import short
from lowbit.kernels import ampere, choice
from lowbit.kernels.ampere import refusal, tuning
from lowbit.kernels.ampere_verbs import AmpereTwin
from lowbit.kernels.lanes import from_registers
from lowbit.kernels.mma import Shape, Tuning
from lowbit.kernels.product import product
from lowbit.quant_type import QuantType, kernel_layout, readings
from lowbit.testing import random_array
from lowbit.testing.checks import assert_product, random_rows
from lowbit.testing.terms import kernel_term


def check(fmt: lb.Format, dtype: str, m: int, n: int, k: int, tuned: Tuning | None, twin: Any = AmpereTwin) -> None:
    w = random_array(QuantType((("k", k), ("n", n)), "bf16", fmt))
    x, at = random_rows(m, k, dtype=dtype), readings(w.type).index(w.type.decode)
    verbs = twin(interpret_params(detect_races=True))
    y = product(kernel_layout(w.type), jnp.asarray(x), laid_out(w).fields, tuned, verbs, at, "ampere")
    jax.block_until_ready(y)
    assert not races_found()
    assert_product(y, x, w, kernel_term(m, w.type, short(x.dtype)))


@pytest.mark.parametrize(
    ("fmt", "dtype", "m", "inputs", "tuned"),
    [
        (lb.bcq(2, group=128), "bfloat16", 5, 525, Tuning(8, 1, 2)),
        (lb.uniform(4, group=64), "float16", 11, 1500, Tuning(8, 2, 2)),  # two parts of k, two blocks of columns
        (lb.any_precision(3, 8, width=4), "bfloat16", 3, 900, Tuning(8, 1, 4)),  # a table in shared memory
        pytest.param(lb.bcq(3, group=512), "bfloat16", 16, 2000, Tuning(16, 1, 4), marks=pytest.mark.slow),
        pytest.param(lb.bcq(4, group=32), "float16", 3, 1500, Tuning(8, 1, 4), marks=pytest.mark.slow),
        pytest.param(lb.codebook(1, 8, vec=4), "float16", 3, 900, Tuning(8, 1, 4), marks=pytest.mark.slow),
        pytest.param(lb.bcq(2), "float16", 40, 70, None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_twin_is_the_oracles_product(fmt: lb.Format, dtype: str, m: int, inputs: int, tuned: Tuning | None) -> None:
    check(fmt, dtype, m, 65, inputs, tuned)


class Late(AmpereTwin):
    """Copies go to the buffer that is read in the same step."""

    def fetch(self, copies: Any) -> None:
        super().fetch([(source, SimpleNamespace(__setitem__=None)) for source, _ in copies])


def test_registers_are_those_of_the_instruction() -> None:
    """The lanes' order of operand A of m16n8k16 with 16-bit elements, as the PTX ISA draws it, is that of a stage."""
    lanes = np.arange(128)
    at = np.empty((16, 4, 128, 2), int)  # step, register, lane, half: row and input as 64 row + input
    for register in range(4):
        row = lanes // 32 * 16 + lanes % 32 // 4 + 8 * (register % 2)
        for step in range(16):
            for half in range(2):
                at[step, register, :, half] = 256 * row + 16 * step + 2 * (lanes % 4) + half + 8 * (register // 2)
    packed = (at[..., 0] | at[..., 1] << 16).astype(np.uint32).reshape(64, 128)
    assert (from_registers(packed, "f16").view(np.uint16) == np.arange(64 * 256).reshape(64, 256)).all()
