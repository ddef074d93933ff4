"""Element types by their short names, and which conversions between them lose nothing."""

from __future__ import annotations

from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

DType = Literal["f64", "f32", "f16", "bf16", "e4m3", "e5m2", "i8", "u8", "i16", "u16", "i32", "u32"]
"""Element types by their short names; e4m3 and e5m2 are floats of 8 bits."""
Bounds = tuple[int, int]
"""Inclusive value range of an integer array."""

DTYPES: tuple[DType, ...] = get_args(DType)

_NUMPY: dict[DType, np.dtype[Any]] = {
    "f64": np.dtype(np.float64), "f32": np.dtype(np.float32), "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16), "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "i8": np.dtype(np.int8), "u8": np.dtype(np.uint8), "i16": np.dtype(np.int16), "u16": np.dtype(np.uint16),
    "i32": np.dtype(np.int32), "u32": np.dtype(np.uint32),
}  # fmt: skip
_SHORT = {d: name for name, d in _NUMPY.items()}
# Bits of significand with the implicit one: every integer of magnitude <= 2**bits is exact.
_SIGNIFICAND: dict[DType, int] = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8, "e4m3": 4, "e5m2": 3}
_WIDER: dict[DType, frozenset[DType]] = {
    "f64": frozenset({"f32", "f16", "bf16", "e4m3", "e5m2"}),
    "f32": frozenset({"f16", "bf16", "e4m3", "e5m2"}),
    "f16": frozenset({"e4m3", "e5m2"}),
    "bf16": frozenset({"e4m3", "e5m2"}),
}


def numpy_dtype(d: DType) -> np.dtype[Any]:
    """The numpy (or ml_dtypes) dtype behind a short name; raises TypeError for what is none."""
    if d not in _NUMPY:
        raise TypeError(f"{d!r} is not an element type; use one of {', '.join(DTYPES)}")
    return _NUMPY[d]


def short(dtype: Any) -> DType:
    """The short name of a dtype, given by its short name, its long one, a numpy dtype or a jax scalar type."""
    if isinstance(dtype, str) and dtype in _NUMPY:
        return dtype
    try:
        return _SHORT[np.dtype(dtype)]
    except (KeyError, TypeError):
        raise TypeError(f"dtype {dtype!r} has no place in a term; use one of {', '.join(DTYPES)}") from None


def is_float(d: DType) -> bool:
    return numpy_dtype(d).kind not in "iu"


def bits(d: DType) -> int:
    return _NUMPY[d].itemsize * 8


def full_range(d: DType) -> Bounds:
    """Every value an integer dtype can hold."""
    info = np.iinfo(_NUMPY[d])
    return int(info.min), int(info.max)


def holds(d: DType, bounds: Bounds) -> bool:
    """Whether every integer in `bounds` is a value of `d`."""
    if is_float(d):
        return max(abs(bounds[0]), abs(bounds[1])) <= 1 << _SIGNIFICAND[d]
    lo, hi = full_range(d)
    return lo <= bounds[0] and bounds[1] <= hi


def converts_exactly(source: DType, bounds: Bounds | None, target: DType) -> bool:
    """Whether each value of a `source` array (within `bounds`, for integers) is a value of `target`."""
    if source == target:
        return True
    if bounds is not None:
        return holds(target, bounds)
    return source in _WIDER.get(target, frozenset())


def exactly(values: Any, d: DType) -> np.ndarray[Any, Any]:
    """`values` as an array of `d`; raises ValueError when one of them is not a value of `d`."""
    given = np.asarray(values)
    with np.errstate(invalid="ignore", over="ignore"):  # what overflows is found by looking at the result
        array = given.astype(numpy_dtype(d))
    if not np.array_equal(array.astype(np.float64), given.astype(np.float64), equal_nan=True):
        raise ValueError(f"{given.tolist()} has values that {d} cannot hold")
    return array
