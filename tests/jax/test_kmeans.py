"""Nested k-means of rows: seeds against the exact minimum, splits against the rule one cluster at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lowbit.quantizers import kmeans
from lowbit.quantizers.kmeans import nested_kmeans_rows

LO, HI = 2, 6
UNIT = np.finfo(np.float64).eps / 2


def rows_and_weights() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(20, 48)).astype(np.float32)
    f = np.exp(2 * rng.normal(size=w.shape)).astype(np.float32)
    w[8], w[9], f[10] = 0.5, 0, 0  # constant, all zero, and nothing that counts
    w[11, :30] = 3  # many equal weights
    w[12] *= 1e30
    f[13, 1:], f[14, ::2], w[15, 0] = 0, 0, 1e5  # one that counts; half; an outlier
    f[16:][rng.random((4, 48)) < 0.8] = 0
    w[17] = np.round(w[17])
    w[18] = w[18] * 1e-3 + 1000  # far from zero
    return w, f


@pytest.fixture(scope="module")
def solved() -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    w, f = rows_and_weights()
    return w, f, *nested_kmeans_rows(w, f, LO, HI)


def decoded(codes: np.ndarray, tables: dict[int, np.ndarray], width: int, hi: int = HI) -> np.ndarray:
    return np.take_along_axis(tables[width], (codes >> (hi - width)).astype(int), 1)


def inertia(w: np.ndarray, f: np.ndarray, near: np.ndarray) -> np.ndarray:
    return (f * (near - w.astype(np.float64)) ** 2).sum(1)


def least_inertia(w: np.ndarray, f: np.ndarray, count: int) -> float:
    """Of one row, by dynamic programming over its sorted weights."""
    order = np.argsort(w)
    w, f = w[order].astype(np.float64), f[order].astype(np.float64)
    best = np.array([0.0] + [np.inf] * w.size)
    for _ in range(count):
        new = best.copy()
        for stop in range(1, w.size + 1):
            for start in range(stop):
                x, g = w[start:stop], f[start:stop]
                new[stop] = min(new[stop], best[start] + (g * (x - (g * x).sum() / g.sum()) ** 2).sum())
        best = new
    return float(best[-1])


def lloyd(w: np.ndarray, f: np.ndarray, count: int) -> float:
    """From quantiles, 50 rounds."""
    c = np.quantile(w, (np.arange(count) + 0.5) / count)
    for _ in range(50):
        near = np.abs(w[:, None] - c).argmin(1)
        mass = np.bincount(near, f, count)
        c = np.where(mass > 0, np.bincount(near, f * w, count) / np.where(mass > 0, mass, 1), c)
    return float((f * np.abs(w[:, None] - c).min(1) ** 2).sum())


def mean(x: np.ndarray, f: np.ndarray) -> float:
    return float(np.average(x, weights=f if f.any() else None))


def split(x: np.ndarray, f: np.ndarray, entry: float) -> tuple[str, int, tuple[float, float]]:
    """Any-Precision's rule for one cluster, sorted: which case it is, the size of its left part, and both entries."""
    if x.size == 0:
        return "empty", 0, (entry, entry)
    if x.size == 1:
        return "one", 1, (x[0], x[0])
    if x[0] == x[-1]:
        return "alike", x.size, (x[0], x[0])
    if x.size == 2:
        return "two", 1, (x[0], x[1])
    case = "zero" if not f.any() else "some"
    f = f if f.any() else np.ones_like(f)
    if np.unique(x[f > 0]).size == 1:
        return "counts alone", x.size, (mean(x, f), mean(x, f))
    low, high = 1, x.size - 1
    while low < high:
        cut = (low + high) // 2
        if not f[:cut].any():
            low = cut + 1
        elif not f[cut:].any():
            high = max(cut - 1, low)
        else:
            middle = (mean(x[:cut], f[:cut]) + mean(x[cut:], f[cut:])) / 2
            if middle > x[cut]:
                low = cut + 1
            elif middle <= x[cut - 1]:
                high = max(cut - 1, low)
            else:
                low = high = cut
    return case, low, (mean(x[:low], f[:low]), mean(x[low:], f[low:]))


def test_codes_are_nested_and_tables_ascend(solved) -> None:
    w, _, codes, tables = solved
    assert codes.dtype == np.uint8 and codes.shape == w.shape and codes.max() < 1 << HI
    for width, table in tables.items():
        assert table.shape == (20, 1 << width) and (np.diff(table, axis=1) >= 0).all() and np.isfinite(table).all()
    assert sorted(tables) == [2, 3, 4, 5, 6]
    order = np.argsort(w, axis=1, kind="stable")
    x, code = np.take_along_axis(w, order, 1), np.take_along_axis(codes.astype(int), order, 1)
    assert (np.diff(code, axis=1) >= 0).all()
    assert (np.diff(code, axis=1)[np.diff(x, axis=1) == 0] == 0).all()  # equal weights have equal codes


def test_the_seed_is_near_the_minimum(solved) -> None:
    w, f, codes, tables = solved
    got = inertia(w, f, decoded(codes, tables, LO))[:8]
    rounding = 4 * w.shape[1] * UNIT  # of either sum of k nonnegative terms
    assert (got >= [(1 - rounding) * least_inertia(w[r], f[r], 1 << LO) for r in range(8)]).all()
    assert got.sum() <= sum(lloyd(w[r], f[r], 1 << LO) for r in range(8))
    nearest = np.abs(w[:8, :, None] - tables[LO][:8, None]).argmin(2)
    assert np.array_equal(codes[:8] >> (HI - LO), nearest)  # so another round would change nothing


def test_every_split_is_that_of_the_rule(solved) -> None:
    w, f, codes, tables = solved
    cases: Counter[str] = Counter()
    for r in range(len(w)):
        order = np.argsort(w[r], kind="stable")
        x, g, code = w[r][order].astype(np.float64), f[r][order].astype(np.float64), codes[r][order]
        # What a mean of prefix sums may be off by: k roundings of either sum, over the mass of the cluster.
        g = g if g.any() else np.ones_like(g)
        for width in range(LO, HI):
            for c in range(1 << width):
                inside = (code >> (HI - width)) == c
                case, left, entries = split(x[inside], g[inside], tables[width][r, c])
                cases[case] += 1
                children = code[inside] >> (HI - width - 1)
                assert (children == 2 * c).sum() == left, (r, width, c, case)
                mass = g[inside][g[inside] > 0].min(initial=np.inf) if g[inside].any() else 1.0
                bound = 4 * w.shape[1] * UNIT * np.abs(x).max() * max(g.sum() / mass, w.shape[1])
                assert np.abs(tables[width + 1][r, 2 * c : 2 * c + 2] - entries).max() <= bound, (r, width, c, case)
    assert set(cases) == {"empty", "one", "alike", "two", "zero", "counts alone", "some"}, cases


def test_an_entry_without_weights_stays(solved) -> None:
    w, _, codes, tables = solved
    for width in range(LO, HI):
        for r in range(len(w)):
            none = np.bincount(codes[r] >> (HI - width), minlength=1 << width) == 0
            assert np.array_equal(
                tables[width + 1][r].reshape(-1, 2)[none], np.repeat(tables[width][r][none, None], 2, 1)
            )


def test_rows_that_need_few_entries_are_met_exactly(solved) -> None:
    w, _, codes, tables = solved
    assert (decoded(codes, tables, LO)[8] == 0.5).all() and not decoded(codes, tables, LO)[9].any()
    near = decoded(codes, tables, HI)
    assert (near[11, :30] == 3).all() and near[13, 0] == w[13, 0] and near[15, 0] == w[15, 0]
    few = np.float32([[1, 2, 2, 3, 3, 3, 1, 2]])
    codes, tables = nested_kmeans_rows(few, None, 2, 3)
    assert np.array_equal(decoded(codes, tables, 2, 3), few) and np.array_equal(decoded(codes, tables, 3, 3), few)
    assert np.array_equal(nested_kmeans_rows(np.float32([[7]]), None, 3, 8)[1][8], np.full((1, 256), 7.0))


def test_a_row_that_counts_for_nothing_is_one_without_weights(solved) -> None:
    w, _, codes, tables = solved
    alone, plain = nested_kmeans_rows(w[10:11], None, LO, HI)
    assert np.array_equal(codes[10], alone[0])
    assert all(np.array_equal(tables[b][10], plain[b][0]) for b in tables)


def test_what_comes_of_a_row_depends_on_it_alone(solved, monkeypatch: pytest.MonkeyPatch) -> None:
    w, f, codes, tables = solved
    monkeypatch.setattr(kmeans, "_BLOCK", 3 * w.shape[1])
    backwards, again = nested_kmeans_rows(w[::-1], f[::-1], LO, HI)
    assert np.array_equal(backwards[::-1], codes)
    assert all(np.array_equal(again[b][::-1], tables[b]) for b in tables)
    shared, spread = (nested_kmeans_rows(w, g, LO, HI)[0] for g in (f[0], np.tile(f[0], (20, 1))))
    assert np.array_equal(shared, spread)


def test_weights_of_errors_matter(solved) -> None:
    w, f, codes, tables = solved
    plain, without = nested_kmeans_rows(w, None, LO, HI)
    ours, theirs = (inertia(w, f, decoded(*each, LO))[:8].sum() for each in ((codes, tables), (plain, without)))
    assert ours < 0.7 * theirs
