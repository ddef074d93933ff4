"""Nested floats: a float16 in two bytes, of which the first alone is the same weight as an 8-bit float.

With the bits s e4 e3 e2 e1 e0 m9 ... m0 of a half below 2, so that e4 = 0:

    lower = m7 ... m0,   upper = round(s e3 e2 e1 e0 m9 m8 m7 . m6 ... m0)

rounded to nearest even; but [1.75, 1.875) is never rounded up, where e4m3 has its NaN. So the upper byte is the e4m3
nearest to 256 w, and m7, which both bytes have, tells whether it was rounded up. NestedFP (NeurIPS 2025).
"""

from __future__ import annotations

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.formats.format import register_format
from lowbit.formats.row_codes import e4m3_rows
from lowbit.ir.build import const, contract, param
from lowbit.ir.call import CallSpec, register_call
from lowbit.ir.dims import DimError
from lowbit.ir.expr import Bitcast, Call, Expr
from lowbit.ir.typing import Type
from lowbit.kernels.alu import AND, AND_OR, OR, Alu, Register

WIDTHS = (8, 16)
LARGEST = 1.75
"""The largest magnitude that both readings have: 256 times it is the largest e4m3."""
REBUILD = "rebuild_f16"


def _activations(x: Expr, width: int) -> Expr:
    return e4m3_rows(x) if width == 8 else x


@register_format("nested_fp", views=("width", lambda **_: WIDTHS), activations=_activations)
def nested_fp(n: int, k: int, width: int = 16) -> Expr:
    """Nested floats: two bytes a weight that are read as float16, exactly, or the first of them alone as e4m3.

    At width 16 a product has the weights that were stored, bit for bit. At width 8 it reads `upper` only, the e4m3
    nearest to 256 w, and rounds its activations to e4m3 too, each row under a scale of its own that takes its largest
    entry to 448; their gradients go straight through that rounding. `fmt.at(8)`, `type.at(8)`,
    `lb.matmul(..., width=8)` and `lb.at_width(model, 8)` choose the width.

    Stored: `upper` u8 [n, k], `lower` u8 [n, k]: 16 bits a weight, no scales. Weights are at most 1.75 in magnitude:
    `lb.quantize` leaves a layer with a larger one dense, and says so. `upper` is never 0x7F or 0xFF, the NaNs of e4m3.

    Args:
      width: that of this reading, 8 or 16.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.array([[0.1], [-0.546875]], "float16"), lb.nested_fp())
    >>> [hex(byte) for byte in w.fields["upper"][0].tolist()]
    ['0x5d', '0xf1']
    >>> lb.dequantize(w)[:, 0].tolist(), lb.dequantize(lb.QuantArray(w.fields, w.type.at(8)))[:, 0].tolist()
    ([0.0999755859375, -0.546875], [0.1015625, -0.5625])
    """
    if type(width) is not int or width not in WIDTHS:
        raise ValueError(f"width must be 8 or 16, not {width!r}")
    upper = param("upper", "u8", n=n, k=k)
    if width == 8:
        return contract((Bitcast(upper, "e4m3"), const(2.0**-8, "f32")), ())
    return Call(REBUILD, (upper, param("lower", "u8", n=n, k=k)))


@jax.jit
def split_bytes(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper and lower byte, uint8, of float16 weights. From 1.875 on `upper` is a NaN; from 1.9375 on, no bytes are
    right."""
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16)
    kept, dropped = bits >> 8 & 0x80 | bits >> 7 & 0x7F, bits & 0x7F
    up = (dropped + (bits >> 7 & 1) > 64) & (kept & 0x7F != 0x7E)
    return (kept + up).astype(jnp.uint8), bits.astype(jnp.uint8)


def _rebuilt_type(upper: Type, lower: Type) -> Type:
    if upper.dtype != "u8" or lower.dtype != "u8" or list(upper.dims.items()) != list(lower.dims.items()):
        raise DimError(f"{REBUILD} of {upper} and {lower}: give two arrays of bytes of the same dims in the same order")
    return Type(upper.dims, "f16", None)


def _rebuilt(upper: Any, lower: Any) -> Any:
    """Whether it was rounded or not, (upper - m7) >> 1 has the bits above m7: if m7 = 0 the byte was even before."""
    high = upper & 0x80 | (upper - (lower >> 7)) >> 1 & 0x3F
    return high.astype(np.uint16) << 8 | lower


def _rebuilt_in_lanes(alu: Alu, upper: Register, lower: Register) -> list[Register]:
    """Four at a time. With the signs' bits set no byte borrows from the next."""
    ones = alu.lop3(alu.mul_shr(lower, 7), 0x01010101, 0, AND)
    magnitudes = alu.mul_shr(alu.sub(alu.lop3(upper, 0x80808080, 0, OR), ones), 1)
    high = alu.lop3(magnitudes, 0x3F3F3F3F, alu.lop3(upper, 0x80808080, 0, AND), AND_OR)
    return [alu.prmt(lower, high, 0x5140), alu.prmt(lower, high, 0x7362)]


register_call(
    REBUILD,
    CallSpec(
        type=_rebuilt_type,
        oracle=lambda upper, lower: _rebuilt(upper, lower).view(np.float16),
        operations=lambda upper, _: 7 * prod(upper.dims.values()),
        xla=lambda upper, lower: jax.lax.bitcast_convert_type(_rebuilt(upper, lower), jnp.float16),
        bound=lambda upper, *_: np.zeros(upper.shape),
        elementwise=True,
        lanes=_rebuilt_in_lanes,
    ),
)
