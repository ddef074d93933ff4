"""Going over terms: order, leaves, replacing, and renaming without capture."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.ir import Add, Expr, add, const, contract, evaluate, param, params, topo
from lowbit.ir.dims import fresh, fresh_all
from lowbit.ir.walk import rename, rewrite, substitute
from tests.terms import environment, terms

X = param("x", "f32", m=2, k=8)


def test_operands_come_first_and_each_node_once() -> None:
    shared = X + 1
    nodes = topo(shared * shared, shared)
    assert nodes.index(X) < nodes.index(shared) < nodes.index(shared * shared)
    assert len(nodes) == len(set(nodes)) == 4


def test_two_leaves_of_one_name_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"param 'x' occurs as f32\[m=2 k=8\] and as f16\[k=8\]"):
        params(contract((X, param("x", "f16", k=8)), ()))


def test_substitute_does_not_search_what_it_put_in() -> None:
    assert substitute(X + 1, {X: X + 1}) is X + 1 + 1


def test_rewrite_runs_until_nothing_matches_and_keeps_what_it_does_not_touch() -> None:
    def halve(e: Expr) -> Expr | None:
        if isinstance(e, Add) and isinstance(e.b, type(const(0, "f32"))) and e.b.values > 1:
            return add(e.a, const(e.b.values / 2, "f32"))
        return None

    for top_down in (False, True):
        assert rewrite((X + 8) * X, halve, top_down=top_down) is (X + 1) * X
        assert rewrite(X * X, halve, top_down=top_down) is X * X


@given(terms(), st.randoms(use_true_random=False))
def test_renamed_terms_have_the_same_value(e: Expr, random) -> None:
    names = [*e.dims, "fresh_a", "g", "g_1"]
    new = list(dict.fromkeys(names))
    random.shuffle(new)
    to = dict(zip(e.dims, new, strict=False))  # swaps and chains among the dims that the term has, and new names
    renamed = rename(e, to)
    assert dict(renamed.dims) == {to[k]: n for k, n in e.dims.items()}
    env = environment(e, 0)
    got = evaluate(renamed, env).transpose([list(renamed.dims).index(to[k]) for k in e.dims])
    np.testing.assert_array_equal(got, evaluate(e, env))


def test_rename_onto_a_dim_that_stays_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rename \{'m': 'k'\}: f32\[m=2 k=8\] already has \['k'\]"):
        rename(X, {"m": "k"})


def test_fresh_names_are_counted_up() -> None:
    assert fresh("k", ()) == "k"
    assert fresh("k", {"k", "k_1"}) == "k_2"
    assert fresh("k_1", {"k", "k_1"}) == "k_2"
    assert fresh_all(["a", "b"], {"a", "a_1"}) == {"a": "a_2"}
    assert fresh_all(["k", "k_1"], {"k", "k_1"}) == {"k": "k_2", "k_1": "k_3"}
