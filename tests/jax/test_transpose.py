"""The transposed term against `jax.vjp` of the term, on random float terms.

In float64 throughout: `jax.vjp` rounds every cotangent to the type of its primal, where a transposed term stays in its
accumulator, so in narrow types the two differ by design.
"""

from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lowbit.ir import (
    Add,
    Bitcast,
    Bucket,
    Call,
    Concat,
    Contract,
    Expr,
    Gather,
    Merge,
    NotDifferentiableError,
    Pad,
    Param,
    Slice,
    Split,
    cast,
    contract,
    param,
    params,
    topo,
    transpose,
)
from lowbit.ir.dtypes import is_float
from lowbit.passes.lower_xla import emit
from lowbit.testing.tolerance import assert_within, exact_and_bound, gamma, in_float64
from tests.terms import environment, terms

LINEAR = {Add, Bucket, Concat, Contract, Gather, Merge, Pad, Slice, Split}
"""The nodes that have a cotangent, less Cast, which is the identity in float64."""


def pulled(e: Expr, env: dict[str, np.ndarray], dy: np.ndarray) -> dict[str, jax.Array]:
    """`jax.vjp` of the lowered term: the cotangent of every float leaf."""
    floats = {name: env[name] for name, leaf in params(e).items() if is_float(leaf.dtype)}

    @jax.jit
    def pull(floats, dy):
        return jax.vjp(lambda f: emit(e, {**env, **f}), floats)[1](dy)[0]

    return pull(floats, dy)


def live(e: Expr, leaf: Expr) -> set[Expr]:
    out = {leaf}
    for n in topo(e):
        if out.intersection(n.args):
            out.add(n)
    return out


def check(e: Expr, seed: int) -> set[type]:
    """Compares every leaf; returns the kinds of nodes that a cotangent went through."""
    dy = Param("dy", tuple(e.dims.items()), e.dtype)
    env = environment(e, seed) | environment(dy, seed + 1)
    want = pulled(e, env, env["dy"])
    seen: set[type] = set()
    for name in want:
        leaf = params(e)[name]
        through = {type(n) for n in live(e, leaf)}
        if through & {Call, Bitcast}:
            with pytest.raises(NotDifferentiableError, match=r"(Call|Bitcast) of .* has no cotangent"):
                transpose(e, leaf, dy)
            continue
        term = transpose(e, leaf, dy)
        assert dict(term.dims) == dict(leaf.dims)
        exact, bound = exact_and_bound(term, env)
        exact, bound = (a.transpose([list(term.dims).index(d) for d in leaf.dims]) for a in (exact, bound))
        assert_within(want[name], exact, bound, term)
        seen |= through
    return seen


@pytest.mark.slow
def test_random_terms():
    seen: Counter[type] = Counter()

    @given(terms(), st.integers(0, 9))
    def property_(e: Expr, seed: int) -> None:
        e = in_float64(e)
        assume(any(is_float(leaf.dtype) for leaf in params(e).values()))
        with jax.enable_x64(True):
            seen.update(check(e, seed))

    property_()
    assert LINEAR <= set(seen), f"no cotangent went through {LINEAR - set(seen)}"


# ---------------------------------------------------------------- what is not linear, not float, or not there


def test_cast_passes_the_cotangent_on_unrounded():
    """f16 scales: the cotangent is summed in float32 and rounded only where it is stored."""
    x, a = param("x", "f32", None, m=3, k=300), param("a", "f16", None, k=300)
    dy = param("dy", "bf16", None, m=3)
    term = transpose(contract((x, cast(a, "f32")), ("k",)), a, dy)
    assert term.dtype == "f32" and dict(term.dims) == {"k": 300}
    env = environment(term, 0, exact=False)
    exact, bound = exact_and_bound(term, env)
    assert_within(jax.jit(lambda env: emit(term, env))(env), exact, bound)
    want = env["x"].astype(np.float64).T @ env["dy"].astype(np.float64)
    assert_within(
        exact, want, gamma(8, "f64") * (np.abs(env["x"]).astype(np.float64).T @ np.abs(env["dy"].astype(np.float64)))
    )


def test_rounding_cast_counts_as_the_identity():
    a = param("a", "f32", None, k=3)
    dy = param("dy", "f32", None, k=3)
    assert transpose(cast(a, "f16"), a, dy) is dy


def test_leaf_used_twice_gets_both_cotangents():
    a, x = param("a", "f64", None, k=5), param("x", "f64", None, k=5)
    e = (a * a * x).sum("k") + (a * 3).sum("k")
    with jax.enable_x64(True):
        check(e, 0)


K = param("k", "u8", None, k=3)
A = param("a", "f32", None, k=3)


@pytest.mark.parametrize(
    ("term", "leaf", "dims", "message"),
    [
        (A * K, K, ("k",), r"'k' is u8\[k=3\]: integer codes have no cotangent"),
        (A * K, param("b", "f32"), ("k",), r"the term does not depend on 'b': f32\[\]"),
        (A * K, A, (), r"the cotangent is f32\[\] but the term is f32\[k=3\]: the dims must be equal"),
    ],
)
def test_errors(term: Expr, leaf: Param, dims: tuple[str, ...], message: str):
    with pytest.raises(NotDifferentiableError, match=f"^{message}$"):
        transpose(term, leaf, param("dy", "f32", None, **dict.fromkeys(dims, 3)))


def test_a_double_in_between_is_kept():
    """A float32 leaf and cotangent, a float64 product between them."""
    a, b = param("a", "f32", None, k=3), param("b", "f64", None, k=3)
    e = cast((cast(a, "f64") * b).sum("k"), "f32")
    assert transpose(e, a, param("dy", "f32")).dtype == "f64"
