"""x @ w by the schedule `mma`, for weights in the kernels' layout: padding, the launch, and the parts of k summed."""

from __future__ import annotations

from math import ceil

import jax
import jax.numpy as jnp

from lowbit.ir.dtypes import short
from lowbit.kernels.arrange import Fields
from lowbit.kernels.lanes import STAGE
from lowbit.kernels.layout import Layout
from lowbit.kernels.mma import COLUMNS_A_BLOCK, Shape, Tuning, mma, tuning
from lowbit.kernels.verbs import Verbs


def product(
    of: Layout, x: jax.Array, fields: Fields, tuned: Tuning | None = None, verbs: Verbs | None = None, at: int = 0
) -> jax.Array:
    """x [m, k] in float16 or bfloat16 by weights as `of` lays them out: [m, n], accumulated in float32, in x's dtype.

    Args:
      tuned: parameters of the schedule, those of `tuning` if None.
      verbs: what it runs on, the GPU if None.
      at: which of its widths the weights are read at.
    """
    m = x.shape[0]
    kind = short(x.dtype)
    if kind not in ("f16", "bf16"):
        raise TypeError(f"x is {x.dtype}: the matrix unit multiplies float16 and bfloat16")
    padded = 8 * ceil(m / 8) if m <= COLUMNS_A_BLOCK else COLUMNS_A_BLOCK * ceil(m / COLUMNS_A_BLOCK)
    program, shape = of.program(kind, at), Shape(padded, of.tiles, of.stages)
    run = mma(program, shape, tuned or tuning(shape, program), verbs)
    x_padded = jnp.pad(x, ((0, padded - m), (0, of.stages * STAGE - of.k)))
    parts = run(*(fields[name] for name in of.read(at)), x_padded)
    return parts.sum(0)[: of.n, :m].T.astype(x.dtype)
