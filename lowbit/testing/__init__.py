"""Check a format or a quantized model of your own: the kit that lowbit's own formats pass.

`check_format(fmt)` and `check_model(model, batch)` are the kit, also as a pytest plugin (`lowbit.testing.plugin`);
`lowering(name)` runs products in one form; `tolerance` has the derivation of every bound; `strategies` are for
hypothesis. Loaded on first use: the plugin and the tolerances cost numpy only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.ops import LoweringError as LoweringError
    from lowbit.ops import lowering as lowering
    from lowbit.testing import strategies as strategies
    from lowbit.testing.checks import check_decode as check_decode
    from lowbit.testing.checks import check_gradients as check_gradients
    from lowbit.testing.checks import check_product as check_product
    from lowbit.testing.checks import random_array as random_array
    from lowbit.testing.kit import Checked as Checked
    from lowbit.testing.kit import check_format as check_format
    from lowbit.testing.kit import check_model as check_model
    from lowbit.testing.tolerance import assert_within as assert_within
    from lowbit.testing.tolerance import exact_and_bound as exact_and_bound

_HOME = {
    "LoweringError": "ops", "lowering": "ops",
    "check_decode": "testing.checks", "check_gradients": "testing.checks", "check_product": "testing.checks",
    "random_array": "testing.checks",
    "Checked": "testing.kit", "check_format": "testing.kit", "check_model": "testing.kit",
    "assert_within": "testing.tolerance", "exact_and_bound": "testing.tolerance",
}  # fmt: skip
__all__ = [*_HOME, "strategies"]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module("lowbit.testing.strategies")
    if name in _HOME:
        value = getattr(importlib.import_module(f"lowbit.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'lowbit.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
