"""How far a lowering may be from the exact value: bounds derived from the arithmetic, never fitted.

u is the unit roundoff of a dtype, gamma(n) = n u / (1 - n u) bounds the relative error of n roundings in any order
(Higham, Accuracy and Stability of Numerical Algorithms, 3.1). `exact_and_bound` carries an absolute bound through a
term, node by node: the running error analysis of Higham 3.3, with every factor and summand at its worst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from lowbit.ir import (
    Add,
    Bitcast,
    Bucket,
    Call,
    Cast,
    Concat,
    Const,
    Contract,
    DType,
    Expr,
    Gather,
    Merge,
    Pad,
    Param,
    Slice,
    Split,
    Unpack,
    cast,
    const,
    evaluate,
    topo,
)
from lowbit.ir.call import call_spec
from lowbit.ir.dtypes import is_float, numpy_dtype, short

Array = np.ndarray[Any, Any]


def expect(condition: object, message: str) -> None:
    """An assertion that `python -O` keeps and pytest does not rewrite."""
    if not condition:
        raise AssertionError(message)


def unit(dtype: Any) -> float:
    """The largest relative error of rounding to nearest."""
    return float(ml_dtypes.finfo(numpy_dtype(short(dtype))).eps) / 2


def tiny(dtype: Any) -> float:
    """The largest absolute error of rounding where results underflow; a CPU may flush subnormals to zero."""
    return float(ml_dtypes.finfo(numpy_dtype(short(dtype))).smallest_normal)


def gamma(n: int, dtype: Any) -> float:
    nu = n * unit(dtype)
    expect(nu < 1, f"{n} roundings to {dtype} leave nothing")
    return nu / (1 - nu)


def dot_tolerance(k: int, acc: Any, out: Any) -> float:
    """Error of a dot product of k terms, summed in `acc` in any order and rounded once to `out`, over sum |x| |w|."""
    return (1 + gamma(k, acc)) * (1 + unit(out)) - 1


def rounded(exact: Array, bound: Array, dtype: Any) -> Array:
    """The bound after one more rounding, to `dtype`."""
    return bound + unit(dtype) * (np.abs(exact) + bound) + tiny(dtype)


def exact_and_bound(root: Expr, env: Mapping[str, Any], order: Sequence[str] | None = None) -> tuple[Array, Array]:
    """The oracle's value of a term, and a bound on the error of any lowering that sums in the term's accumulators.

    Args:
      root: the term.
      env: an array for each of its leaves.
      order: of the dims of both results; that of the term if None.

    Raises AssertionError for an opaque step of rounded operands that does not say how it carries errors
    (`CallSpec.bound`), or for the bits of a rounded value.

    >>> import numpy as np
    >>> from lowbit.ir import param
    >>> x, w = param("x", "f32", m=1, k=3), param("w", "f32", k=3)
    >>> value, bound = exact_and_bound((x * w).sum("k"), {"x": np.ones((1, 3), "f"), "w": np.ones(3, "f")})
    >>> float(value[0]), bool(0 < bound[0] < 1e-6)  # five roundings of at most 2^-24 each: three sums, two factors
    (3.0, True)
    """
    exact: dict[Expr, Array] = {}
    bound: dict[Expr, Array] = {}
    with np.errstate(invalid="ignore"):  # of inf, the bound is NaN: nothing is within it
        for e in topo(root):
            exact[e] = _replay(e, exact) if e.args else evaluate(e, env)
            bound[e] = _bound(e, exact, bound)
    axes = [list(root.dims).index(d) for d in order or root.dims]
    return exact[root].transpose(axes), bound[root].transpose(axes)


def assert_within(actual: Any, exact: Any, bound: Any, what: object = "") -> None:
    """Every element of `actual` is within `bound` of `exact`, elementwise: NaN never is.

    Raises AssertionError with how many are not, and where the worst one is, its value, the exact one and the bound.

    >>> assert_within([1.0, 2.0], [1.0, 2.5], 0.25, "y")
    Traceback (most recent call last):
    AssertionError: y: 1 of 2 differ; at (1,): 2.0, not 2.5 +- 0.25
    """
    a, v, b = (np.asarray(x).astype(np.float64) for x in (actual, exact, bound))
    expect(a.shape == v.shape, f"{what}: shape {a.shape}, not {v.shape}")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is wrong
        error = np.abs(a - v)
        wrong = ~(error <= b)
        excess = np.where(wrong, error - b, -np.inf)
    if wrong.any():
        at = np.unravel_index(int(np.argmax(np.where(np.isnan(excess), np.inf, excess))), a.shape)
        limit = np.broadcast_to(b, a.shape)[at]
        where = f"{wrong.sum()} of {a.size} differ; at {tuple(map(int, at))}"
        raise AssertionError(f"{what}: {where}: {float(a[at])}, not {float(v[at])} +- {limit:.3g}")


def _replay(e: Expr, values: Mapping[Expr, Array]) -> Array:
    """The node alone, over these values of its operands."""
    operands = list(dict.fromkeys(e.args))
    leaf = {a: Param(f"v{i}", tuple(a.dims.items()), a.dtype, a.bounds) for i, a in enumerate(operands)}
    return evaluate(e.map(leaf.__getitem__), {leaf[a].name: values[a] for a in operands})


def _bound(e: Expr, exact: Mapping[Expr, Array], bound: Mapping[Expr, Array]) -> Array:
    none = np.zeros(list(e.dims.values()))
    rounded = bound if is_float(e.dtype) else {}
    match e:
        case Param() | Const() | Unpack():
            return none
        case Call():
            return _call(e, exact, bound)
        case _ if not is_float(e.dtype) or isinstance(e, Bitcast):
            expect(not any(bound[a].any() for a in e.args), f"{e}: the bits of a rounded value")
            return none
        case Gather(table, index, _):
            return _replay(e, {table: rounded[table], index: exact[index]})
        case Split() | Merge() | Slice() | Pad() | Concat():
            return _replay(e, rounded)
        case Cast(x, to, rounds):
            # The oracle rounds the exact value, the lowering another one near it.
            return bound[x] + (2 * _step(np.abs(exact[x]) + bound[x], 1, to) if rounds else 0)
        case Add():
            carried = _replay(e, bound)
            return carried + _step(np.abs(exact[e]) + carried, 1, e.dtype)
        case Bucket():
            return _sum(e, _replay, exact, bound, prod(n for k, n in _operand_dims(e).items() if k in e.over))
        case Contract(factors, over, _, _):
            terms = prod(n for k, n in _operand_dims(e).items() if k in over)
            return _sum(e, _product, exact, bound, terms + len(factors))
        case _:
            raise AssertionError(e)


def _call(e: Call, exact: Mapping[Expr, Array], bound: Mapping[Expr, Array]) -> Array:
    """What the step states; without that it may round its result once, and takes no operand that was rounded."""
    spec = call_spec(e.name)
    if spec.bound is not None:
        return spec.bound(*(exact[o] for o in e.operands), *(bound[o] for o in e.operands))
    exact_operands = not any(bound[o].any() for o in e.operands)
    expect(exact_operands, f"call {e.name!r} of a rounded value: register it with `bound=`")
    return _step(np.abs(exact[e]), 1, e.dtype) if is_float(e.dtype) else np.zeros(exact[e].shape)


def _operand_dims(e: Expr) -> dict[str, int]:
    return {k: n for a in e.args for k, n in a.dims.items()}


def _sum(e: Expr, value: Any, exact: Mapping[Expr, Array], bound: Mapping[Expr, Array], roundings: int) -> Array:
    """A sum of products: what the operands carry, at most, and the roundings of its own."""
    index = {e.index: exact[e.index]} if isinstance(e, Bucket) else {}
    size = {a: np.abs(exact[a]) for a in e.args}
    largest = value(e, {a: size[a] + bound[a] for a in e.args} | index)
    return largest - value(e, size | index) + _step(largest, roundings, e.dtype)


def _product(e: Contract, values: Mapping[Expr, Array]) -> Array:
    """The sum of products in float64, also for factors that were integers: magnitudes may leave their range."""
    leaf = {a: Param(f"v{i}", tuple(a.dims.items()), "f64") for i, a in enumerate(dict.fromkeys(e.factors))}
    term = Contract(tuple(leaf[f] for f in e.factors), e.over, "real", "f64")
    return evaluate(term, {leaf[a].name: values[a].astype(np.float64) for a in leaf})


def _step(size: Array, roundings: int, dtype: DType) -> Array:
    return size * gamma(roundings, dtype) + roundings * tiny(dtype)


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
            case Call():
                step = e.map(new.__getitem__)
                new[e] = cast(step, "f64") if is_float(e.dtype) else step
            case _:
                new[e] = e.map(new.__getitem__)
    return new[root]
