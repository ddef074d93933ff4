"""Uniform quantization: w = scale (q - zero), q an integer of `bits` bits stored as its bit planes.

Planes store every width without waste, and make the conversion to binary coding a change of scales alone.
"""

from __future__ import annotations

from lowbit.formats.format import register_format
from lowbit.formats.planes import check_bits, groups, plane_bits, scale_type, ungroup
from lowbit.ir.build import cast, const, contract, param
from lowbit.ir.expr import Expr


@register_format("uniform")
def uniform(n: int, k: int, bits: int, group: int | None = None, scale_dtype: str = "float32") -> Expr:
    """Asymmetric integers: `uniform(4, group=128)` stores 4-bit codes, and a scale and zero point per 128 inputs.

    Stored: `planes` u8 [bits, n, groups, ceil(group / 8)] (plane 0 least significant), `scale` [n, groups], `zero` u8
    [n, groups]. Bits per weight: bits + (s + 8) / group for scales of s bits.

    Args:
      bits: 1 to 8.
      group: inputs that share a scale, any positive size; None for one group a row.
      scale_dtype: "float32", "float16" or "bfloat16"; see `bcq`.

    >>> import lowbit as lb
    >>> lb.uniform(4, group=128)["bits"]
    4
    """
    return affine(n, k, bits, group, scale_dtype)


def affine(n: int, k: int, bits: int, group: int | None, scale_dtype: str, into: str = "k") -> Expr:
    """The weights [n, into] that codes, scales and zero points stand for."""
    check_bits(bits)
    g = groups(k, group)
    code = contract((plane_bits(bits, n, k, group), const([1 << p for p in range(bits)], "i32", "p")), ("p",))
    zero = cast(param("zero", "u8", n=n, g=g), "i32")
    return ungroup(param("scale", scale_type(scale_dtype), n=n, g=g) * (code - zero), k, group, into)
