"""Two levels of scales: the scales of groups are small integers under one float scale for many groups.

w = scale s q - min m, with integers s and m of `scale_bits` bits a group: the K-quants of ggml, in which q has 2 to 6
bits. Without offsets w = scale (s - 2^(scale_bits - 1)) (q - 2^(bits - 1)).
"""

from __future__ import annotations

from lowbit.formats.format import register_format
from lowbit.formats.planes import check_bits, check_offset, group_size, groups, plane_bits, scale_type, ungroup
from lowbit.ir.build import cast, const, contract, merge, param, slice_
from lowbit.ir.dtypes import DType
from lowbit.ir.expr import Expr


@register_format("k_quant")
def k_quant(
    n: int,
    k: int,
    bits: int,
    group: int = 32,
    super_group: int = 256,
    scale_bits: int = 6,
    offset: bool = True,
    scale_dtype: str = "float16",
) -> Expr:
    """Integers under two levels of scales: `k_quant(4)` stores 4-bit codes, a 6-bit scale and a 6-bit offset per 32
    inputs, and two float16 scales of those per 256 inputs: ggml's Q4_K.

    Stored: `planes` u8 [bits, n, groups, ceil(group / 8)] (plane 0 least significant), `scale` [n, super groups],
    `group_scale` u8 [n, groups] and, with `offset`, `min` and `group_min` like them. Integers have a byte each, as GPU
    kernels want them: bits per weight are bits + 8 (1 + offset) / group + s (1 + offset) / super_group for scales of s
    bits.

    Args:
      bits: of a code, 1 to 8.
      group: inputs that share an integer scale and offset, any positive size.
      super_group: inputs whose groups share the float scales, a multiple of `group`.
      scale_bits: of those integers, 1 to 8; or 0, for groups that are super groups: then w = scale q - min.
      offset: an offset a group, in place of codes and integer scales that are centred on zero.
      scale_dtype: of `scale` and `min`, "float32", "float16" or "bfloat16"; see `bcq`.

    >>> import lowbit as lb
    >>> lb.QuantType((("k", 4096), ("n", 4096)), "f32", lb.k_quant(4)).bits_per_weight
    4.625
    """
    _check(bits, group, super_group, scale_bits, offset)
    code = contract((plane_bits(bits, n, k, group), const([1 << p for p in range(bits)], "i32", "p")), ("p",))
    level = (n, groups(k, group), super_group // group, scale_bits, scale_type(scale_dtype))
    if offset:
        return ungroup(_two_levels("scale", *level) * code - _two_levels("min", *level), k, group)
    return ungroup(_two_levels("scale", *level, centred=True) * (code - (1 << bits - 1)), k, group)


def _two_levels(name: str, n: int, g: int, per: int, bits: int, dtype: DType, centred: bool = False) -> Expr:
    """A float for each group as a term with dims n g: a stored one, or an integer times that of its super group."""
    if bits == 0:
        return param(name, dtype, n=n, g=g)
    ones = const([1] * per, "i32", "t")
    each = merge(contract((param(name, dtype, n=n, s=-(-g // per)), ones), ()), "s", "t", into="g")
    within = None if bits == 8 else (0, (1 << bits) - 1)
    integers = cast(param(f"group_{name}", "u8", within, n=n, g=g), "i32")
    return slice_(each, "g", 0, g) * (integers - (1 << bits - 1) if centred else integers)


def _check(bits: int, group: int, super_group: int, scale_bits: int, offset: bool) -> None:
    check_bits(bits)
    check_offset(offset)
    group_size(1, group), group_size(1, super_group)
    if super_group is None or group is None or super_group % group:
        raise ValueError(f"super_group must be a multiple of group = {group!r}, not {super_group!r}")
    if type(scale_bits) is not int or not 0 <= scale_bits <= 8:
        raise ValueError(f"scale_bits must be an int from 0 to 8, not {scale_bits!r}")
    if scale_bits == 0 and super_group != group:
        raise ValueError(f"without integer scales every group has its own: make super_group {group}, not {super_group}")
