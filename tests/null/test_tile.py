"""A term in parts has the value of the whole, whatever the part, and needs less room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowbit.ir import Bucket, Expr, Gather, Split, const, contract, evaluate, param, params, topo
from lowbit.ir.dtypes import numpy_dtype
from lowbit.passes import PIPELINES, run
from lowbit.passes.tile import Tiles, tile, written
from tests.null.test_normal_forms import binary_coding
from tests.terms import EXAMPLES, environment, matmuls, terms


def by_parts(t: Tiles, env: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a lowering does with parts, in numpy."""
    leaves = params(t.term)
    have = dict(env)
    for name, e in t.outer.items():
        value = evaluate(e, env)
        have[name] = value.astype(numpy_dtype(leaves[name].dtype))
        assume(np.array_equal(have[name].astype(value.dtype), value))  # a leaf holds what its dtype holds
    values = []
    for start in range(0, t.total, t.size):
        size = min(t.size, t.total - start)
        axis = {n: list(p.dims).index(t.dim) for n, p in leaves.items() if t.dim in p.dims}
        cut = {n: have[n].take(range(start, start + size), axis=a) for n, a in axis.items()}
        values.append(evaluate(t.part(size), {**have, **cut}))
    return sum(values[1:], values[0]) if t.sums else np.concatenate(values, list(t.term.dims).index(t.dim))


def test_random_terms() -> None:
    seen: Counter[tuple[bool, bool, bool]] = Counter()

    @settings(max_examples=EXAMPLES)
    @given(
        st.one_of(matmuls(), matmuls(), terms()), st.sampled_from([*PIPELINES]), st.integers(1, 8), st.integers(0, 9)
    )
    def property_(e: Expr, name: str, parts: int, seed: int) -> None:
        e = run(e, PIPELINES[name])
        t = tile(e, written(e) / parts - 1)
        if t is None:
            return
        assert written(t.part(t.size)) <= written(e)
        t = replace(t, size=1 + (t.size + seed) % t.total)  # any size will do, also one that leaves a remainder
        env = environment(e, seed)
        np.testing.assert_array_equal(by_parts(t, env), evaluate(e, env))
        seen[t.sums, bool(t.outer), t.total % t.size == 0] += 1

    property_()
    every = [seen[sums, outer, even] for sums in (False, True) for outer in (False, True) for even in (False, True)]
    assert min(every) > EXAMPLES / 400, seen


def test_what_is_small_stays_whole() -> None:
    assert tile(binary_coding(), 1 << 20) is None
    assert tile(param("x", "f32", n=1 << 20), 1) is None


def test_a_table_form_is_cut_along_its_rows_and_makes_its_tables_once() -> None:
    e = run(Tiles("n", 1, False, {}, binary_coding()).part(512), PIPELINES["table"])  # more to look up than tables hold
    gathered = next(n for n in topo(e) if isinstance(n, Gather))
    t = tile(e, written(e) / 3)
    assert t is not None
    assert (t.dim, t.size, t.sums) == ("n", 128, False)
    assert list(t.outer.values()) == [gathered.table]


def test_a_decode_is_cut_along_its_rows() -> None:
    t = tile(binary_coding(), written(binary_coding()) / 3)
    assert t is not None
    assert (t.dim, t.size, t.sums) == ("n", 2, False)


def test_a_part_near_the_limit_divides_the_whole() -> None:
    t = tile(binary_coding(), written(binary_coding()) / 4)  # n=6 in four parts of two would leave one empty
    assert t is not None
    assert t.size == 1


X, W = param("x", "f32", m=2, n=3, k=4), param("w", "f32", o=5, k=4)


@pytest.mark.parametrize(
    "e",
    [
        contract((X.sum("n"), W + 1), ("k",)),  # summed below the root
        contract((Split(X, "n", (("z", 3),)), W + 1), ("k",)),  # another name for it
        contract((Bucket(X, param("i", "u8", (0, 2), m=2), "n", 3, frozenset({"n"})), W + 1), ("k",)),  # made anew
    ],
    ids=["summed", "renamed", "made"],
)
def test_a_dim_that_does_not_reach_the_root_is_not_cut(e: Expr) -> None:
    t = tile(e, 1)
    assert t is None or t.dim != "n"


def test_a_sum_that_only_its_constants_keep_in_range_stays_whole() -> None:
    codes, table = param("codes", "u8", (0, 3), p=2, n=64), param("t", "i32", (0, 1), c=4)
    e = contract((Gather(table, codes, "c"), const([1 << 30, (1 << 30) - 1], "i32", "p")), ("p",))
    t = tile(e, 64)
    assert t is None or t.dim == "n"
