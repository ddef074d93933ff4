"""Products as terms: what results are compared with, and what their bounds are derived from."""

from __future__ import annotations

from typing import Any

from lowbit.ir.build import cast, contract, param
from lowbit.ir.dtypes import is_float
from lowbit.ir.expr import Expr
from lowbit.ir.walk import params, substitute
from lowbit.quant_type import QuantType


def product_term(m: int, t: QuantType, dtype: Any) -> Expr:
    """x [m, k] times w, as the formula has it."""
    return contract((param("x", dtype, None, m=m, k=dict(t.dims)["k"]), t.decode), ("k",))


def kernel_term(m: int, t: QuantType, dtype: Any) -> Expr:
    """The product as kernels compute it: floats that are stored, and weights, are rounded to x's dtype."""
    floats = [leaf for leaf in params(t.decode).values() if is_float(leaf.dtype)]
    decode = substitute(t.decode, {leaf: cast(cast(leaf, dtype), leaf.dtype) for leaf in floats})
    return contract((param("x", dtype, None, m=m, k=dict(t.dims)["k"]), cast(decode, dtype)), ("k",))
