"""Products as terms: what results are compared with, and what their bounds are derived from."""

from __future__ import annotations

from typing import Any

from lowbit.ir.build import cast, contract, param
from lowbit.ir.dtypes import is_float, short
from lowbit.ir.expr import Expr
from lowbit.ir.oracle import Array, evaluate
from lowbit.ir.walk import params, substitute
from lowbit.passes.pipeline import PIPELINES, run
from lowbit.quant_type import QuantType


def product_term(m: int, t: QuantType, dtype: Any, plain: bool = False) -> Expr:
    """x [m, k] times w, as the formula has it; if `plain`, of x as it is, also where the format encodes activations."""
    x = param("x", dtype, None, m=m, k=dict(t.dims)["k"])
    return contract((x, t.decode), ("k",)) if plain else t.product(x)


def encoded(x: Array, t: QuantType) -> Array:
    """What the product multiplies with in place of x [m, k], by the oracle."""
    e = t.activations(param("x", short(x.dtype), None, m=x.shape[0], k=x.shape[1]))
    return evaluate(e, {"x": x}).transpose([list(e.dims).index(d) for d in ("m", "k")])


def kernel_term(m: int, t: QuantType, dtype: Any, kernel: str = "mma") -> Expr:
    """The product as kernels compute it: floats that are stored, and weights, are rounded to x's dtype; but as the
    formula has it where the format encodes activations. By `sums`, all is in float32, and of the form `table`."""
    x = param("x", dtype, None, m=m, k=dict(t.dims)["k"])
    if t.activations(x) is not x:
        return product_term(m, t, dtype)
    if kernel == "sums":
        floats = [leaf for leaf in params(t.decode).values() if is_float(leaf.dtype)]
        decode = substitute(t.decode, {leaf: cast(leaf, "f32") for leaf in floats})
        return run(contract((cast(x, "f32"), decode), ("k",)), PIPELINES["table"])
    return contract((x, _decoded(t, dtype)), ("k",))


def kernel_dx_term(m: int, t: QuantType, dtype: Any) -> Expr:
    """The gradient of x from dy [m, n] as kernels compute it, likewise."""
    return contract((param("dy", dtype, None, m=m, n=dict(t.dims)["n"]), _decoded(t, dtype)), ("n",))


def _decoded(t: QuantType, dtype: Any) -> Expr:
    floats = [leaf for leaf in params(t.decode).values() if is_float(leaf.dtype)]
    return cast(substitute(t.decode, {leaf: cast(cast(leaf, dtype), leaf.dtype) for leaf in floats}), dtype)
