"""Rows of floats as integers of 8 bits under a power of two: codes, in one column or two, and scales.

The scale of a row is the power of two s with

    63.5 s <= max |x| <= 127 s        where that is at least LEAST

so scaling by it rounds nothing: the numpy oracle, XLA and kernels round the same numbers to the same integers.

    one column     x ~ s x1                |error| <= s / 2      x1 = round(x / s)
    two columns    x ~ s (x1 + x2 / 256)   |error| <= s / 512    256 x1 + x2 = round(256 x / s)

with x1 from -127 to 127 and x2 from -128 to 127. A row with NaN or inf has the scale NaN and the codes 0, so that every
product with it is NaN; a row of zeros has the codes 0.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from lowbit.ir.call import Array, CallSpec, register_call
from lowbit.ir.dims import DimError
from lowbit.ir.dtypes import is_float
from lowbit.ir.expr import Call, Expr
from lowbit.ir.typing import Type

SCALE = "int8_scale"
CODES = {1: "int8_codes", 2: "int8x2_codes"}
"""By the number of columns."""
COLUMN = "column"
LEAST = 2.0**-100
"""What a row is taken to reach at least, so that its scale and the inverse of that are normal in float32."""
EXPONENT = 0x7F800000
BELOW = np.nextafter(np.float32(2 / 127), np.float32(0))
"""What the largest entry is multiplied by for the exponent of s: 127 times it is below 2, so that 127 has s = 1."""


def rows(x: Expr, columns: int = 1) -> tuple[Expr, Expr]:
    """Codes and scales of rows, which lie along the last dim of x. Two columns are a first dim of the codes.

    >>> from lowbit.ir import param
    >>> codes, scales = rows(param("x", "f32", m=2, k=8), columns=2)
    >>> print(codes)
    %0 = param x                     : f32[m=2 k=8]
    %1 = call int8x2_codes %0        : i8[column=2 m=2 k=8]
    >>> print(scales)
    %0 = param x                     : f32[m=2 k=8]
    %1 = call int8_scale %0          : f32[m=2]
    """
    return Call(CODES[columns], (x,)), Call(SCALE, (x,))


def _power(largest: Any) -> Any:
    """The bits of s; for inf and NaN with an exponent beyond every number's."""
    return (largest.clip(LEAST) * BELOW).view(np.int32) & EXPONENT


def _largest(x: Any) -> Any:
    """Of each row of a numpy or a jax array."""
    return abs(x.astype(np.float32)).max(-1, keepdims=True)


@np.errstate(invalid="ignore")
def _scale(x: Any) -> Any:
    largest = _largest(x)
    return (_power(largest).view(np.float32) + (largest - largest))[..., 0]  # inf - inf is NaN


@np.errstate(invalid="ignore")  # of rows with inf or NaN
def _integers(x: Any, power: Any, columns: int = 1) -> Any:
    """round(256^(columns - 1) x / s), i32."""
    inverse, finer = ((254 << 23) - power).view(np.float32), 256 ** (columns - 1)  # 1 / s
    codes = (x.astype(np.float32) * inverse * np.float32(finer)).round()
    return codes.clip(-127 * finer, 127 * finer).astype(np.int32) * (power < EXPONENT).astype(np.int32)


def _codes(x: Any) -> Any:
    return _integers(x, _power(_largest(x))).astype(np.int8)


def _two_columns(x: Any) -> Any:
    """The high and the low byte, the low one from -128 up, along a first dim."""
    upper, lower = np.array([128, 0], np.int32), np.array([8, 0], np.int32)
    add, shift = (v.reshape(2, *[1] * x.ndim) for v in (upper, lower))
    return (_integers(x, _power(_largest(x)), 2)[None] + add >> shift).astype(np.int8)


def _ends(x: Array, off: Array) -> list[Array]:
    """The powers of a row whose entries may be off by so much."""
    return [_power((abs(x) + sign * off).max(-1, keepdims=True).astype(np.float32)) for sign in (-1, 1)]


def _codes_bound(x: Array, off: Array) -> Array:
    """Codes move where an entry may cross a tie, and the largest of a row a power of two."""
    value = _codes(x).astype(np.float64)
    moved = [_integers(v, power) for power in _ends(x, off) for v in (x - off, x + off)]
    farthest: Array = np.max([abs(v - value) for v in moved], axis=0)
    return farthest


def _scale_bound(x: Array, off: Array) -> Array:
    low, high = (power.view(np.float32)[..., 0].astype(np.float64) for power in _ends(x, off))
    return high - low


def _checked(x: Type) -> Type:
    if not is_float(x.dtype) or not x.dims:
        raise DimError(f"rows of {x}: give floats with at least one dim")
    return x


def _codes_type(x: Type) -> Type:
    return Type(_checked(x).dims, "i8", (-127, 127))


def _columns_type(x: Type) -> Type:
    return Type({COLUMN: 2, **_checked(x).dims}, "i8", (-128, 127))


def _scale_type(x: Type) -> Type:
    return Type(dict(list(_checked(x).dims.items())[:-1]), "f32", None)


for _name, _spec in {
    SCALE: CallSpec(_scale_type, _scale, lambda x: prod(x.dims.values()), _scale, _scale_bound),
    CODES[1]: CallSpec(_codes_type, _codes, lambda x: 3 * prod(x.dims.values()), _codes, _codes_bound),
    CODES[2]: CallSpec(_columns_type, _two_columns, lambda x: 4 * prod(x.dims.values()), _two_columns),
}.items():
    register_call(_name, _spec)
