"""The schedule `fp8`: weights that are stored as e4m3 are WGMMA's operand A as they lie, activations in e4m3 are B.

The tensor cores add products of 8-bit floats in fewer bits than float32 has. So an accumulator takes one stage, and is
then added to the sum in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lowbit.kernels.decoders import ROWS, STAGE
from lowbit.kernels.layout import WARPGROUPS
from lowbit.kernels.mma import BYTES, Shape, Tuning, deepest
from lowbit.kernels.verbs import Gpu, Verbs


def tuning(shape: Shape) -> Tuning:
    """As `lowbit.kernels.mma.tuning`."""
    return deepest(shape, stage=lambda columns: STAGE * (columns + WARPGROUPS * ROWS))


def fp8(shape: Shape, tuned: Tuning, verbs: Verbs | None = None) -> Callable[..., jax.Array]:
    """The product as a function (w, x) -> f32 [parts, n, m] of e4m3 arrays w [tile, ROWS, k] and x [m, k]."""
    run = verbs or Gpu()
    return plgpu.kernel(
        partial(_body, shape, tuned, run),
        out_type=jax.ShapeDtypeStruct((tuned.parts, shape.rows * ROWS, shape.m), jnp.float32),
        scratch_types=[plgpu.SMEM((WARPGROUPS, ROWS, tuned.columns), jnp.float32)],
        grid=(shape.rows // WARPGROUPS, tuned.parts, ceil(shape.m / tuned.columns)),
        grid_names=("row", "part", "column"),
        num_threads=WARPGROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=run.interpret,
    )


def _body(shape: Shape, tuned: Tuning, verbs: Verbs, w: Any, x: Any, out: Any, staging: Any) -> None:
    row, part, column = (lax.axis_index(name) for name in ("row", "part", "column"))
    group = lax.axis_index("group")
    steps = shape.stages // tuned.parts
    first = part * steps

    def compute(pipeline: Callable[..., Any]) -> None:
        staging[group] = pipeline(verbs.zeros((ROWS, tuned.columns)))
        plgpu.commit_smem()
        n, m = (row * WARPGROUPS + group) * ROWS, column * tuned.columns
        plgpu.copy_smem_to_gmem(staging.at[group], out.at[part, pl.ds(n, ROWS), pl.ds(m, tuned.columns)])
        plgpu.wait_smem_to_gmem(0)

    def step(_: Any, rows: Any, x: Any, total: jax.Array) -> Any:
        total = total + verbs.product(rows.at[group], x)
        verbs.release()
        return total

    specs = [
        plgpu.BlockSpec((WARPGROUPS, ROWS, STAGE), lambda k: (row, 0, first + k), transforms=BYTES),
        plgpu.BlockSpec((tuned.columns, STAGE), lambda k: (column, first + k), transforms=BYTES),
    ]
    plgpu.emit_pipeline_warp_specialized(
        step, grid=(steps,), in_specs=specs, wg_axis="group", num_compute_wgs=WARPGROUPS, memory_registers=40,
        max_concurrent_steps=tuned.depth, compute_context=compute,
    )(w, x)  # fmt: skip
