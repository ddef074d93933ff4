"""Every pass against the oracle on random terms: values must be equal, not close (see tests/terms.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.ir import (
    Bucket,
    Call,
    CallSpec,
    Cast,
    Concat,
    Contract,
    Expr,
    Gather,
    Merge,
    Slice,
    Unpack,
    cast,
    const,
    contract,
    cost,
    evaluate,
    param,
    parse,
    register_call,
    text,
)
from lowbit.passes import (
    PIPELINES,
    Machine,
    Pass,
    bucket,
    bucket_shared,
    choose,
    commute_bucket,
    commute_gather,
    commute_gather_shared,
    distribute,
    distribute_stored,
    flatten,
    fold,
    forms,
    hoist_merge,
    hoist_slice,
    join_planes,
    run,
    split_index,
    tabulate,
)
from lowbit.passes.choose import TIE
from tests.terms import EXAMPLES, environment, matmuls, ordered, terms

HOIST, TABULATE, DISTRIBUTE = PIPELINES["table"][2:5]
JOIN = PIPELINES["join"][3]
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
    "split_index": (Pass("split_index", (split_index,)), (HOIST, JOIN), 0.1),
    "fold": (Pass("fold", (fold,)), (), 0.0),
}
# Of an order of the inputs; which random terms hardly ever have.
SHARED = {
    "bucket_shared": bucket_shared,
    "commute_gather_shared": commute_gather_shared,
    "commute_bucket": commute_bucket,
}
MACHINE = Machine("test", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 << 20)


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


LONG = {"planes", "bucket", "table"}
"""Pipelines that take longest; the quick tests have the passes that they are made of."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in PIPELINES if len(PIPELINES[n]) > 1],
)
def test_pipeline(name: str) -> None:
    assert against_oracle(lambda e: run(e, PIPELINES[name])) >= {"select": 0.05, "apart": 0.1}.get(name, 0.5)


def ordered_against_oracle(change: Callable[[Expr], Expr], examples: int = EXAMPLES) -> float:
    """The share of products with weights in another order, or of what gradients are made of, that `change` changed."""
    fired: list[bool] = []

    @settings(max_examples=examples)
    @given(ordered(), st.integers(0, 9))
    def check(e: Expr, seed: int) -> None:
        after = change(e)
        fired.append(after is not e)
        if after is not e:
            same(e, after, seed)

    check()
    return sum(fired) / len(fired)


@pytest.mark.parametrize("name", SHARED)
def test_pass_of_an_order(name: str) -> None:
    assert ordered_against_oracle(Pass(name, (SHARED[name],))) >= 0.2


@pytest.mark.parametrize("name", [n for n in PIPELINES if len(PIPELINES[n]) > 1])
def test_pipeline_of_an_order(name: str) -> None:
    assert ordered_against_oracle(lambda e: run(e, PIPELINES[name]), EXAMPLES // 10) >= (0 if name == "select" else 0.9)


def test_a_pipeline_whose_defining_pass_changes_nothing_gives_no_form() -> None:
    e = contract((param("a", "f32", k=8), Merge(param("w", "f32", n=3, g=2, j=4), ("g", "j"), "k")), ("k",))
    assert HOIST(e) is not e and run(e, PIPELINES["select"]) is e


def test_choose_takes_the_cheapest_form() -> None:
    @settings(max_examples=EXAMPLES // 10)
    @given(matmuls(), st.integers(0, 9))
    def check(e: Expr, seed: int) -> None:
        ranked = forms(e, MACHINE)
        assert choose(e, MACHINE) is ranked[0].term
        first, *rest = [MACHINE.nanoseconds(cost(f.term)) for f in ranked]
        assert rest == sorted(rest) and all(first <= TIE * other for other in rest)
        same(e, ranked[0].term, seed)

    check()


@settings(max_examples=EXAMPLES)
@given(st.one_of(terms(), matmuls()))
def test_text_round_trip(e: Expr) -> None:
    assert parse(text(e)) is e


def x(within: tuple[int, int] | None = None, /, **dims: int) -> Expr:
    return param("x", "f32", **dims) if within is None else param("x", "i32", within, **dims)


T, CODE = param("t", "f32", c=4, c_1=4, v=8), param("i", "u8", (0, 3), n=3)
TWO, FEW = Slice(param("w", "u8", (1, 2), p=3, n=40), "n", 0, 39), const([100, 0], "i32", "k")
TRITS = param("trits", "u8", (0, 2), p=2, n=3)
INDEX = contract((x((0, 1)), param("y", "i32", (0, 3)) + -3), ()) + 3
T_OF_N, ORDER = param("t", "f32", n=3, c=4), param("i", "u8", (0, 3), k=6)
NOTHING = Contract((x((0, 1 << 29), k=6), param("y", "i32", (0, 0), n=3)), frozenset(), "real", "i32")
OUTER = contract((x(m=2, k=6), param("y", "f32", m=2, n=3)), ("m",))
# Terms that once broke a pass; whether it applies.
EXAMPLES_OF: list[tuple[str, bool, Expr]] = [
    # a new name for a dim that is taken is also no kept dim's name
    ("hoist_merge", True, contract((x(k=8, g=2), Merge(param("w", "f32", j=4, g=2, g_1=2), ("j", "g"), "k")), ("k",))),
    ("commute_gather", True, contract((x(v=8, c=4), Gather(T, CODE, "c")), ("v",))),
    ("bucket", True, contract((x(n=3, c=4), Gather(T, CODE, "c")), ("n",))),
    # an order of the inputs that all outputs share moves to the activations, and an index of each output does not
    ("bucket_shared", True, contract((x(m=2, k=6), Gather(T_OF_N, ORDER, "c")), ("k",))),
    ("bucket_shared", False, contract((x(m=2, n=3), Gather(T_OF_N, CODE, "c")), ("n",))),
    ("commute_gather_shared", True, contract((param("y", "f32", m=2, n=3), Gather(T_OF_N, ORDER, "c")), ("n",))),
    ("commute_gather_shared", False, contract((param("y", "f32", n=3, k=6), Gather(T_OF_N, ORDER, "c")), ("n",))),
    # what goes into a bucket is a product of what the index sees with what it does not; names are not captured
    ("commute_bucket", True, Bucket(OUTER, ORDER, "c", 4, frozenset("k"))),
    ("commute_bucket", True, Bucket(OUTER, ORDER, "n_1", 4, frozenset("k"))),
    ("commute_bucket", False, Bucket(OUTER, ORDER, "m", 4, frozenset("k"))),
    ("commute_bucket", False, Bucket(OUTER, param("i", "u8", (0, 3), k=6, n=3), "c", 4, frozenset("k"))),
    ("commute_bucket", False, Bucket(OUTER, ORDER, "c", 4, frozenset(("k", "n")))),
    # a factor that shrinks is what keeps the bucket sums within their type
    ("commute_bucket", False, Bucket(NOTHING, ORDER, "c", 4, frozenset("k"))),
    # integers that would outgrow their type, or the index that they are
    ("hoist_slice", False, contract((Slice(param("w", "i32", (0, 1 << 28), k=8), "k", 0, 4),), ("k",))),
    ("distribute", False, contract((param("a", "i32", (0, 1 << 16)) + -(1 << 15), x((0, 1 << 15))), ())),
    ("distribute", False, Gather(param("t", "f32", c=4), INDEX, "c")),
    # a range that becomes narrower makes a rounding conversion exact
    ("fold", True, x(k=2) * Cast(contract((FEW, const([0, 100], "i32", "k")), ()), "bf16", True)),
    # what stands beside the fields of a word knows nothing of the word
    ("tabulate", True, Concat((Unpack(CODE, 1, "v", 8), const(np.ones((3, 2)), "u8", "n", "v")), "v")),
    # words below the range of a word mean nothing
    ("join_planes", True, contract((x(p=3), cast(TWO - 1, "u8")), ("p",))),
    ("join_planes", True, contract((x(p=3), Gather(const([1.0, 2.0], "f32", "c"), TWO - 1, "c")), ("p",))),
    # digits of any base, in any order, but each entry of the table has one spelling
    ("split_index", True, Gather(x(n=3, p=4, c=9), contract((TRITS, const([3, 1], "i32", "p")), ("p",)), "c")),
    ("split_index", False, Gather(x(n=3, c=9), contract((TRITS, const([2, 1], "i32", "p")), ("p",)), "c")),
    ("split_index", False, Gather(x(n=3, c=12), contract((TRITS, const([3, 1], "i32", "p")), ("p",)), "c")),
]


@pytest.mark.parametrize(("name", "applies", "e"), EXAMPLES_OF, ids=[n for n, _, _ in EXAMPLES_OF])
def test_examples(name: str, applies: bool, e: Expr) -> None:
    after = (PASSES[name][0] if name in PASSES else Pass(name, (SHARED[name],)))(e)
    assert (after is not e) is applies
    same(e, after, 0)


def test_a_constant_is_not_computed_to_find_that_it_is_too_large() -> None:
    called: list[int] = []
    register_call("counted", CallSpec(lambda t: t, lambda v: called.append(1) or v, lambda t: 0))
    ones = const(np.ones(4096), "f32", "n")
    assert fold(contract((Call("counted", (ones,)), const([1.0, 1.0], "f32", "m")), ())) is None
    assert not called
