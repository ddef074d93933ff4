"""Nested binary coding by progressive expansion (AnyBCQ, ICLR 2026): planes are added to those of the least width.

The least width is solved as if it were alone. Each further plane starts with alpha 0 and takes turns of two steps while
the planes before it stay: its signs become those of what the other planes leave, and all alphas of the new width the
least-squares solution for these signs. The first step is the best that the new plane can do beside the alphas before
it, so neither step raises the squared error, and a wider code is never worse than a narrower one.

As in `lowbit.quantizers.binary` no step looks at single weights: in the sorted group a plane cuts each interval of
equal signs in two, at the level that the interval has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.formats.format import Format
from lowbit.quantizers import binary
from lowbit.quantizers.binary import Fit, Group
from lowbit.quantizers.groups import check_rounds, check_rows, in_blocks
from lowbit.quantizers.quantizer import Fields, expect_format, grouped, pack, scale_fields, set_default_quantizer


class NestedCode(NamedTuple):
    """R groups of g weights at the widths lo to hi.

    Attributes:
      alphas: float32 `[R, b]` for each width b.
      betas: float32 `[R]` for each width, or none without an offset.
      bits: uint8 `[R, hi, g]`, 1 for +1 and 0 for -1; width b has the first b.
    """

    alphas: tuple[jax.Array, ...]
    betas: tuple[jax.Array, ...]
    bits: jax.Array


class _Code(NamedTuple):
    """Scales of one sorted group, where it is cut, `[2^b - 1]`, and the sign pattern `[2^b]` between the cuts."""

    theta: jax.Array
    cuts: jax.Array
    pattern: jax.Array


@dataclass(frozen=True)
class ProgressiveSolver:
    """The least width solved alone, then plane after plane. Make one with `lb.progressive`."""

    rounds: int = 15
    weighs_by: tuple[str, ...] = field(default=("second_moment",), repr=False)
    takes_importance: ClassVar[bool] = True

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; with `importance` [k] or [n, k], squared errors count that much, all positive."""
        expect_format(fmt, "any_bcq", self)
        values, weights, shape = grouped(w, fmt, importance)
        code = solve(values, fmt["lo"], fmt["hi"], rounds=self.rounds, offset=fmt["offset"], importance=weights)
        out = {"planes": pack(code.bits, shape)}
        for i, width in enumerate(fmt.widths):
            out |= scale_fields(code.alphas[i], code.betas[i] if code.betas else None, fmt, shape, width)
        return out


def progressive(rounds: int = 15, weighs_by: tuple[str, ...] = ("second_moment",)) -> ProgressiveSolver:
    """Progressive expansion, the default for `any_bcq`: `rounds` rounds for the least width, and for each plane more.

    The least width is that of `lb.alternating(rounds)`, and no wider one has a larger error. Where `lb.quantize` is
    given `stats`, errors are weighed as by `lb.alternating`.

    >>> import jax, lowbit as lb
    >>> w = jax.random.normal(jax.random.key(0), (128, 16))
    >>> q = lb.quantize_array(w, lb.any_bcq(2, 4), lb.progressive())
    >>> error = [float(((lb.dequantize(lb.QuantArray(q.fields, q.type.at(b))) - w) ** 2).mean()) for b in (2, 3, 4)]
    >>> error[0] > 2 * error[1] > 4 * error[2]
    True
    """
    return ProgressiveSolver(rounds, weighs_by)


def solve(
    values: jax.Array,
    lo: int,
    hi: int,
    *,
    rounds: int = 15,
    offset: bool = False,
    importance: jax.Array | None = None,
) -> NestedCode:
    """Scales and shared signs for groups `[R, g]`; arguments as in `lowbit.quantizers.binary.solve`.

    Raises ValueError for rounds below 1: without one a plane would add nothing.
    """
    check_rows(values, hi, importance)
    check_rounds(rounds, 1)
    return in_blocks(lambda w, f: _solve_block(w, f, lo, hi, rounds, offset), values, importance, 2**hi)


@partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _solve_block(w: jax.Array, f: jax.Array | None, lo: int, hi: int, rounds: int, offset: bool) -> NestedCode:
    w, f = w.astype(jnp.float32), None if f is None else f.astype(jnp.float32)
    return jax.vmap(lambda w, f: _solve_row(w, f, lo, hi, rounds, offset))(w, f)


def _solve_row(w: jax.Array, f: jax.Array | None, lo: int, hi: int, rounds: int, offset: bool) -> NestedCode:
    w, weights, center, scale = binary.normalize(w, f, offset)
    group = binary.sort(w, weights)
    codes = [_seed(group, lo, rounds, offset)]
    for bits in range(lo, hi):
        codes.append(_add_plane(group, codes[-1], bits, rounds))
    # Cuts never part equal weights, so where the first of its equals is sorted to tells a weight's interval.
    rank = jnp.searchsorted(group.values, w)
    pattern = codes[-1].pattern[jnp.searchsorted(codes[-1].cuts, rank, side="right")]
    return NestedCode(
        tuple(code.theta[:b] * scale for b, code in enumerate(codes, lo)),
        tuple(center + code.theta[b] * scale for b, code in enumerate(codes, lo) if offset),
        binary.planes_of(pattern, hi).astype(jnp.uint8),
    )


def _seed(group: Group, bits: int, rounds: int, offset: bool) -> _Code:
    """The least width as `binary.solve` finds it."""
    every = jnp.arange(2**bits, dtype=jnp.int32)
    if bits == 1 and not offset:
        theta, ascending = binary.greedy(group.values, group.f, bits)
        return _Code(theta, jnp.searchsorted(ascending, every[1:]), every)
    theta = binary.alternate(group, bits, rounds, offset)
    levels, patterns = binary.levels_of(theta, bits)
    return _Code(theta, jnp.searchsorted(group.values, (levels[1:] + levels[:-1]) / 2), patterns)


def _add_plane(group: Group, code: _Code, bits: int, rounds: int) -> _Code:
    """One plane more than `bits`, after these."""
    signs = binary.signs_of(code.pattern, bits)
    pattern = jnp.stack([2 * code.pattern, 2 * code.pattern + 1], axis=1).reshape(-1)
    ends = jnp.array([0, group.values.size], code.cuts.dtype)
    edges = jnp.concatenate([ends[:1], code.cuts, ends[1:]])

    def cut(theta: jax.Array) -> jax.Array:
        """Where what the planes before leave turns from negative to not."""
        levels = (signs * theta[:bits, None]).sum(axis=0) + theta[bits + 1 :].sum()
        within = jnp.clip(jnp.searchsorted(group.values, levels), edges[:-1], edges[1:])
        return jnp.stack([within, edges[1:]], axis=1).reshape(-1)[:-1]

    def turn(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        theta, cuts = state[0], cut(state[0])
        return binary.least_squares(Fit(theta, *binary.between(group, cuts), pattern), bits + 1), cuts

    theta = jnp.concatenate([code.theta[:bits], jnp.zeros(1, jnp.float32), code.theta[bits:]])
    theta, cuts = lax.fori_loop(0, rounds, turn, (theta, jnp.zeros(2 ** (bits + 1) - 1, edges.dtype)))
    return _Code(theta, cuts, pattern)


set_default_quantizer("any_bcq", ProgressiveSolver())
