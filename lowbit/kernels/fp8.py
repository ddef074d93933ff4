"""The schedule `fp8`: weights that are stored as e4m3 are WGMMA's operand A as they lie, activations in e4m3 are B.

The tensor cores add products of 8-bit floats in fewer bits than float32 has. So an accumulator takes one stage, and is
then added to the sum in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.layout import WARPGROUPS
from lowbit.kernels.mma import AXES, BYTES, Shape, Tuning, deepest, launch, pipelined, send
from lowbit.kernels.verbs import Gpu, Verbs


def tuning(shape: Shape) -> Tuning:
    """As `lowbit.kernels.mma.tuning`."""
    return deepest(shape, stage=lambda columns: STAGE * (columns + WARPGROUPS * ROWS))


def fp8(shape: Shape, tuned: Tuning, verbs: Verbs | None = None) -> Callable[..., jax.Array]:
    """The product as a function (w, x) -> f32 [parts, n, m] of e4m3 arrays w [tile, ROWS, k] and x [m, k]."""
    run = verbs or Gpu()
    return launch(partial(_body, shape, tuned, run), shape, tuned, run)


def _body(shape: Shape, tuned: Tuning, verbs: Verbs, w: Any, x: Any, out: Any, staging: Any) -> None:
    row, part, column, group = at = [lax.axis_index(axis) for axis in AXES]
    steps = shape.stages // tuned.parts
    first = part * steps

    def compute(pipeline: Callable[..., Any]) -> None:
        staging[group] = pipeline(verbs.zeros((ROWS, tuned.columns)))
        send(staging, out, tuned, at)

    def step(_: Any, rows: Any, x: Any, total: jax.Array) -> Any:
        total = total + verbs.product(rows.at[group], x)
        verbs.release()
        return total

    specs = [
        plgpu.BlockSpec((WARPGROUPS, ROWS, STAGE), lambda k: (row, 0, first + k), transforms=BYTES),
        plgpu.BlockSpec((tuned.columns, STAGE), lambda k: (column, first + k), transforms=BYTES),
    ]
    pipelined(step, steps, specs, tuned.depth, compute)(w, x)
