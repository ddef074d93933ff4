"""What differs between jax 0.10.2 and 0.12."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

NEW = jax.__version_info__ >= (0, 11)
NEEDED_BEFORE_HOPPER = "0.12"
BEFORE_HOPPER = jax.__version_info__ >= (0, 12)
"""Whether Mosaic GPU compiles for compute capability 8: `mma.sync`, and `cp.async` by warpgroups."""


def load(ref: Any, layout: Any, optimized: bool = True) -> jax.Array:
    """`plgpu.load` of a whole ref: 0.10 wants an index, later versions refuse one."""
    return plgpu.load(ref, *(() if NEW else ((),)), layout=layout, optimized=optimized)


def transposed(ref: Any) -> Any:
    """A matrix in memory seen the other way round: `plgpu.transpose_ref` in 0.10, a method since."""
    return ref.transpose((1, 0)) if NEW else plgpu.transpose_ref(ref, (1, 0))


def store(ref: Any, value: jax.Array) -> None:
    """Stores to memory in pieces as small as the lanes have them: `plgpu.store`, which 0.10 lacks."""
    plgpu.store(ref, value, optimized=False)  # type: ignore[attr-defined, unused-ignore]


def mma(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """total + a @ b by `mma.sync`, which 0.10 lacks."""
    out: jax.Array = plgpu.mma(total, a, b)  # type: ignore[attr-defined, unused-ignore]
    return out


def mma_layout(operand: str) -> Any:
    """How `mma` takes its operand LHS, RHS or ACC; all halves are alike."""
    return getattr(plgpu.Layout, f"MMA_{operand}")(jnp.float16)


def copy_matrix_async(source: Any, target: Any) -> None:
    """Begins a copy by `cp.async`, from memory to a tiled buffer; earlier ones that no group has end with it as one."""
    plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)  # type: ignore[call-arg, attr-defined, unused-ignore]


def wait_async(but: int) -> None:
    """Waits for copies by `cp.async`, but for the newest groups of them, and for the warpgroup's other lanes."""
    plgpu.wait_gmem_to_smem(but)  # type: ignore[attr-defined, unused-ignore]


def interpret_params(**options: Any) -> Any:
    """Parameters of the Mosaic GPU interpreter: public from 0.11 on."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams(**options)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**options)


def races_found() -> bool:
    """Whether the last interpretation that detects races saw one. From 0.11 on it raises besides."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.get_races().races_found)
