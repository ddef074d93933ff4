"""Binary coding: `w ~ sum_p alpha_p b_p (+ beta)` with `b_p` in {-1, +1}, one set of alphas to a group of g weights.

The `2^q` levels of a group are the sums `+-alpha_1 ... +-alpha_q + beta`. A solver alternates two steps that each lower
the squared error: least squares for the alphas given the signs, and the nearest level for each weight given the alphas.

Neither step looks at single weights here. Levels are monotone in the weight, so over the *sorted* group the signs are
constant on `2^q` intervals, and least squares needs only the number and the sum of the weights in each: differences of
prefix sums. A group is sorted once; after that a round costs `2^q log g` steps, not `g 2^q`.

The greedy start and the rounds are LUT-GEMM's (Park et al., ICLR 2024), the alternation goes back to Xu et al. (ICLR
2018), and the learned offset is AnyBCQ's.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.quantizers.groups import check_rounds, check_rows, in_blocks

# Relative to the diagonal of the normal equations. Large against float32 rounding, so that equal planes stay solvable.
_RIDGE = 1e-6


class BinaryCode(NamedTuple):
    """R groups of g weights, each `sum_p alpha[p] * (2 bits[p] - 1) + beta`.

    Attributes:
      alpha: float32 `[R, bits]`, nonnegative; descending if solved, ascending if it comes from a uniform code.
      beta: float32 `[R]`, or None without an offset.
      bits: uint8 `[R, bits, g]`, 1 for +1 and 0 for -1.
    """

    alpha: jax.Array
    beta: jax.Array | None
    bits: jax.Array


class Group(NamedTuple):
    """One sorted group: `values`, `f [g]` (or a scalar), and the prefix sums `mass`, `first [g + 1]` of f and f w."""

    values: jax.Array
    f: jax.Array
    mass: jax.Array
    first: jax.Array


class Fit(NamedTuple):
    """`theta` (the alphas, then the offset if learned), and mass, weighted sum and sign pattern of its intervals."""

    theta: jax.Array
    mass: jax.Array
    first: jax.Array
    pattern: jax.Array


def solve(
    values: jax.Array, bits: int, *, rounds: int = 15, offset: bool = False, importance: jax.Array | None = None
) -> BinaryCode:
    """Finds scales and signs of small squared error for each group, `sum_k f_k (w_k - decoded_k)^2`.

    Args:
      values: floating `[R, g]`, finite; one group a row. Computed in float32.
      bits: planes, 1 to 8.
      rounds: 0 is greedy, 1 refined greedy, 2 and more alternating. The best round is kept, so more never hurts.
      offset: also learn `beta`, starting from the mean.
      importance: f, nonnegative `[P, g]` with P dividing R; row r uses `importance[r % P]`. The mask of
        `to_groups` fits as it is; leave it out where no group is ragged, which sorts faster.

    A group of zeros decodes to zeros, and with an offset a constant group decodes to its constant exactly.

    Raises:
      ValueError: a shape, `bits` or `rounds` is out of range.
      TypeError: `values` is not floating point.

    >>> code = solve(jnp.array([[-3.0, -1.0, 1.0, 3.0]]), 2)
    >>> [round(float(alpha), 3) for alpha in code.alpha[0]], code.bits[0].tolist()
    ([2.0, 1.0], [[0, 0, 1, 1], [0, 1, 0, 1]])
    """
    check_rows(values, bits, importance)
    check_rounds(rounds)
    return in_blocks(lambda w, f: _solve_block(w, f, bits, rounds, offset), values, importance, 2**bits)


def decode(code: BinaryCode) -> jax.Array:
    """The float32 `[R, g]` weights that `code` stands for."""
    decoded = jnp.zeros((code.bits.shape[0], code.bits.shape[2]), jnp.float32)
    for p in range(code.bits.shape[1]):
        alpha = code.alpha[:, p, None]
        decoded += jnp.where(code.bits[:, p] == 1, alpha, -alpha)
    return decoded if code.beta is None else decoded + code.beta[:, None]


@partial(jax.jit, static_argnums=(2, 3, 4))
def _solve_block(w: jax.Array, f: jax.Array | None, bits: int, rounds: int, offset: bool) -> BinaryCode:
    w, f = w.astype(jnp.float32), None if f is None else f.astype(jnp.float32)
    return jax.vmap(lambda w, f: _solve_row(w, f, bits, rounds, offset))(w, f)


def _solve_row(w: jax.Array, f: jax.Array | None, bits: int, rounds: int, offset: bool) -> BinaryCode:
    w, weights, center, scale = normalize(w, f, offset)
    if rounds == 0 or (bits == 1 and not offset):  # one plane alone: greedy is the exact minimum
        alphas, pattern = greedy(w, weights, bits)
        theta = jnp.concatenate([alphas, jnp.zeros(int(offset), jnp.float32)])
    else:
        theta = alternate(sort(w, weights), bits, rounds, offset)
        levels, patterns = levels_of(theta, bits)
        # A weight half way between two levels goes right, as in `_assign`.
        pattern = patterns[jnp.searchsorted((levels[1:] + levels[:-1]) / 2, w, side="right")]
    order = jnp.argsort(-theta[:bits])
    beta = center + theta[bits] * scale if offset else None
    return BinaryCode(theta[order] * scale, beta, planes_of(pattern, bits)[order].astype(jnp.uint8))


def normalize(w: jax.Array, f: jax.Array | None, offset: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Moves the mean to 0 if there is an offset, the largest magnitude into [1, 2) and the total importance to 1.

    Squares and products of tiny or huge weights then stay in range, and the ridge means the same to every group.
    """
    if f is None:
        weights, counts = jnp.full((), 1 / w.size, jnp.float32), jnp.ones_like(w, bool)
    else:
        total, counts = f.sum(), f > 0
        weights = f / jnp.where(total > 0, total, 1.0)
    w = jnp.where(counts, w, 0.0)
    center = jnp.zeros((), jnp.float32)
    if offset:
        # Rounding may push the mean of equal weights past them; the clip brings it back exactly.
        center = jnp.clip(
            (w * weights).sum(), w.min(where=counts, initial=jnp.inf), w.max(where=counts, initial=-jnp.inf)
        )
        center = jnp.where(counts.any(), center, 0.0)
        w = jnp.where(counts, w - center, 0.0)
    # A power of two divides without rounding: keep the exponent bits of the largest magnitude, at most 2^126, for the
    # division may become a product with the reciprocal, and that of 2^127 is flushed to zero.
    exponent = lax.bitcast_convert_type(jnp.abs(w).max(), jnp.int32) & jnp.int32(0x7F800000)
    exponent = jnp.minimum(exponent, jnp.int32(0x7E800000))
    scale = lax.bitcast_convert_type(exponent, jnp.float32)
    scale = jnp.where(scale > 0, scale, 1.0)
    return w / scale, weights, center, scale


def sort(w: jax.Array, f: jax.Array) -> Group:
    def prefix(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(x)])

    if f.ndim:
        w, f = lax.sort((w, f), num_keys=1)
        return Group(w, f, prefix(f), prefix(f * w))
    # XLA sorts integers several times faster than floats on a CPU. Flipping the low bits of negative floats makes the
    # integer order theirs, and flipping again undoes it.
    key = lax.bitcast_convert_type(w, jnp.int32)
    key = jnp.sort(key ^ ((key >> 31) & jnp.int32(0x7FFFFFFF)))
    w = lax.bitcast_convert_type(key ^ ((key >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32)
    return Group(w, f, jnp.arange(w.size + 1, dtype=jnp.float32) * f, prefix(w) * f)


def between(group: Group, cuts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mass and weighted sum of the sorted weights before, between and after the cuts."""
    ends = jnp.array([0, group.values.size], cuts.dtype)
    edges = jnp.concatenate([ends[:1], cuts, ends[1:]])
    return jnp.diff(group.mass[edges]), jnp.diff(group.first[edges])


def planes_of(pattern: jax.Array, bits: int) -> jax.Array:
    """`[bits, ...]` of 0 and 1. The first plane is the top bit, so greedy patterns ascend with the weight."""
    return jnp.stack([(pattern >> (bits - 1 - p)) & 1 for p in range(bits)])


def signs_of(pattern: jax.Array, bits: int) -> jax.Array:
    return (2 * planes_of(pattern, bits) - 1).astype(jnp.float32)


def greedy(w: jax.Array, f: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Each plane takes the sign of what is left and the mean of its magnitude: alphas, and every weight's pattern."""
    alphas, pattern = [], jnp.zeros(w.shape, jnp.int32)
    for _ in range(bits):
        up = w >= 0  # not `sign`: 0 is +1
        alphas.append((jnp.abs(w) * f).sum())
        pattern = 2 * pattern + up.astype(jnp.int32)
        w = w - jnp.where(up, alphas[-1], -alphas[-1])
    return jnp.stack(alphas), pattern


def least_squares(fit: Fit, bits: int) -> jax.Array:
    """The best `theta` for the signs of `fit`, from the normal equations with a ridge.

    The ridge penalises the *change* of theta, so it biases nothing and the error cannot rise even if planes are equal.
    """
    signs = signs_of(fit.pattern, bits)
    if fit.theta.size > bits:
        signs = jnp.concatenate([signs, jnp.ones((1, fit.mass.size), jnp.float32)])
    normal = jnp.matmul(signs * fit.mass[None], signs.T, precision=lax.Precision.HIGHEST)
    slope = (signs * fit.first[None]).sum(axis=1) - (normal * fit.theta[None]).sum(axis=1)
    system = jnp.concatenate([normal + _RIDGE * jnp.eye(fit.theta.size, dtype=jnp.float32), slope[:, None]], axis=1)

    def eliminate(k: jax.Array, system: jax.Array) -> jax.Array:
        # Positive definite, so no pivoting; exact pivots are at least the ridge, and rounding must not take them lower.
        row = system[k] / jnp.maximum(system[k, k], _RIDGE)
        return (system - system[:, k, None] * row[None]).at[k].set(row)

    return fit.theta + lax.fori_loop(0, fit.theta.size, eliminate, system)[:, -1]


def levels_of(theta: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The `2^bits` levels of `theta` in ascending order, and the sign pattern of each."""
    pattern = jnp.arange(2**bits, dtype=jnp.int32)
    levels = (signs_of(pattern, bits) * theta[:bits, None]).sum(axis=0)
    levels, pattern = lax.sort((levels, pattern), num_keys=1)
    return (levels + theta[bits] if theta.size > bits else levels), pattern


def _assign(group: Group, theta: jax.Array, bits: int) -> tuple[Fit, jax.Array]:
    """Sends every weight to its nearest level; also the squared error, less the constant `sum f w^2`."""
    theta = jnp.concatenate([-jnp.sort(-jnp.abs(theta[:bits])), theta[bits:]])
    levels, pattern = levels_of(theta, bits)
    mass, first = between(group, jnp.searchsorted(group.values, (levels[1:] + levels[:-1]) / 2))
    return Fit(theta, mass, first, pattern), (levels * (levels * mass - 2 * first)).sum()


def alternate(group: Group, bits: int, rounds: int, offset: bool) -> jax.Array:
    alphas, ascending = greedy(group.values, group.f, bits)
    theta = jnp.concatenate([alphas, jnp.zeros(int(offset), jnp.float32)])
    every = jnp.arange(2**bits, dtype=jnp.int32)
    # The first least squares takes the signs of the greedy start, which need not be those of the nearest levels.
    start = Fit(theta, *between(group, jnp.searchsorted(ascending, every[1:])), every)
    fit, error = _assign(group, theta, bits)

    def step(_: jax.Array, state: tuple[Fit, jax.Array, jax.Array]) -> tuple[Fit, jax.Array, jax.Array]:
        fit, best, lowest = state
        fit, error = _assign(group, least_squares(fit, bits), bits)
        return fit, jnp.where(error < lowest, fit.theta, best), jnp.minimum(error, lowest)

    best: jax.Array = lax.fori_loop(0, rounds, step, (start, fit.theta, error))[1]
    return best
