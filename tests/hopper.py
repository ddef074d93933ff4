"""Files of tests that need a GPU of compute capability 9.0, in tests/gpu: elsewhere each is skipped as a whole."""

import jax
import pytest


def needed() -> None:
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        reason = f"needs a GPU of compute capability 9.0 (make gpu); jax found {device.device_kind}"
        pytest.skip(reason, allow_module_level=True)
