"""f(fields of one word)  =  table_f[word]

Whatever a decode does to the fields of one word (signs, affine maps, xor networks), there are only 2**width words:
the oracle evaluates f on all of them at compile time. The largest such f is taken, over the smallest leaf-side word.
"""

from __future__ import annotations

from math import prod

from lowbit.ir.build import const
from lowbit.ir.dims import fresh
from lowbit.ir.expr import (
    CONST_LIMIT,
    Bucket,
    Call,
    Concat,
    Const,
    Expr,
    Gather,
    Merge,
    Pad,
    Param,
    Slice,
    Split,
    Unpack,
)
from lowbit.ir.walk import substitute, topo
from lowbit.passes.fold import constant


def tabulate(e: Expr) -> Expr | None:
    """Apply top-down, so that the largest function is found first."""
    nodes = topo(e)
    if isinstance(e, Const | Param) or not any(isinstance(n, Unpack) for n in nodes):
        return None
    for word in nodes[:-1]:
        if word.bounds is None or isinstance(word, Const) or not is_function_of(e, word):
            continue
        between = between_nodes(e, word)
        if any(isinstance(n, Unpack) for n in between) and (table := table_of(e, word)):
            return Gather(*table)
    return None


def is_function_of(e: Expr, word: Expr) -> bool:
    """Whether e[i, ...] depends on word[i] alone, for i the dims of `word`: no other leaf, no step along i."""
    dependent = between_nodes(e, word)
    if not dependent or any(isinstance(n, Param) for n in _cut(e, word)):
        return False
    live = {word, *dependent}
    return all(word.dims.items() <= n.dims.items() and not _steps_along(n, word, live) for n in dependent)


def _steps_along(n: Expr, word: Expr, live: set[Expr]) -> bool:
    """Whether the node may move elements along a dim of `word` and still have that dim, or sets others beside them."""
    match n:
        case Concat(parts, dim):
            return dim in word.dims or not live.issuperset(parts)
        case Call():
            return True
        case Merge(_, parts, _):
            return not word.dims.keys().isdisjoint(parts)
        case Split(_, dim, _) | Slice(_, dim) | Pad(_, dim) | Bucket(_, _, dim):
            return dim in word.dims
        case _:
            return False


def table_of(e: Expr, word: Expr) -> tuple[Const, Expr, str] | None:
    """(table, word, dim) with e = Gather(table, word, dim); None if the table is too large to be a Const."""
    if word.bounds is None or word.bounds[0] < 0:
        return None
    size = word.bounds[1] + 1
    extra = {k: n for k, n in e.dims.items() if k not in word.dims}
    if size * prod(extra.values()) > CONST_LIMIT:
        return None
    dim = fresh("c", {k for n in topo(e) for k in n.dims})
    every_word = const([max(word.bounds[0], i) for i in range(size)], word.dtype, dim)  # in range, as e demands
    table = constant(substitute(e, {word: every_word}))
    return None if table is None else (table, word, dim)


def between_nodes(e: Expr, word: Expr) -> list[Expr]:
    """The nodes of `e` that depend on `word`, without `word`."""
    live = {word}
    for n in _cut(e, word):
        if live.intersection(n.args):
            live.add(n)
    return [n for n in live if n is not word]


def _cut(e: Expr, word: Expr) -> list[Expr]:
    """The nodes of `e` that are reached without going below `word`."""
    seen: set[Expr] = {word}
    stack, out = [e], []
    while stack:
        n = stack.pop()
        if n not in seen:
            seen.add(n)
            out.append(n)
            stack += n.args
    order = {n: i for i, n in enumerate(topo(e))}
    return sorted(out, key=order.__getitem__)
