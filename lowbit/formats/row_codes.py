"""Activations in 8 bits: each row is rounded to e4m3 under a scale of its own."""

from __future__ import annotations

from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from lowbit.ir.build import contract
from lowbit.ir.call import CallSpec, register_call
from lowbit.ir.dims import DimError
from lowbit.ir.dtypes import is_float
from lowbit.ir.expr import Call, Expr
from lowbit.ir.typing import Type

CODES, SCALE = "e4m3_rows", "e4m3_row_scale"
LARGEST = 448.0
"""The largest e4m3."""
LEAST = 2.0**-117
"""What a row is taken to reach at least, zeros too: its scale and the inverse of that are then normal in float32."""
Array = np.ndarray[Any, Any]


def e4m3_rows(x: Expr) -> Expr:
    """x with each row, along the last dim, rounded to e4m3 times a scale: the product's operand and a factor.

    With a = max |x| over the row, the code is x 448 / a rounded to nearest even, and the scale a / 448, so that the
    whole range of e4m3 is used. A row with NaN or inf becomes NaN.

    >>> from lowbit.ir import param
    >>> print(e4m3_rows(param("x", "f32", m=2, k=8)))
    %0 = param x                     : f32[m=2 k=8]
    %1 = call e4m3_rows %0           : e4m3[m=2 k=8]
    %2 = call e4m3_row_scale %0      : f32[m=2]
    %3 = sum[] %1 * %2               : f32[m=2 k=8]
    """
    return contract((Call(CODES, (x,)), Call(SCALE, (x,))), ())


@np.errstate(invalid="ignore")  # of a row with inf
def _codes(x: Any) -> Any:
    """Of a numpy or a jax array."""
    x = x.astype(np.float32)
    return (x * (LARGEST / abs(x).max(-1, keepdims=True).clip(LEAST))).astype(ml_dtypes.float8_e4m3fn)


def _scale(x: Any) -> Any:
    return abs(x.astype(np.float32)).max(-1).clip(LEAST) * (1 / LARGEST)  # XLA would make it of a quotient


def _codes_bound(x: Array, off: Array) -> Array:
    """Codes move where x, or the two roundings before it becomes a code, may cross a tie."""
    largest = np.abs(x).max(-1, keepdims=True).clip(LEAST)
    by = LARGEST / largest
    slack = (off + np.abs(x) * (off.max(-1, keepdims=True) / largest + ROUNDINGS)) * by
    value, low, high = (
        v.clip(-LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        for v in (x * by, x * by - slack, x * by + slack)
    )
    return np.maximum(high - value, value - low)


def _scale_bound(x: Array, off: Array) -> Array:
    return off.max(-1) / LARGEST + ROUNDINGS * _scale(x)


ROUNDINGS = 4 * 2.0**-23
"""Relative: a product and a quotient in float32, of which a GPU makes the last two bits or so in its own way."""


def _row_type(x: Type) -> Type:
    if not is_float(x.dtype) or not x.dims:
        raise DimError(f"rows of {x}: give floats with at least one dim")
    return Type(x.dims, "e4m3", None)


def _scale_type(x: Type) -> Type:
    return Type(dict(list(_row_type(x).dims.items())[:-1]), "f32", None)


for _name, _spec in {
    CODES: CallSpec(_row_type, _codes, lambda x: 3 * prod(x.dims.values()), _codes, _codes_bound),
    SCALE: CallSpec(_scale_type, _scale, lambda x: prod(x.dims.values()), _scale, _scale_bound),
}.items():
    register_call(_name, _spec)
