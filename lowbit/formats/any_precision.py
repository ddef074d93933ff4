"""Any-precision: one buffer of index bits that is read at several widths, and a table of values for each.

w = table_b[code >> (hi - b)], b one of lo to hi. Any-Precision LLM (Park et al., ICML 2024).
"""

from __future__ import annotations

from lowbit.formats.format import register_format
from lowbit.formats.planes import chosen_width, plane_bits, scale_type, ungroup, widths
from lowbit.ir.build import const, contract, param
from lowbit.ir.expr import Expr, Gather


@register_format("any_precision", views=("width", widths))
def any_precision(
    n: int, k: int, lo: int = 3, hi: int = 8, width: int | None = None, table_dtype: str = "float16"
) -> Expr:
    """Nested codes: `any_precision(3, 8)` stores 8 bits a weight that are read at any width from 3 to 8.

    The code of a width is the leading bits of the code of hi, so a product at width b reads b planes and one table.
    `fmt.at(b)`, `type.at(b)`, `lb.matmul(..., width=b)` and `lb.at_width(model, b)` choose the width.

    Stored: `planes` u8 [hi, n, 1, ceil(k / 8)], the most significant bit first, and for each width b from lo to hi
    `table<b>` [n, 2**b]. Bits per weight: hi + t sum_b 2**b / k for entries of t bits.

    Args:
      lo, hi: the least and the largest width, 1 <= lo <= hi <= 8.
      width: that of this reading; hi if None.
      table_dtype: "float32", "float16" or "bfloat16".

    >>> import lowbit as lb
    >>> lb.any_precision(3, 6).widths
    (3, 4, 5, 6)
    """
    b = chosen_width(lo, hi, width)
    powers = const([1 << (b - 1 - p) for p in range(b)], "i32", "p")
    code = contract((plane_bits(b, n, k, None, hi), powers), ("p",))
    table = param(f"table{b}", scale_type(table_dtype, "table_dtype"), n=n, c=1 << b)
    return ungroup(Gather(table, code, "c"), k, None)
