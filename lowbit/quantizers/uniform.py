"""Uniform quantization by rounding to nearest: `w ~ s (Q - z)`, and its exact rewriting as binary coding.

With `lo = min(w, 0)` and `hi = max(w, 0)` over a group,

    s = (hi - lo) / (2^q - 1),   z = round(-lo / s),   Q = clip(round(w / s) + z, 0, 2^q - 1).

With `Q = sum_p 2^p bit_p` and `bit_p = (b_p + 1) / 2` this is `alpha_p = s 2^p / 2` and `beta = s ((2^q - 1) / 2 - z)`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lowbit.formats.planes import check_bits
from lowbit.quantizers.binary import BinaryCode
from lowbit.quantizers.groups import check_rows


class UniformCode(NamedTuple):
    """R groups of g weights, each `scale * (codes - zero)`.

    Attributes:
      codes: uint8 `[R, g]`, from 0 to `2^bits - 1`.
      scale: float32 `[R]`, positive and never zero.
      zero: uint8 `[R]`, the code that decodes to 0, from 0 to `2^bits - 1`.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array


@partial(jax.jit, static_argnames="bits")
def rtn(values: jax.Array, bits: int, mask: jax.Array | None = None) -> UniformCode:
    """Rounds each group to `2^bits` evenly spaced levels that include zero.

    A group of zeros (or of values too small for a normal float32 scale) takes the range -1 to 1 and decodes to zeros.

    Args:
      values: floating `[R, g]`, finite; one group a row.
      bits: 1 to 8.
      mask: bool `[P, g]` with P dividing R; row r uses `mask[r % P]`. False entries do not widen the range.

    Raises:
      ValueError: a shape or `bits` is out of range.
      TypeError: `values` is not floating point.

    >>> code = rtn(jnp.array([[-1.0, 0.0, 0.5, 2.0]]), 2)
    >>> code.codes.tolist(), code.scale.tolist(), code.zero.tolist()
    ([[0, 1, 1, 3]], [1.0], [1])
    """
    check_rows(values, bits, mask)
    top = 2**bits - 1
    w = values.astype(jnp.float32)
    if mask is not None:
        periods = w.reshape(-1, *mask.shape)
        w = jnp.where(mask.astype(bool)[None], periods, 0.0).reshape(w.shape)
    lo, hi = jnp.minimum(w.min(axis=1), 0.0), jnp.maximum(w.max(axis=1), 0.0)
    scale = (hi - lo) / top
    degenerate = scale < jnp.finfo(jnp.float32).tiny
    scale, lo = jnp.where(degenerate, 2.0 / top, scale), jnp.where(degenerate, -1.0, lo)
    zero = jnp.clip(jnp.round(-lo / scale), 0, top)
    codes = jnp.clip(jnp.round(w / scale[:, None]) + zero[:, None], 0, top)
    return UniformCode(codes.astype(jnp.uint8), scale, zero.astype(jnp.uint8))


def decode(code: UniformCode) -> jax.Array:
    """The float32 `[R, g]` weights that `code` stands for."""
    steps = code.codes.astype(jnp.float32) - code.zero.astype(jnp.float32)[:, None]
    return code.scale[:, None] * steps


def to_binary(code: UniformCode, bits: int) -> BinaryCode:
    """Rewrites `code`, made with the same `bits`, as binary coding with an offset.

    Plane p is bit p of the codes, so `alpha` *ascends*, unlike a solved code's. The identity is exact over the reals.
    In float32 `alpha` is exact too, `beta` is rounded once, and the decoded weights agree to a few units in the last
    place of the largest level; they agree bit for bit if `scale` has at most 15 significant bits, as every float16 or
    bfloat16 has.

    >>> from lowbit.quantizers import binary
    >>> code = rtn(jnp.array([[-1.0, 0.0, 0.5, 2.0]]), 2)
    >>> binary.decode(to_binary(code, 2)).tolist() == decode(code).tolist()
    True
    """
    check_bits(bits)
    planes = jnp.arange(bits, dtype=jnp.uint8)
    halves = jnp.array([2.0 ** (p - 1) for p in range(bits)], jnp.float32)
    beta = code.scale * ((2**bits - 1) / 2 - code.zero.astype(jnp.float32))
    planes_of = (code.codes[:, None, :] >> planes[None, :, None]) & jnp.uint8(1)
    return BinaryCode(code.scale[:, None] * halves[None], beta, planes_of)
