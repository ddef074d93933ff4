"""GPTQ: rounding input by input, each error made up for by the inputs to come (Frantar et al., ICLR 2023).

With D the error of the weight [n, k] and H = E[x x^T] [k, k], the expected squared error of the layer's output is
tr(D H D^T). Once input i is rounded, with an error d, the best change of the others is -d U[i, j] / U[i, i] for all
later j, where U is upper triangular and U^T U = H^-1. The rows of the weight do not depend on each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.formats.format import Format
from lowbit.formats.planes import code_planes, group_size
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.quantizers.chunks import by_chunk
from lowbit.quantizers.groups import to_groups
from lowbit.quantizers.quantizer import Fields, expect_format
from lowbit.quantizers.uniform import rtn

BLOCK = 128
"""Inputs that are rounded before the rest hears of their errors: one product instead of many small ones."""


@dataclass(frozen=True)
class Gptq:
    """Rounding with error feedback. Make one with `lb.gptq`."""

    act_order: bool = True
    damping: float = 0.01
    weighs_by: tuple[str, ...] = field(default=("gram",), repr=False)
    takes_gram: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise ValueError(f"damping is a share of the mean second moment, above 0 and below 1, not {self.damping!r}")

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; `importance` [k, k] or, for chunks of the outputs, [c, k, k]; else the identity."""
        expect_format(fmt, "uniform", self)
        n, k = w.shape
        group = group_size(k, fmt["group"])
        values, mask = to_groups(w.astype(jnp.float32), group)
        start = rtn(values.reshape(-1, group), fmt["bits"], mask)
        scale = start.scale.reshape(n, -1).astype(numpy_dtype(short(fmt["scale_dtype"])))
        zero = start.zero.reshape(n, -1)
        gram = jnp.eye(k) if importance is None else importance
        solve = partial(_solve, group, 2 ** fmt["bits"] - 1, self.act_order, self.damping)
        codes = by_chunk(solve, gram, w.astype(jnp.float32), scale.astype(jnp.float32), zero.astype(jnp.float32))
        padded = jnp.pad(codes, ((0, 0), (0, values.shape[1] * group - k))).reshape(values.shape)
        return {"planes": code_planes(padded, fmt["bits"]), "scale": scale, "zero": zero}


def gptq(act_order: bool = True, damping: float = 0.01, weighs_by: tuple[str, ...] = ("gram",)) -> Gptq:
    """GPTQ for `uniform`: the error of the layer's output, not of its weight, is small.

    Scales and zero points are those of `lb.round_to_nearest`, found before anything is rounded; so groups stay those
    of consecutive inputs whatever the order of rounding.

    Args:
      act_order: round the inputs with the largest second moments first, while most others can still make up for it.
      damping: this share of the mean second moment is added to each, so that the matrix can be inverted. 0.01 is that
        of the publication; 1e-4 is added whatever it is, and more, with a logged warning, to a matrix that is not
        positive definite then.
      weighs_by: ("gram",), the mean products of each two inputs, or ("guided_gram",), the same weighed by what errors
        of the outputs cost the loss (GuidedQuant). `lb.calibrate(..., rules=)` with this quantizer measures it.

    The importance that `lb.quantize_array` hands on is that matrix [k, k]; without it this is rounding to nearest.

    >>> import jax, lowbit as lb
    >>> x = jax.random.normal(jax.random.key(0), (256, 1)) + 0.1 * jax.random.normal(jax.random.key(1), (256, 32))
    >>> w, fmt = jax.random.normal(jax.random.key(2), (32, 64)), lb.uniform(3, group=16)
    >>> nearest = lb.quantize_array(w, fmt)
    >>> for_these = lb.quantize_array(w, fmt, lb.gptq(), importance=x.T @ x / 256)
    >>> bool((x @ (lb.dequantize(for_these) - w)).std() < 0.5 * (x @ (lb.dequantize(nearest) - w)).std())
    True
    """
    return Gptq(act_order, damping, weighs_by)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    group: int, top: int, act_order: bool, damping: float,
    gram: jax.Array, w: jax.Array, scale: jax.Array, zero: jax.Array,
) -> jax.Array:  # fmt: skip
    """Codes uint8 of w [n, k], with scales and zero points [n, g]."""
    k = w.shape[1]
    moments = gram.diagonal()
    order = jnp.argsort(-moments) if act_order else jnp.arange(k)
    factor = _factor(gram[order][:, order] + damping * moments.mean() * jnp.eye(k))
    more = -k % BLOCK
    factor = jnp.pad(factor, (0, more)) + jnp.diag(jnp.pad(jnp.zeros(k), (0, more), constant_values=1.0))
    columns = jnp.pad(order, (0, more))

    def block(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest, codes = state
        at = lax.dynamic_slice_in_dim(columns, b * BLOCK, BLOCK)
        own = lax.dynamic_slice_in_dim(factor, b * BLOCK, BLOCK)
        within = lax.dynamic_slice_in_dim(own, b * BLOCK, BLOCK, 1)
        start = lax.dynamic_slice_in_dim(rest, b * BLOCK, BLOCK)
        made, errors = _round(top, within, start, scale.T[at // group], zero.T[at // group])
        rest = rest - jnp.matmul(own.T, errors, precision=lax.Precision.HIGHEST)
        return rest, lax.dynamic_update_slice_in_dim(codes, made, b * BLOCK, 0)

    start = jnp.pad(w.T[order], ((0, more), (0, 0)))
    _, codes = lax.fori_loop(0, (k + more) // BLOCK, block, (start, jnp.zeros(start.shape, jnp.uint8)))
    return codes[jnp.argsort(order)].T


def _factor(gram: jax.Array) -> jax.Array:
    """U. The Cholesky factor of H with its rows and columns reversed is U^-1, reversed: H is never inverted."""
    reversed_ = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(reversed_, jnp.eye(len(gram)), lower=False)


def _round(top: int, factor: jax.Array, w: jax.Array, scale: jax.Array, zero: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes of a block w [BLOCK, n], and its errors over U's diagonal."""

    def one(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, codes, errors = state
        s, z = scale[i], zero[i]
        steps = jnp.where(s > 0, rest[i] / s, 0.0)  # a scale may underflow where others of the weight do not
        code = jnp.clip(jnp.round(steps) + z, 0, top)
        error = (rest[i] - s * (code - z)) / factor[i, i]
        rest = rest - factor[i][:, None] * error[None]
        return rest, codes.at[i].set(code.astype(jnp.uint8)), errors.at[i].set(error)

    start = w, jnp.zeros(w.shape, jnp.uint8), jnp.zeros_like(w)
    _, codes, errors = lax.fori_loop(0, len(w), one, start)
    return codes, errors
