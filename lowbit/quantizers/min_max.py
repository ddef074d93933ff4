"""Evenly spaced levels from the smallest to the largest entry of a group, whether zero is among them or not.

scale = (max - min) / (2^bits - 1) and code = clip(round((w - min) / scale), 0, 2^bits - 1), as KIVI stores keys and
values (Liu et al., ICML 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from lowbit.formats.format import Format
from lowbit.formats.planes import code_planes, group_size
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.quantizers.groups import to_groups
from lowbit.quantizers.quantizer import Fields, expect_format


@dataclass(frozen=True)
class MinMax:
    """A float scale and minimum a group, for `k_quant` with `scale_bits=0`.

    Codes are made for the scale and minimum that are stored, so an error is at most half a step, and where those were
    rounded the cut at either end: |w - decoded| <= scale / 2 + u (2 |min| + |max|) for the unit roundoff u of
    `scale_dtype`. A group of one value, or of values closer than the smallest scale, decodes to its minimum. A group
    with NaN or inf decodes to NaN.

    Raises TypeError for another format, ValueError for integer scales or one without offsets.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> fmt = lb.k_quant(2, group=4, super_group=4, scale_bits=0)
    >>> w = lb.quantize_array(jnp.array([[5.0], [6.0], [7.0], [8.0]]), fmt, lb.quantizers.MinMax())
    >>> lb.dequantize(w)[:, 0].tolist()
    [5.0, 6.0, 7.0, 8.0]
    """

    def __call__(self, w: jax.Array, fmt: Format) -> Fields:
        expect_format(fmt, "k_quant", self)
        if fmt["scale_bits"] or not fmt["offset"]:
            raise ValueError(
                f"{self} makes a float scale and minimum a group: use k_quant(..., scale_bits=0), not {fmt}"
            )
        return _rounded(w, fmt)


@partial(jax.jit, static_argnums=1)
def _rounded(w: jax.Array, fmt: Format) -> Fields:
    values, mask = to_groups(w.astype(jnp.float32), group_size(w.shape[1], fmt["group"]))
    mask, top, dtype = mask[None], 2 ** fmt["bits"] - 1, numpy_dtype(short(fmt["scale_dtype"]))
    lo = jnp.where(mask, values, jnp.inf).min(-1)
    hi = jnp.where(mask, values, -jnp.inf).max(-1)
    scale, offset = ((hi - lo) / top).astype(dtype), (-lo).astype(dtype)
    step = jnp.where(scale == 0, jnp.inf, scale.astype(jnp.float32))  # then every code is 0
    codes = jnp.round((values + offset.astype(jnp.float32)[..., None]) / step[..., None]).clip(0, top)
    planes = code_planes(jnp.where(mask, codes, 0).astype(jnp.uint8), fmt["bits"])
    return {"planes": planes, "scale": scale, "min": offset}
