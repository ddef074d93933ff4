"""Bit planes in groups along k: the storage that several formats share.

Plane p of an [n, k] code is stored as bytes [p, n, g, j]: g counts groups of `group` weights along k, j the bytes of a
group, and bit v (least significant first) of byte j is the bit of weight 8 j + v of the group. A group whose size is
not a multiple of 8, and the last group when k is not a multiple of `group`, are padded with zero bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lowbit.ir.build import merge, param, slice_
from lowbit.ir.dtypes import DType, short
from lowbit.ir.expr import Expr, Unpack


def check_bits(bits: int) -> None:
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"bits must be an int from 1 to 8, not {bits!r}")


def scale_type(scale_dtype: str) -> DType:
    if scale_dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"scale_dtype must be 'float32', 'float16' or 'bfloat16', not {scale_dtype!r}")
    return short(scale_dtype)


def group_size(k: int, group: int | None) -> int:
    """The group actually used: `group`, or one group a row when it is None or longer than the row."""
    if group is None:
        return k
    if type(group) is not int or group < 1:
        raise ValueError(f"group must be a positive int, or None for one group a row, not {group!r}")
    return min(group, k)


def groups(k: int, group: int | None) -> int:
    """Groups a row, the ragged last one included."""
    return -(-k // group_size(k, group))


def plane_bits(bits: int, n: int, k: int, group: int | None) -> Expr:
    """The bits as a term with dims p n g j v, over the leaf `planes`."""
    size = group_size(k, group)
    return Unpack(param("planes", "u8", p=bits, n=n, g=groups(k, group), j=-(-size // 8)), 1, "v", 8)


def ungroup(e: Expr, k: int, group: int | None) -> Expr:
    """Dims g j v of a term become k: padding is cut off within each group, then after the last group."""
    size = group_size(k, group)
    within = slice_(merge(e, "j", "v", into="t"), "t", 0, size)
    return slice_(merge(within, "g", "t", into="k"), "k", 0, k)


def pack_planes(bits: jax.Array) -> jax.Array:
    """Bits [p, n, g, t] (bool or 0/1) to bytes [p, n, g, ceil(t / 8)]."""
    t = bits.shape[-1]
    padded = jnp.pad(bits.astype(jnp.uint8), [(0, 0)] * (bits.ndim - 1) + [(0, -t % 8)])
    fields = padded.reshape(*bits.shape[:-1], -1, 8) << jnp.arange(8, dtype=jnp.uint8).reshape([1] * bits.ndim + [8])
    return fields.sum(-1, dtype=jnp.uint8)
