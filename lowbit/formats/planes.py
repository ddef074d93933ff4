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


def check_offset(offset: bool) -> None:
    if type(offset) is not bool:
        raise ValueError(f"offset must be True or False, not {offset!r}")


def widths(lo: int, hi: int, **_: object) -> range:
    """The widths at which nested planes are read."""
    return range(lo, hi + 1)


def chosen_width(lo: int, hi: int, width: int | None) -> int:
    """The width of a reading, hi if None. Raises ValueError for one that there is not."""
    if type(lo) is not int or type(hi) is not int or not 1 <= lo <= hi <= 8:
        raise ValueError(f"widths go from lo to hi with 1 <= lo <= hi <= 8, not from {lo!r} to {hi!r}")
    b = hi if width is None else width
    if type(b) is not int or not lo <= b <= hi:
        raise ValueError(f"width must be None or an int from lo = {lo} to hi = {hi}, not {width!r}")
    return b


def scale_type(scale_dtype: str, option: str = "scale_dtype") -> DType:
    if scale_dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"{option} must be 'float32', 'float16' or 'bfloat16', not {scale_dtype!r}")
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


def plane_bits(bits: int, n: int, k: int, group: int | None, stored: int | None = None) -> Expr:
    """The bits as a term with dims p n g j v, over the first `bits` of the `stored` planes of the leaf `planes`."""
    size = group_size(k, group)
    planes = param("planes", "u8", p=stored or bits, n=n, g=groups(k, group), j=-(-size // 8))
    return Unpack(slice_(planes, "p", 0, bits), 1, "v", 8)


def ungroup(e: Expr, k: int, group: int | None, into: str = "k") -> Expr:
    """Dims g j v of a term become k: padding is cut off within each group, then after the last group."""
    size = group_size(k, group)
    within = slice_(merge(e, "j", "v", into="t"), "t", 0, size)
    return slice_(merge(within, "g", "t", into=into), into, 0, k)


def pack_planes(bits: jax.Array) -> jax.Array:
    """Bits [p, n, g, t] (bool or 0/1) to bytes [p, n, g, ceil(t / 8)]."""
    t = bits.shape[-1]
    padded = jnp.pad(bits.astype(jnp.uint8), [(0, 0)] * (bits.ndim - 1) + [(0, -t % 8)])
    fields = padded.reshape(*bits.shape[:-1], -1, 8) << jnp.arange(8, dtype=jnp.uint8).reshape([1] * bits.ndim + [8])
    return fields.sum(-1, dtype=jnp.uint8)


def code_planes(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [..., n, g, t] of any integer dtype to the bytes of their planes, [bits, ..., n, g, ceil(t / 8)]."""
    places = jnp.arange(bits, dtype=codes.dtype).reshape(-1, *[1] * codes.ndim)
    return pack_planes(codes[None] >> places & 1)
