"""Floats of 8 bits under scales: w = scale e4m3(code)."""

from __future__ import annotations

from lowbit.formats.format import register_format
from lowbit.formats.planes import group_size, groups, scale_type
from lowbit.ir.build import broadcast, merge, param, slice_
from lowbit.ir.expr import Bitcast, Expr


@register_format("scaled_fp8")
def scaled_fp8(n: int, k: int, rows: int | None = 1, group: int | None = None, scale_dtype: str = "float32") -> Expr:
    """Floats of 8 bits, e4m3, and a scale for each block of `rows` outputs and `group` inputs.

    `scaled_fp8()` has a scale a row, `scaled_fp8(rows=None)` one for the whole weight, and `scaled_fp8(128, 128)` one
    for each block of 128 x 128. Products multiply activations as they are; those of `nested_fp` round them too.

    Stored: `code` u8 [n, k], the bits of the floats, never 0x7F or 0xFF, their NaNs; `scale` [ceil(n / rows),
    ceil(k / group)], without the dims that have one block. 8 bits a weight and the scales.

    Args:
      rows: outputs that share a scale, any positive size; None for all.
      group: inputs that share a scale, any positive size; None for all.
      scale_dtype: "float32", "float16" or "bfloat16"; see `bcq`.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.array([[1.0], [-0.3], [7.0]]), lb.scaled_fp8())
    >>> w.fields["scale"].tolist(), w.fields["code"].tolist()
    ([0.015625], [[104, 218, 126]])
    >>> lb.dequantize(w)[:, 0].tolist()
    [1.0, -0.3125, 7.0]
    """
    if rows is not None and (type(rows) is not int or rows < 1):
        raise ValueError(f"rows must be a positive int, or None for all outputs, not {rows!r}")
    each = group_size(n, rows)
    blocks = {"n" if each == 1 else "a": groups(n, rows), "g": groups(k, group)}
    scale: Expr = param("scale", scale_type(scale_dtype), None, **{d: size for d, size in blocks.items() if size > 1})
    scale = _spread(_spread(scale, "a", "n", each, n), "g", "k", group_size(k, group), k)
    return scale * Bitcast(param("code", "u8", n=n, k=k), "e4m3")


def _spread(scale: Expr, dim: str, into: str, size: int, total: int) -> Expr:
    """The scale of a block of `size` for each of `total`; itself without that dim."""
    if dim not in scale.dims:
        return scale
    each = broadcast(scale, {**scale.dims, "t": size})
    return slice_(merge(each, dim, "t", into=into), into, 0, total)
