"""Two levels of rounding to nearest: the steps of groups are themselves rounded, under one float for many groups.

With `lo = min(w, 0)` and `hi = max(w, 0)` over a group and offsets, the step is (hi - lo) / (2^bits - 1) and the offset
-lo; without, the step takes the weight that is farthest from zero to -2^(bits - 1). Codes are made for the steps and
offsets that are stored.
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
from lowbit.quantizers.quantizer import Fields, expect_format, set_default_quantizer


@dataclass(frozen=True)
class TwoLevelRounding:
    """Round to nearest, the scales too. The default of `k_quant`."""

    def __call__(self, w: jax.Array, fmt: Format) -> Fields:
        expect_format(fmt, "k_quant", self)
        return _rounded(w, fmt)


@partial(jax.jit, static_argnums=1)
def _rounded(w: jax.Array, fmt: Format) -> Fields:
    values, _ = to_groups(w.astype(jnp.float32), group_size(w.shape[1], fmt["group"]))
    top, middle = 2 ** fmt["bits"] - 1, 2 ** (fmt["bits"] - 1)
    if fmt["offset"]:
        lo, hi = jnp.minimum(values.min(-1), 0), jnp.maximum(values.max(-1), 0)
        steps, step = _level("scale", (hi - lo) / top, w.shape[1], fmt)
        offsets, zero = _level("min", -lo, w.shape[1], fmt)
        fields = {**steps, **offsets}
    else:
        fields, step = _level("scale", -_farthest(values) / middle, w.shape[1], fmt)
        zero = step * middle
    codes = jnp.round((values + zero[..., None]) / jnp.where(step == 0, 1, step)[..., None]).clip(0, top)
    return {"planes": code_planes(codes.astype(jnp.uint8), fmt["bits"]), **fields}


def _level(name: str, each: jax.Array, k: int, fmt: Format) -> tuple[Fields, jax.Array]:
    """How floats [n, g], one a group, are stored, and what they are then."""
    dtype, bits = numpy_dtype(short(fmt["scale_dtype"])), fmt["scale_bits"]
    if bits == 0:
        stored = jnp.where(each == 0, 1 if name == "scale" else 0, each).astype(dtype)
        return {name: stored}, stored.astype(jnp.float32)
    (n, g), per = each.shape, fmt["super_group"] // fmt["group"]
    groups = jnp.pad(each, ((0, 0), (0, -g % per))).reshape(n, -1, per)
    middle = 0 if fmt["offset"] else 2 ** (bits - 1)
    unit = _farthest(groups) / (-middle or 2**bits - 1)
    stored = jnp.where(unit == 0, 1, unit).astype(dtype)
    wide = stored.astype(jnp.float32)[..., None]
    codes = jnp.round(groups / jnp.where(wide == 0, 1, wide) + middle).clip(0, 2**bits - 1)
    integers = codes.reshape(n, -1)[:, :g].astype(jnp.uint8)
    return {name: stored, f"group_{name}": integers}, (wide * (codes - middle)).reshape(n, -1)[:, :g]


def _farthest(values: jax.Array) -> jax.Array:
    """The entry of the largest magnitude along the last axis, with its sign."""
    return jnp.take_along_axis(values, jnp.abs(values).argmax(-1, keepdims=True), -1)[..., 0]


set_default_quantizer("k_quant", TwoLevelRounding())
