"""Binary coding: `w ~ sum_p alpha_p b_p (+ beta)` with `b_p` in {-1, +1}, one set of alphas for each group of g weights.

The `2^q` levels of a group are the sums `+-alpha_1 ... +-alpha_q + beta`. A solver alternates two steps that each lower
the squared error: least squares for the alphas given the signs, and the nearest level for each weight given the alphas.

Neither step looks at single weights here. Levels are monotone in the weight, so over the *sorted* group the signs are
constant on `2^q` intervals, and least squares needs only the number and the sum of the weights in each: differences of
prefix sums. A group is sorted once; after that a round costs `2^q log g` steps, not `g 2^q`.

The greedy start is LUT-GEMM's (Park et al., ICLR 2024), the alternation that of Xu et al. (ICLR 2018), the learned offset
AnyBCQ's.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.quantizers.groups import check_rows

# Relative to the diagonal of the normal equations. Large against float32 rounding, so that equal planes stay solvable.
_RIDGE = 1e-6
# Group elements (or levels, if more) solved at a time: bounds the scratch memory whatever the size of the weight.
_BLOCK = 1 << 18


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


class _Group(NamedTuple):
    """One sorted group: `values [g]` and the prefix sums `mass`, `first [g + 1]` of f and f w, f summing to 1."""

    values: jax.Array
    mass: jax.Array
    first: jax.Array


class _Fit(NamedTuple):
    """`theta` (the alphas, then the offset if learned), and mass and sum of each interval with its sign pattern."""

    theta: jax.Array
    mass: jax.Array
    first: jax.Array
    pattern: jax.Array


@partial(jax.jit, static_argnames=("bits", "rounds", "offset"))
def solve(
    values: jax.Array, bits: int, *, rounds: int = 15, offset: bool = False, importance: jax.Array | None = None
) -> BinaryCode:
    """Finds scales and signs of small squared error for each group, `sum_k f_k (w_k - decoded_k)^2`.

    Args:
      values: floating `[R, g]`, finite and below 1e30; one group a row. Computed in float32.
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
    >>> code.alpha.round(3).tolist(), decode(code).round(3).tolist()
    ([[2.0, 1.0]], [[-3.0, -1.0, 1.0, 3.0]])
    """
    check_rows(values, bits, importance)
    if rounds < 0:
        raise ValueError(f"rounds must be 0 (greedy) or more, got {rounds}")
    rows, size = values.shape

    def one(row: tuple[jax.Array, jax.Array]) -> BinaryCode:
        weights = None if importance is None else importance[row[1] % importance.shape[0]].astype(jnp.float32)
        return _solve_row(row[0].astype(jnp.float32), weights, bits, rounds, offset)

    block = max(1, min(rows, _BLOCK // max(size, 2**bits)))
    return lax.map(one, (values, jnp.arange(rows)), batch_size=block)


def decode(code: BinaryCode) -> jax.Array:
    """The float32 `[R, g]` weights that `code` stands for."""
    decoded = jnp.zeros((code.bits.shape[0], code.bits.shape[2]), jnp.float32)
    for p in range(code.bits.shape[1]):
        alpha = code.alpha[:, p, None]
        decoded += jnp.where(code.bits[:, p] == 1, alpha, -alpha)
    return decoded if code.beta is None else decoded + code.beta[:, None]


def _solve_row(w: jax.Array, f: jax.Array | None, bits: int, rounds: int, offset: bool) -> BinaryCode:
    w, f, center, scale = _normalize(w, f, offset)
    group = _sort(w, f)
    start = _greedy(group, bits, offset)
    if rounds == 0 or (bits == 1 and not offset):
        theta, planes = start.theta, _greedy_planes(w, start.theta[:bits])
    else:
        theta = _alternate(group, start, bits, rounds)
        planes = _nearest_planes(w, theta, bits)
    order = jnp.argsort(-theta[:bits])
    beta = center + theta[bits] * scale if offset else None
    return BinaryCode(theta[order] * scale, beta, planes[order])


def _normalize(
    w: jax.Array, f: jax.Array | None, offset: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Moves the mean to 0 if there is an offset, the largest magnitude into [1, 2) and the total importance to 1.

    Squares and products of tiny or huge weights then stay in range, and the ridge means the same to every group.
    """
    total = jnp.float32(w.size) if f is None else f.sum()
    f = None if f is None else f / jnp.where(total > 0, total, 1.0)
    live = w if f is None else jnp.where(f > 0, w, 0.0)
    center = jnp.float32(0)
    if offset:
        lo, hi = (w, w) if f is None else (jnp.where(f > 0, w, jnp.inf), jnp.where(f > 0, w, -jnp.inf))
        mean = live.mean() if f is None else (live * f).sum()
        # Rounding may push the mean of equal weights past them; the clip brings it back exactly.
        center = jnp.where(total > 0, jnp.clip(mean, lo.min(), hi.max()), 0.0)
        live = live - center if f is None else jnp.where(f > 0, live - center, 0.0)
    # A power of two divides without rounding: keep the exponent bits of the largest magnitude.
    exponent = lax.bitcast_convert_type(jnp.abs(live).max(), jnp.int32) & jnp.int32(0x7F800000)
    scale = lax.bitcast_convert_type(exponent, jnp.float32)
    scale = jnp.where(scale > 0, scale, 1.0)
    return live / scale, f, center, scale


def _sort(w: jax.Array, f: jax.Array | None) -> _Group:
    def prefix(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.zeros(1, jnp.float32), jnp.cumsum(x)])

    if f is not None:
        w, f = lax.sort((w, f), num_keys=1)
        return _Group(w, prefix(f), prefix(f * w))
    # XLA sorts integers several times faster than floats on a CPU. Flipping the low bits of negative floats makes the
    # integer order theirs, and flipping again undoes it.
    key = lax.bitcast_convert_type(w, jnp.int32)
    key = jnp.sort(key ^ ((key >> 31) & jnp.int32(0x7FFFFFFF)))
    w = lax.bitcast_convert_type(key ^ ((key >> 31) & jnp.int32(0x7FFFFFFF)), jnp.float32)
    return _Group(w, jnp.arange(w.size + 1, dtype=jnp.float32) / w.size, prefix(w) / w.size)


def _between(group: _Group, edges: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mass and weighted sum of the sorted weights from each edge to the next."""
    return jnp.diff(group.mass[edges]), jnp.diff(group.first[edges])


def _signs(pattern: jax.Array, bits: int) -> jax.Array:
    """`[bits, ...]` of 0 and 1; the first plane is the top bit, so greedy intervals come out in the order of patterns."""
    return jnp.stack([(pattern >> (bits - 1 - p)) & 1 for p in range(bits)])


def _greedy(group: _Group, bits: int, offset: bool) -> _Fit:
    """Each plane takes the sign of what is left and the mean of its magnitude: every interval is cut at its level."""
    size = group.values.size
    levels, edges = jnp.zeros(1, jnp.float32), jnp.array([0, size], jnp.int32)
    alphas = []
    for plane in range(bits):
        # Strictly smaller goes left, so the sign of 0 is +1.
        cuts = jnp.searchsorted(group.values, levels).astype(jnp.int32)
        cuts = jnp.clip(cuts, edges[:-1], edges[1:])
        edges = jnp.concatenate([edges[:1], jnp.stack([cuts, edges[1:]], axis=1).ravel()])
        mass, first = _between(group, edges)
        sides = jnp.array([-1.0, 1.0] * 2**plane, jnp.float32)
        levels = jnp.repeat(levels, 2)
        alphas.append(jnp.maximum((sides * (first - levels * mass)).sum(), 0.0))
        levels = levels + alphas[-1] * sides
    theta = jnp.stack(alphas + [jnp.zeros((), jnp.float32)] * offset)
    return _Fit(theta, mass, first, jnp.arange(2**bits, dtype=jnp.int32))


def _least_squares(fit: _Fit, bits: int) -> jax.Array:
    """The best `theta` for the signs of `fit`, from the normal equations with a ridge.

    The ridge penalises the *change* of theta, so it biases nothing and the error cannot rise even if planes are equal.
    """
    signs = (2 * _signs(fit.pattern, bits) - 1).astype(jnp.float32)
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


def _levels(theta: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The `2^bits` levels of `theta` in ascending order, and the sign pattern of each."""
    pattern = jnp.arange(2**bits, dtype=jnp.int32)
    signs = (2 * _signs(pattern, bits) - 1).astype(jnp.float32)
    levels, pattern = lax.sort(((signs * theta[:bits, None]).sum(axis=0), pattern), num_keys=1)
    return (levels + theta[bits] if theta.size > bits else levels), pattern


def _assign(group: _Group, theta: jax.Array, bits: int) -> tuple[_Fit, jax.Array]:
    """Sends every weight to its nearest level; also the squared error, less the constant `sum f w^2`."""
    theta = jnp.concatenate([-jnp.sort(-jnp.abs(theta[:bits])), theta[bits:]])
    levels, pattern = _levels(theta, bits)
    cuts = jnp.searchsorted(group.values, (levels[1:] + levels[:-1]) / 2).astype(jnp.int32)
    ends = jnp.array([0, group.values.size], jnp.int32)
    mass, first = _between(group, jnp.concatenate([ends[:1], cuts, ends[1:]]))
    return _Fit(theta, mass, first, pattern), (levels * (levels * mass - 2 * first)).sum()


def _alternate(group: _Group, start: _Fit, bits: int, rounds: int) -> jax.Array:
    fit, error = _assign(group, start.theta, bits)

    def step(_: jax.Array, state: tuple[_Fit, jax.Array, jax.Array]) -> tuple[_Fit, jax.Array, jax.Array]:
        fit, best, lowest = state
        fit, error = _assign(group, _least_squares(fit, bits), bits)
        return fit, jnp.where(error < lowest, fit.theta, best), jnp.minimum(error, lowest)

    # The first least squares takes the signs of the greedy start, which need not be those of the nearest levels.
    return lax.fori_loop(0, rounds, step, (start, fit.theta, error))[1]


def _greedy_planes(w: jax.Array, alphas: jax.Array) -> jax.Array:
    planes = []
    for alpha in alphas:
        planes.append(w >= 0)
        w = w - jnp.where(planes[-1], alpha, -alpha)
    return jnp.stack(planes).astype(jnp.uint8)


def _nearest_planes(w: jax.Array, theta: jax.Array, bits: int) -> jax.Array:
    levels, pattern = _levels(theta, bits)
    index = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, w, side="right")
    return _signs(pattern[index], bits).astype(jnp.uint8)
