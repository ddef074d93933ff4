"""Nested binary coding: sign planes that are read at several widths, with scales of its own for each width.

w = sum_{p < b} alpha_{b,p} (2 b_p - 1) [+ beta_b], b one of lo to hi. AnyBCQ (ICLR 2026).
"""

from __future__ import annotations

from lowbit.formats.format import register_format
from lowbit.formats.planes import check_offset, chosen_width, groups, plane_bits, scale_type, ungroup, widths
from lowbit.ir.build import contract, param
from lowbit.ir.expr import Expr


@register_format("any_bcq", views=("width", widths))
def any_bcq(
    n: int,
    k: int,
    lo: int = 2,
    hi: int = 4,
    group: int | None = None,
    offset: bool = False,
    width: int | None = None,
    scale_dtype: str = "float32",
) -> Expr:
    """Nested binary coding: `any_bcq(2, 4, group=128)` stores 4 sign planes that are read at widths 2, 3 and 4.

    Width b is the first b planes under scales of its own: what `bcq(b)` would be with those planes. `fmt.at(b)`,
    `type.at(b)`, `lb.matmul(..., width=b)` and `lb.at_width(model, b)` choose it.

    Stored: `planes` u8 [hi, n, groups, ceil(group / 8)] and for each width b from lo to hi `alpha<b>` [b, n, groups]
    and, with `offset`, `beta<b>` [n, groups]. Bits per weight: hi + s sum_b (b + offset) / group for scales of s bits.

    Args:
      lo, hi: the least and the largest width, 1 <= lo <= hi <= 8.
      group, offset, scale_dtype: as in `lb.bcq`, for every width.
      width: that of this reading; hi if None.

    >>> import lowbit as lb
    >>> lb.any_bcq(2, 4, group=128).widths
    (2, 3, 4)
    """
    b = chosen_width(lo, hi, width)
    check_offset(offset)
    dtype, g = scale_type(scale_dtype), groups(k, group)
    sign = plane_bits(b, n, k, group, hi) * 2 - 1
    w = contract((param(f"alpha{b}", dtype, p=b, n=n, g=g), sign), ("p",))
    if offset:
        w = w + param(f"beta{b}", dtype, n=n, g=g)
    return ungroup(w, k, group)
