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
    Cast,
    Concat,
    Const,
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
    const,
    contract,
    param,
    params,
    topo,
    transpose,
)
from lowbit.ir.dtypes import is_float
from lowbit.passes.lower_xla import emit
from tests.terms import environment, matmuls, terms
from tests.tolerance import assert_within, exact_and_bound, gamma

LINEAR = {Add, Bucket, Concat, Contract, Gather, Merge, Pad, Slice, Split}
"""The nodes that have a cotangent, less Cast, which is the identity in float64."""


def in_float64(root: Expr) -> Expr:
    """The same term without rounding. Floats that are bits of integers are converted."""
    new: dict[Expr, Expr] = {}
    for e in topo(root):
        match e:
            case Param(name, shape, dtype, _) if is_float(dtype):
                new[e] = Param(f"{name}_64", shape, "f64")
            case Const() if is_float(e.dtype):
                new[e] = const(e.values.astype(np.float64), "f64", *e.dims)
            case Bitcast():
                new[e] = cast(e, "f64") if is_float(e.dtype) else e
            case Cast(x, to, _):
                new[e] = cast(new[x], "f64" if is_float(to) else to)
            case Contract(factors, over, ring, acc):
                new[e] = Contract(tuple(new[f] for f in factors), over, ring, "f64" if is_float(acc) else acc)
            case _:
                new[e] = e.map(new.__getitem__)
    return new[root]


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
        if Call in through:  # all that has no cotangent here; integers come from no float
            with pytest.raises(NotDifferentiableError, match="Call of .* has no cotangent"):
                transpose(e, leaf, dy)
            continue
        term = transpose(e, leaf, dy)
        assert dict(term.dims) == dict(leaf.dims)
        exact, bound = exact_and_bound(term, env)
        # vjp sums in another order, so it may err as much as the term does, and once more where cotangents meet.
        exact, bound = (a.transpose([list(term.dims).index(d) for d in leaf.dims]) for a in (exact, bound))
        assert_within(want[name], exact, bound, term)
        seen |= through
    return seen


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
