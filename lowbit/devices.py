"""Which devices run the kernels, and in which of their two variants."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import jax
from absl import logging

Variant = Literal["hopper", "ampere"]
VARIANTS: dict[str, Variant] = {"9.0": "hopper", "8.0": "ampere", "8.6": "ampere", "8.9": "ampere"}
"""By compute capability. 8.9 is Ada's."""


def runs_kernels(device: Any) -> bool:
    """Whether it runs kernels; of a GPU that does not, or a TPU, says once why."""
    why = no_kernels_on(device)
    if why is not None and device.platform != "cpu":
        _warn(device.device_kind, why)
    return why is None


def no_kernels_on(device: Any) -> str | None:
    """Why a device runs no kernels, None for one that does."""
    capability = str(getattr(device, "compute_capability", "unknown"))
    if device.platform != "gpu":
        return "kernels are for GPUs"
    variant = VARIANTS.get(capability)
    if variant is None:
        return f"compute capability {capability}: {_missing(capability)}"
    if variant == "ampere":
        from lowbit.compat import BEFORE_HOPPER, NEEDED_BEFORE_HOPPER  # imports Mosaic GPU

        if not BEFORE_HOPPER:
            return f"compute capability {capability} needs jax >= {NEEDED_BEFORE_HOPPER}, and this is {jax.__version__}"
    return None


def no_kernels_here() -> str | None:
    """Why the GPU that programs run on has no kernels; None for one that has, and where there is no GPU."""
    device = jax.devices()[0]
    return None if device.platform != "gpu" or runs_kernels(device) else no_kernels_on(device)


def variant_here() -> Variant:
    """The kernels' variant for the GPU that programs run on; that of Hopper for one that is elsewhere."""
    return VARIANTS.get(str(getattr(jax.devices()[0], "compute_capability", "")), "hopper")


def _missing(capability: str) -> str:
    has = "lowbit has schedules for WGMMA, which is 9.0 only, and for mma.sync with cp.async, 8.0, 8.6 and 8.9"
    return f"{has}, and no tcgen05 schedule yet" if capability.startswith(("10.", "11.")) else has


@lru_cache(maxsize=64)
def _warn(kind: str, why: str) -> None:
    logging.warning("%s runs none of lowbit's kernels (%s), so products run as XLA makes them", kind, why)
