"""Weighted k-means of the rows of a matrix, and the splits that nest it, in numpy on the host.

A row is sorted once. A cluster is then a stretch of it, and sums over any stretch are differences of prefix sums, in
float64. All rows of a block take each step together: a step is a few look-ups of [rows, clusters] numbers, and nothing
is compiled for the size of a weight.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

_ROUNDS = 50
_BLOCK = 1 << 21
"""Weights in a block of rows: a thread works on one with arrays of about 80 bytes a weight."""
_THREADS = 8


class _Rows(NamedTuple):
    """Sorted rows of `size` weights, flattened: row r has the places `first[r]` to `first[r] + size`.

    `x` has the weights in float32, and one more place a row, where sums of all of it stand. `sums` are complex, so that
    one look-up finds both: at each place, of f and of f x before it in the row. If there are weights f, the same
    without them follow behind.
    """

    x: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    first: np.ndarray
    size: int


def nested_kmeans_rows(
    w: np.ndarray, importance: np.ndarray | None, lo: int, hi: int
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Clusters each row into 2**lo, then splits every cluster in two up to 2**hi, for a small error
    sum_k f_k (w_k - table_b[code_k >> (hi - b)])^2 at every width b.

    The seed is greedy k-means++ and at most 50 rounds of Lloyd's algorithm. A split is where the midpoint of the means
    of both sides falls between them, found by bisection. What comes of a row depends on that row alone: equal rows have
    equal codes, wherever they are.

    Args:
      w: float32 [n, k], finite.
      importance: f, finite and nonnegative, [k] or [n, k]; with None, or zeros for all of a cluster, its weights count
        alike.
      lo: bits of the seed.
      hi: bits of the codes, at most 8.

    Returns:
      Codes uint8 [n, k] of `hi` bits, that ascend with the weight, and for every width ascending tables
      float64 [n, 2**width]. An entry is the mean of its weights. One without weights has that of the cluster it comes
      from.

    >>> codes, tables = nested_kmeans_rows(np.float32([[4, -4, 6, -6]]), None, 1, 2)
    >>> codes.tolist(), tables[1].tolist(), tables[2].tolist()
    ([[2, 1, 3, 0]], [[-5.0, 5.0]], [[-6.0, -4.0, 4.0, 6.0]])
    """
    n, k = w.shape
    rows = max(1, _BLOCK // k)

    def block(at: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        part = slice(at, at + rows)
        f = importance if importance is None or importance.ndim == 1 else importance[part]
        return _solve(w[part], f, lo, hi)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        codes, tables = zip(*pool.map(block, range(0, n, rows)), strict=True)
    return np.concatenate(codes), {b: np.concatenate([t[b] for t in tables]) for b in range(lo, hi + 1)}


def _solve(w: np.ndarray, f: np.ndarray | None, lo: int, hi: int) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    order = np.argsort(w, axis=1) + w.shape[1] * np.arange(len(w))[:, None]
    if f is not None:
        f = np.take(np.broadcast_to(f, w.shape), order)
        f = np.where(f.any(1, keepdims=True), f, np.float32(1))
    rows = _sorted(np.take(w, order), f)
    edges, table = _lloyd(rows, _seed(rows, 1 << lo))
    tables = {lo: table}
    for b in range(lo, hi):
        edges, tables[b + 1] = _split(rows, edges, tables[b])
    codes = np.empty(w.shape, np.uint8)
    each = np.tile(np.arange(1 << hi, dtype=np.uint8), len(w))
    np.put(codes, order, np.repeat(each, np.diff(edges).ravel()))
    return codes, tables


def _sorted(x: np.ndarray, f: np.ndarray | None) -> _Rows:
    """Of ascending weights x [r, k] with the importance f."""
    r, k = x.shape
    sums = np.zeros((1 if f is None else 2, r, k + 1), np.complex128)
    for each, weight in zip(sums[:, :, 1:], (1.0,) if f is None else (f, 1.0), strict=True):
        each.real, each.imag = weight, x
        each.imag *= weight
        np.cumsum(each, axis=1, out=each)
    squares = np.zeros((r, k + 1))
    np.multiply(x, x, dtype=np.float64, out=squares[:, 1:])
    if f is not None:
        squares[:, 1:] *= f
    np.cumsum(squares, axis=1, out=squares)
    padded = np.pad(x, ((0, 0), (0, 1)))
    return _Rows(padded.ravel(), sums.ravel(), squares.ravel(), np.arange(r) * (k + 1), k)


def _take(a: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.take(a, at, mode="clip")  # which checks no bound: twice as fast


def _bisect(low: np.ndarray, high: np.ndarray, below: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The first place from low to high that is not below, or else high."""
    while (apart := low < high).any():
        middle = (low + high) >> 1
        right = below(middle) & apart
        low, high = np.where(right, middle + 1, low), np.where(right, high, middle)
    return low


def _edges(rows: _Rows, centroids: np.ndarray) -> np.ndarray:
    """Where the clusters of ascending centroids [r, ..., c] begin, and where the last one ends: [r, ..., c + 1]."""
    first = rows.first.reshape(-1, *[1] * (centroids.ndim - 1))
    middle = (centroids[..., 1:] + centroids[..., :-1]) / 2
    low = np.broadcast_to(first, middle.shape)
    cuts = _bisect(low, low + rows.size, lambda at: _take(rows.x, at) < middle)
    ends = np.broadcast_to(first, (*middle.shape[:-1], 1))
    return np.concatenate([ends, cuts, ends + rows.size], -1)


def _means(rows: _Rows, edges: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """The weighted mean of each cluster, the plain one if nothing in it counts, `empty` of those without weights."""
    start, stop = edges[..., :-1], edges[..., 1:]
    plain = _plain(rows, start, stop)
    sums = _take(rows.sums, stop + plain) - _take(rows.sums, start + plain)
    mean = sums.imag / np.where(sums.real > 0, sums.real, 1.0)
    # Rounding must take no mean past a member: tables ascend, and equal weights are met exactly.
    return np.where(start < stop, np.clip(mean, _take(rows.x, start), _take(rows.x, stop - 1)), empty)


def _plain(rows: _Rows, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """How far behind the sums of a cluster those are that hold for it: the ones without f if nothing in it counts."""
    nothing = _take(rows.sums, start).real == _take(rows.sums, stop).real
    return nothing * (rows.sums.size - rows.x.size)


def _seed(rows: _Rows, count: int) -> np.ndarray:
    """Greedy k-means++: from the mean on, of some weights drawn by their squared distance the one that helps most.

    All rows draw the same numbers: twice as many as usual, 2 + log(count), which is cheap here and makes up for that.
    """
    trials = 2 * (2 + int(math.log(count)))
    whole = np.stack([rows.first, rows.first + rows.size], 1)
    centroids = _means(rows, whole, np.zeros((len(whole), 1)))
    for uniform in np.random.default_rng(0).random((count - 1, trials)):
        drawn = _draw(rows, centroids, uniform)[..., None]
        others = np.broadcast_to(centroids[:, None], (*drawn.shape[:2], centroids.shape[1]))
        sets = np.sort(np.concatenate([others, drawn], 2))
        edges = _edges(rows, sets)
        best = _inertia(rows, edges[..., :-1], edges[..., 1:], sets).sum(2).argmin(1)
        centroids = sets[np.arange(len(sets)), best]
    return centroids


def _draw(rows: _Rows, centroids: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Weights [r, trials], in proportion to f times the squared distance to the nearest centroid."""
    edges = _edges(rows, centroids)
    each = np.maximum(_inertia(rows, edges[:, :-1], edges[:, 1:], centroids), 0.0)
    total = np.cumsum(each, 1)
    target = uniform * total[:, -1:]
    cluster = np.minimum((total[:, None] <= target[..., None]).sum(2), total.shape[1] - 1)
    start, stop, c, before = (np.take_along_axis(a, cluster, 1) for a in (edges, edges[:, 1:], centroids, total - each))
    rest = target - before
    at = _bisect(start, np.maximum(stop - 1, start), lambda at: _inertia(rows, start, at + 1, c) <= rest)
    return _take(rows.x, at)


def _inertia(rows: _Rows, start: np.ndarray, stop: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The weighted squared distances from c."""
    sums = _take(rows.sums, stop) - _take(rows.sums, start)
    return _take(rows.squares, stop) - _take(rows.squares, start) + c * (c * sums.real - 2 * sums.imag)


def _lloyd(rows: _Rows, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The edges and the means of the clusters. One that loses its weights keeps its centroid, which stays between those
    of its neighbours: no weight is."""
    edges = _edges(rows, centroids)
    for _ in range(_ROUNDS):
        centroids = _means(rows, edges, centroids)
        before, edges = edges, _edges(rows, centroids)
        if np.array_equal(before, edges):
            break
    return before, centroids


def _split(rows: _Rows, edges: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges and means of twice as many clusters.

    Equal weights stay together. If one value is all that counts, everything goes left, unless the cluster has two
    weights: they part.
    """
    start, stop = edges[:, :-1], edges[:, 1:]
    plain = np.where(stop - start <= 2, rows.sums.size - rows.x.size, _plain(rows, start, stop))
    cut = _cut(rows, start, stop, plain)
    total = _take(rows.sums, np.stack([start, cut, stop]) + plain).real
    nothing = (total[0] == total[1]) | (total[1] == total[2])
    alike = _take(rows.x, cut - 1) == _take(rows.x, cut)
    cut = np.where((nothing | alike) & (start < stop), stop, cut)
    both = np.stack([start, cut], 2).reshape(len(edges), -1)
    edges = np.concatenate([both, edges[:, -1:]], 1)
    return edges, _means(rows, edges, np.repeat(table, 2, 1))


def _cut(rows: _Rows, start: np.ndarray, stop: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """A place between start and stop with the midpoint of the means of both sides above the weight before it and not
    above its own.

    The midpoint grows with the place. So if it is above the place's weight, there is such a place to the right, and if
    it is not above the one before, to the left.
    """
    before, after = _take(rows.sums, start + plain), _take(rows.sums, stop + plain)
    low = np.minimum(start + 1, stop)
    high = np.maximum(stop - 1, low)
    while (apart := low < high).any():
        middle = (low + high) >> 1
        sums = _take(rows.sums, middle + plain)
        a, b = sums - before, after - sums
        # a.imag / a.real + b.imag / b.real > 2 x, without dividing by the mass of a side that may have none
        scaled, unit = a.imag * b.real + b.imag * a.real, 2 * a.real * b.real
        right = ((a.real <= 0) | (scaled > _take(rows.x, middle) * unit)) & apart
        left = (scaled <= _take(rows.x, middle - 1) * unit) & ~right
        low, high = (
            np.where(right, middle + 1, np.where(left, low, middle)),
            np.where(right, high, np.where(left, np.maximum(middle - 1, low), middle)),
        )
    return low
