"""Reading 5: the cotangent of a term in one leaf, again a term, so it gets the same passes and the same lowerings.

For y = e(leaf, ...) and a cotangent dy of y, `transpose(e, leaf, dy)` is the sum over y's elements of
dy * dy/dleaf. Codes are integers and have none.
"""

from __future__ import annotations

from typing import assert_never

from lowbit.ir.build import add, broadcast, cast, contract, pad, slice_
from lowbit.ir.dims import fresh_all, union
from lowbit.ir.dtypes import DType, is_float
from lowbit.ir.expr import (
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
    Pad,
    Param,
    Slice,
    Split,
    Unpack,
)
from lowbit.ir.walk import rename, topo


class NotDifferentiableError(TypeError):
    """The term has no cotangent in that leaf; the message says which node is in the way."""


def transpose(e: Expr, leaf: Param, dy: Expr) -> Expr:
    """The cotangent of `e` in `leaf`: dims of the leaf, float32 (float64 where `e` or `dy` has any).

    Args:
      e: a float term.
      leaf: a float Param of it.
      dy: the cotangent of `e`, with the dims of `e`: usually a Param.

    Raises NotDifferentiableError for an integer leaf, one that `e` does not hold, or one behind an opaque step.

    >>> from lowbit.ir import param, transpose
    >>> x, w = param("x", "f32", m=2, k=8), param("w", "f32", k=8)
    >>> print(transpose((x * w).sum("k"), w, param("dy", "f32", m=2)))
    %0 = param dy                    : f32[m=2]
    %1 = param x                     : f32[m=2 k=8]
    %2 = sum[m] %0 * %1              : f32[k=8]
    """
    if not is_float(leaf.dtype):
        raise NotDifferentiableError(f"{leaf.name!r} is {leaf.type}: integer codes have no cotangent")
    if dict(dy.dims) != dict(e.dims):
        raise NotDifferentiableError(f"the cotangent is {dy.type} but the term is {e.type}: the dims must be equal")
    nodes = topo(e)
    acc: DType = "f64" if any(n.dtype == "f64" for n in (dy, *nodes)) else "f32"
    live: set[Expr] = {leaf}
    for n in nodes:
        if live.intersection(n.args):
            live.add(n)
    if e not in live:
        raise NotDifferentiableError(f"the term does not depend on {leaf.name!r}: {leaf.type}")
    cotangent: dict[Expr, Expr] = {e: cast(dy, acc)}
    for n in reversed(nodes):
        if n not in live or n not in cotangent or n is leaf:
            continue
        for at, operand in enumerate(n.args):
            if operand in live:
                term = _pull(n, at, cotangent[n])
                cotangent[operand] = add(cotangent[operand], term) if operand in cotangent else term
    return cotangent[leaf]


def _pull(e: Expr, at: int, dy: Expr) -> Expr:
    """The cotangent of operand `at` of `e`, with all of that operand's dims."""
    x = e.args[at]
    match e:
        case Add():
            return contract((dy,), dy.dims.keys() - x.dims.keys(), acc=dy.dtype)
        case Contract(factors, _, "real", _):
            return _pull_contract(factors, at, dy)
        case Gather(_, index, dim) if at == 0:
            gone = union("bucket", dy.dims, index.dims).keys() - x.dims.keys()
            return Bucket(dy, index, dim, x.dims[dim], frozenset(gone))
        case Bucket() if at == 0:
            return _pull_bucket(e, dy)
        case Split(_, dim, into):
            return Merge(dy, tuple(k for k, _ in into), dim)
        case Merge(_, parts, into):
            return Split(dy, into, tuple((p, x.dims[p]) for p in parts))
        case Cast():
            return dy
        case Slice(_, dim, start, stop):
            return pad(dy, dim, start, x.dims[dim] - stop)
        case Pad(_, dim, before, _):
            return slice_(dy, dim, before, before + x.dims[dim])
        case Concat(parts, dim):
            start = sum(p.dims[dim] for p in parts[:at])
            return slice_(dy, dim, start, start + x.dims[dim])
        case Contract() | Gather() | Bucket() | Unpack() | Bitcast() | Call() | Param() | Const():
            raise NotDifferentiableError(f"{type(e).__name__} of {x.type} has no cotangent")
        case _:
            assert_never(e)


def _pull_contract(factors: tuple[Expr, ...], at: int, dy: Expr) -> Expr:
    x, others = factors[at], factors[:at] + factors[at + 1 :]
    terms = (dy, *others)
    have = union("transpose", *(t.dims for t in terms))
    pulled = contract(terms, have.keys() - x.dims.keys(), acc=dy.dtype)
    return broadcast(pulled, x.dims)


def _pull_bucket(e: Bucket, dy: Expr) -> Expr:
    # dy has the dim that e made, and e's operands may have another of that name: look up under a fresh one.
    back = fresh_all([e.dim], {*e.x.dims, *e.index.dims})
    dim = back.get(e.dim, e.dim)
    looked_up = Gather(rename(dy, back), e.index, dim)
    pulled = contract((looked_up,), looked_up.dims.keys() - e.x.dims.keys(), acc=dy.dtype)
    return broadcast(pulled, e.x.dims)
