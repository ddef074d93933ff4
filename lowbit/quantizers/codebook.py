"""Additive codebooks by residual k-means, the start of AQLM (Egiazarian et al., ICML 2024).

Each group of weights is divided by its scale, the root mean square, and cut into vectors u. Codebook after codebook is
the result of Lloyd's algorithm on what the ones before left of u. With w = s u and importances f, it minimizes

    sum_vectors s^2 sum_v f_v (u_v - sum_b codebooks[b, code_b, v])^2.

Both steps of Lloyd's algorithm never raise that sum. So more codebooks never hurt, nor do more rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lowbit.formats.codebook import pack_codes, vectors
from lowbit.formats.format import Format
from lowbit.ir.dtypes import numpy_dtype, short
from lowbit.quantizers.groups import check_rounds, to_groups
from lowbit.quantizers.quantizer import Fields, expect_format, set_default_quantizer

# Distances to centroids that are held at a time, vectors for each centroid that a codebook is learned from, and
# centroids up to which their sums are products.
_BLOCK = 1 << 20
_SAMPLE = 256
_PRODUCT = 1024


class CodebookCode(NamedTuple):
    """Integer codes [b, n, g, j], codebooks [b, c, v] and scales [n, g]."""

    codes: jax.Array
    books: jax.Array
    scale: jax.Array


class _Points(NamedTuple):
    """Vectors `u [P, vec]`, the importance `f [P, vec]` of their entries, and how much each counts, `mass [P, 1]`."""

    u: jax.Array
    f: jax.Array
    mass: jax.Array


@dataclass(frozen=True)
class ResidualKMeans:
    """Codebook after codebook, k-means of what is left. Make one with `lb.residual_kmeans`."""

    rounds: int = 25
    weighs_by: tuple[str, ...] = field(default=("second_moment",), repr=False)
    takes_importance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rounds(self.rounds)

    def __call__(self, w: jax.Array, fmt: Format, importance: jax.Array | None = None) -> Fields:
        """The stored arrays; with `importance` [k] or [n, k], squared errors count that much, all positive."""
        expect_format(fmt, "codebook", self)
        f = jnp.ones((1, 1), jnp.float32) if importance is None else jnp.atleast_2d(importance)
        return stored(solve(w.astype(jnp.float32), f, fmt, self.rounds), fmt)


def residual_kmeans(rounds: int = 25, weighs_by: tuple[str, ...] = ("second_moment",)) -> ResidualKMeans:
    """Residual k-means, the default for `codebook`: `rounds` rounds of Lloyd's algorithm for each codebook.

    Centroids start from vectors drawn with a fixed key: it is deterministic, on a GPU only up to 1024 entries, beyond
    which sums are made there in any order. A codebook of large weights is learned from 256 vectors an entry, drawn
    likewise. Where `lb.quantize` is given `stats`, errors are weighed as by `lb.alternating`.

    >>> import jax, lowbit as lb
    >>> w = jax.random.normal(jax.random.key(0), (64, 64))
    >>> q = lb.quantize_array(w, lb.codebook(1, 4, vec=2), lb.residual_kmeans())
    >>> bool(((lb.dequantize(q) - w) ** 2).mean() < 0.2)  # two bits a weight
    True
    """
    return ResidualKMeans(rounds, weighs_by)


def stored(code: CodebookCode, fmt: Format) -> Fields:
    """The format's arrays."""
    dtype = numpy_dtype(short(fmt["scale_dtype"]))
    floats = {"codebooks": code.books.astype(dtype), "scale": code.scale.astype(dtype)}
    return floats | pack_codes(code.codes, fmt["bits"])


@partial(jax.jit, static_argnums=(2, 3))
def solve(w: jax.Array, f: jax.Array, fmt: Format, rounds: int) -> CodebookCode:
    """Residual k-means of w [n, k] with the importance f [n or 1, k or 1]."""
    n, k = w.shape
    vec, j = fmt["vec"], vectors(k, fmt["vec"], fmt["group"])
    values, mask = to_groups(w, j * vec)
    weights = to_groups(jnp.broadcast_to(f / f.mean(), (n, k)), j * vec)[0]
    scale = _root_mean_square(values, mask)
    live = scale > 0
    u = jnp.where(live[..., None], values / jnp.where(live, scale, 1.0)[..., None], 0.0)
    mass = jnp.broadcast_to(jnp.square(scale / jnp.maximum(scale.max(), 1e-30))[..., None], (*scale.shape, j))
    points = _Points(u.reshape(-1, vec), weights.reshape(-1, vec), mass.reshape(-1, 1))

    def one(left: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        if len(left) == 1 << fmt["bits"]:  # each vector is its own centroid
            return jnp.zeros_like(left), (jnp.arange(len(left)), left)
        book = _lloyd(points._replace(u=left), 1 << fmt["bits"], rounds, key)
        code = _nearest(points._replace(u=left), book)
        return left - book[code], (code, book)

    _, (codes, books) = lax.scan(one, points.u, jax.random.split(jax.random.key(0), fmt["m"]))
    return CodebookCode(codes.reshape(-1, *scale.shape, j), books, scale)


def _root_mean_square(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Of values [n, g, t] where mask [g, t]; 0 for a group that is zero, or too small to divide by."""
    largest = jnp.abs(values).max(-1)
    live = largest >= jnp.finfo(jnp.float32).tiny
    relative = values / jnp.where(live, largest, 1.0)[..., None]  # whose squares do not overflow
    mean = jnp.square(relative).sum(-1) / mask.sum(-1)[None]
    return jnp.where(live, largest * jnp.sqrt(mean), 0.0)


def _lloyd(points: _Points, count: int, rounds: int, key: jax.Array) -> jax.Array:
    """`count` centroids [c, v]; one that no vector is nearest to stays where it is."""
    total = points.u.shape[0]
    drawn = jax.random.permutation(key, total)[: _SAMPLE * count]
    sample = _Points(*(a[drawn] for a in points)) if total > _SAMPLE * count else points
    start = points.u[drawn[:count]]

    def turn(_: int, book: jax.Array) -> jax.Array:
        weights, sums = _clusters(sample, book)
        return jnp.where(weights > 0, sums / jnp.where(weights > 0, weights, 1.0), book)

    return lax.fori_loop(0, rounds, turn, start)


def _clusters(points: _Points, book: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weight, and the weighted sum, of the vectors nearest to each centroid, both [c, v]."""

    def add(sums: jax.Array, block: _Points) -> tuple[jax.Array, None]:
        nearest, f = _nearest_of(block, book), block.f * block.mass
        both = jnp.concatenate([f, f * block.u], 1)
        if len(book) > _PRODUCT:
            return sums.at[nearest].add(both), None
        # A product instead of a scatter: the same bits every time, on every platform.
        one_hot = jax.nn.one_hot(nearest, len(book), axis=0)
        return sums + jnp.matmul(one_hot, both, precision=lax.Precision.HIGHEST), None

    zero = jnp.zeros((len(book), 2 * book.shape[1]))
    weights, sums = jnp.split(lax.scan(add, zero, _blocks(points, len(book)))[0], 2, axis=1)
    return weights, sums


def _nearest(points: _Points, book: jax.Array) -> jax.Array:
    """The centroid [P] nearest to each vector."""
    found = lax.map(lambda block: _nearest_of(block, book), _blocks(points, len(book)))
    return found.reshape(-1)[: len(points.u)]


def _nearest_of(points: _Points, book: jax.Array) -> jax.Array:
    """argmin_c of sum_v f_v (u_v - c_v)^2, less what is the same for every c."""
    left = jnp.concatenate([points.f, points.f * points.u], 1)
    right = jnp.concatenate([jnp.square(book), -2 * book], 1)
    return smallest(jnp.matmul(left, right.T, precision=lax.Precision.HIGHEST))


def smallest(a: jax.Array) -> jax.Array:
    """argmin over the last axis, in two reductions that vectorize: XLA's own takes 5 to 10 times as long on a CPU."""
    count = a.shape[-1]
    at = jnp.arange(count).reshape((1,) * (a.ndim - 1) + (-1,))
    return jnp.where(a == a.min(-1, keepdims=True), at, count - 1).min(-1)


def _blocks(points: _Points, count: int) -> _Points:
    """The vectors in blocks of one size, the last one padded with vectors of no mass."""
    total = len(points.u)
    size = min(total, max(1, _BLOCK // count))
    padded = (jnp.pad(a, ((0, -total % size), (0, 0))) for a in points)
    return _Points(*(a.reshape(-1, size, a.shape[1]) for a in padded))


set_default_quantizer("codebook", ResidualKMeans())
