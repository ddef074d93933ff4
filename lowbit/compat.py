"""What differs between jax 0.10.2 and 0.12."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

NEW = jax.__version_info__ >= (0, 11)


def load(ref: Any, layout: Any, optimized: bool = True) -> jax.Array:
    """`plgpu.load` of a whole ref: 0.10 wants an index, later versions refuse one."""
    return plgpu.load(ref, *(() if NEW else ((),)), layout=layout, optimized=optimized)


def transposed(ref: Any) -> Any:
    """A matrix in memory seen the other way round: `plgpu.transpose_ref` in 0.10, a method since."""
    return ref.transpose((1, 0)) if NEW else plgpu.transpose_ref(ref, (1, 0))


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
