"""Opaque steps: what the algebra cannot say (a rounding-corrected rebuild, an entropy code) still has every reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lowbit.ir.dims import DimError, check_name, check_shape
from lowbit.ir.dtypes import is_float

if TYPE_CHECKING:
    from lowbit.ir.typing import Type

Array = np.ndarray[Any, Any]
LaneProgram = Callable[..., list[Any]]


@dataclass(frozen=True)
class CallSpec:
    """The readings of one opaque step.

    Attributes:
      type: operand types to the result type; raises DimError for operands it does not take.
      oracle: operand arrays (dims in the operand's order) to the result array, in numpy.
      operations: operand types to a count of multiply-add sized operations.
      xla: the same function in jnp; a term that holds a step without one cannot be lowered.
      bound: operand values and then the bounds on their errors (numpy, float64 or int64) to a bound on the error of
        what `xla` makes of such operands. Without one, `xla` rounds at most once and its operands are exact: what
        tests of lowerings hold it to.
      elementwise: each element of the result is made of those at its place in the operands, which have all its dims: so
        a slice of the step is the step of slices.
      lanes: the same for four elements of one byte each, as a GPU kernel computes it: `lanes(alu, *words)` gives two
        registers of two float16 each (see `lowbit.kernels.alu`).
    """

    type: Callable[..., Type]
    oracle: Callable[..., Array]
    operations: Callable[..., int]
    xla: Callable[..., Any] | None = None
    bound: Callable[..., Array] | None = None
    elementwise: bool = False
    lanes: LaneProgram | None = None


_SPECS: dict[str, CallSpec] = {}


def register_call(name: str, spec: CallSpec) -> None:
    """Make `Call(name, ...)` mean `spec`. A name is given once: interned terms outlive a change of mind."""
    check_name("call", name)
    if name in _SPECS:
        raise ValueError(f"call {name!r} is already registered")
    _SPECS[name] = spec


def call_spec(name: str) -> CallSpec:
    if name not in _SPECS:
        known = ", ".join(sorted(_SPECS)) or "none"
        raise KeyError(f"call {name!r} is not registered (known: {known}): import the module that registers it")
    return _SPECS[name]


def call_type(name: str, *operands: Type) -> Type:
    """The type of the step's result, which is checked like that of any other node."""
    t = call_spec(name).type(*operands)
    check_shape(f"call {name}", tuple(t.dims.items()))
    if is_float(t.dtype) != (t.bounds is None):
        raise DimError(f"call {name} makes {t} in the range {t.bounds}: integers have a range, floats have none")
    return t
