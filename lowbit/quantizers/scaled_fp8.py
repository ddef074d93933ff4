"""Floats of 8 bits: no search, the nearest float under the scale that takes the largest weight of a block to 448."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from lowbit.formats.format import Format
from lowbit.formats.planes import group_size, groups
from lowbit.formats.row_codes import LARGEST
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.quantizers.quantizer import Fields, expect_format, set_default_quantizer


@dataclass(frozen=True)
class RoundToE4m3:
    """Each weight over scale = max |w| / 448 of its block, rounded to the nearest e4m3. The default of `scaled_fp8`."""

    def __call__(self, w: jax.Array, fmt: Format) -> Fields:
        expect_format(fmt, "scaled_fp8", self)
        return _rounded(w, fmt)


@partial(jax.jit, static_argnums=1)
def _rounded(w: jax.Array, fmt: Format) -> Fields:
    n, k = w.shape
    sizes = group_size(n, fmt["rows"]), group_size(k, fmt["group"])
    counts = a, g = groups(n, fmt["rows"]), groups(k, fmt["group"])
    padding = [(0, count * size - whole) for count, size, whole in zip(counts, sizes, (n, k), strict=True)]
    blocks = jnp.pad(w.astype(jnp.float32), padding).reshape(a, sizes[0], g, sizes[1])
    largest = jnp.abs(blocks).max(axis=(1, 3), keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST).astype(numpy_dtype(short(fmt["scale_dtype"])))
    divisor = jnp.where(scale == 0, 1.0, scale.astype(jnp.float32))  # one that underflows is refused by its array
    codes = jnp.clip(blocks / divisor, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
    code = jax.lax.bitcast_convert_type(codes, jnp.uint8).reshape(a * sizes[0], g * sizes[1])[:n, :k]
    return {"code": code, "scale": scale.reshape([count for count in counts if count > 1])}


set_default_quantizer("scaled_fp8", RoundToE4m3())
