"""Every pass against the oracle on 2,000 random terms: values must be equal, not close (see tests/terms.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.ir import Expr, cost, evaluate, parse, text
from lowbit.passes import (
    PIPELINES,
    Machine,
    Pass,
    bucket,
    choose,
    commute_gather,
    distribute,
    distribute_stored,
    flatten,
    fold,
    forms,
    hoist_merge,
    hoist_slice,
    join_planes,
    run,
    tabulate,
)
from tests.terms import environment, matmuls, terms

EXAMPLES = 2000
HOIST, TABULATE, DISTRIBUTE = PIPELINES["table"][1:4]
JOIN = PIPELINES["join"][2]
# Before a pass can fire, the pipeline has brought the term into the shape that it looks for.
PASSES: dict[str, tuple[Pass, tuple[Pass, ...], float]] = {
    "hoist_merge": (Pass("hoist_merge", (hoist_merge,)), (), 0.3),
    "hoist_slice": (Pass("hoist_slice", (hoist_slice,)), (), 0.1),
    "tabulate": (Pass("tabulate", (tabulate,), top_down=True), (HOIST,), 0.3),
    "join_planes": (Pass("join_planes", (join_planes,)), (HOIST,), 0.1),
    "distribute": (Pass("distribute", (distribute,)), (HOIST,), 0.2),
    "distribute_stored": (Pass("distribute_stored", (distribute_stored,)), (), 0.02),
    "commute_gather": (Pass("commute_gather", (commute_gather,)), (HOIST, TABULATE), 0.2),
    "bucket": (Pass("bucket", (bucket,)), (HOIST, JOIN), 0.1),
    "flatten": (Pass("flatten", (flatten,)), (HOIST, DISTRIBUTE), 0.05),
    "fold": (Pass("fold", (fold,)), (), 0.0),
}
MACHINE = Machine("test", 1, 1, 1, 1, 1, 1, 1, 1 << 20)


def same(before: Expr, after: Expr, seed: int) -> None:
    assert dict(after.dims) == dict(before.dims)
    assert after.dtype == before.dtype
    env = environment(before, seed)
    want, got = evaluate(before, env), evaluate(after, env)
    np.testing.assert_array_equal(got.transpose([list(after.dims).index(k) for k in before.dims]), want)


def against_oracle(change: Callable[[Expr], Expr], prepare: tuple[Pass, ...] = ()) -> float:
    """The share of random terms that `change` changed; half of them products with a decode, half anything."""
    fired: list[bool] = []

    @settings(max_examples=EXAMPLES)
    @given(st.one_of(matmuls(), matmuls(), terms()), st.integers(0, 9))
    def check(e: Expr, seed: int) -> None:
        before = run(e, prepare)
        after = change(before)
        fired.append(after is not before)
        if after is not before:
            same(before, after, seed)

    check()
    return sum(fired) / len(fired)


@pytest.mark.parametrize("name", PASSES)
def test_pass(name: str) -> None:
    step, prepare, share = PASSES[name]
    assert against_oracle(step, prepare) >= share


@pytest.mark.parametrize("name", [n for n in PIPELINES if len(PIPELINES[n]) > 1])
def test_pipeline(name: str) -> None:
    assert against_oracle(lambda e: run(e, PIPELINES[name])) >= 0.5


def test_choose_takes_the_cheapest_form() -> None:
    @settings(max_examples=EXAMPLES // 10)
    @given(matmuls(), st.integers(0, 9))
    def check(e: Expr, seed: int) -> None:
        ranked = forms(e, MACHINE)
        assert choose(e, MACHINE) is ranked[0].term
        assert [f.nanoseconds for f in ranked] == sorted(MACHINE.nanoseconds(cost(f.term)) for f in ranked)
        same(e, ranked[0].term, seed)

    check()


@settings(max_examples=EXAMPLES)
@given(st.one_of(terms(), matmuls()))
def test_text_round_trip(e: Expr) -> None:
    assert parse(text(e)) is e
