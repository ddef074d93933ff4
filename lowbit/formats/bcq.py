"""Binary-coding quantization: w = sum_p alpha_p (2 b_p - 1) [+ beta], one alpha per plane and group of inputs.

LUT-GEMM (Park et al., ICLR 2024), AlphaTuning (Kwon et al., EMNLP Findings 2022).
"""

from __future__ import annotations

from lowbit.formats.format import register_format
from lowbit.formats.planes import check_bits, check_offset, groups, plane_bits, scale_type, ungroup
from lowbit.ir.build import contract, param
from lowbit.ir.expr import Expr


@register_format("bcq")
def bcq(
    n: int, k: int, bits: int, group: int | None = None, offset: bool = False, scale_dtype: str = "float32"
) -> Expr:
    """Binary-coding planes: `bcq(3, group=128)` stores 3 sign planes and 3 scales per 128 inputs of an output.

    Stored: `planes` u8 [bits, n, groups, ceil(group / 8)], `alpha` [bits, n, groups] and, with `offset`, `beta`
    [n, groups]. Bits per weight: bits + s (bits + offset) / group for scales of s bits.

    Args:
      bits: planes, 1 to 8.
      group: inputs that share the scales, any positive size; None for one group a row.
      offset: add a learned beta per group, for weights that are not centred.
      scale_dtype: of alpha and beta. "float32" trains with any optimizer; "float16" and "bfloat16" store half of it,
        but Adam's epsilon is zero in float16: `lb.tune` trains such scales in float32.

    >>> import lowbit as lb
    >>> print(lb.bcq(3, group=128))
    bcq(bits=3, group=128)
    """
    check_bits(bits)
    check_offset(offset)
    dtype, g = scale_type(scale_dtype), groups(k, group)
    sign = plane_bits(bits, n, k, group) * 2 - 1
    w = contract((param("alpha", dtype, p=bits, n=n, g=g), sign), ("p",))
    if offset:
        w = w + param("beta", dtype, n=n, g=g)
    return ungroup(w, k, group)
