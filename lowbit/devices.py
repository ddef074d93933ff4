"""Which devices run the kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
from absl import logging


def is_hopper(device: Any) -> bool:
    """Whether it has compute capability 9.0, the only one with WGMMA; of another GPU, or a TPU, says once that not."""
    capability = capability_of(device) if device.platform == "gpu" else "none"
    if capability != "9.0" and device.platform != "cpu":
        _warn(device.device_kind, capability)
    return capability == "9.0"


def capability_of(device: Any) -> str:
    return str(getattr(device, "compute_capability", "unknown"))


def no_kernels_here() -> str | None:
    """Why the GPU that programs run on has no kernels; None for one that has, and where there is no GPU."""
    device = jax.devices()[0]
    if device.platform != "gpu" or is_hopper(device):
        return None
    return f"this GPU has compute capability {capability_of(device)}, and it is for 9.0 exactly"


@lru_cache(maxsize=64)
def _warn(kind: str, capability: str) -> None:
    logging.warning(
        "%s has compute capability %s: lowbit's kernels are for 9.0 exactly, so products run as XLA makes them",
        kind, capability,
    )  # fmt: skip
