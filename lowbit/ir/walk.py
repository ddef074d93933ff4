"""Going over a term: each shared node once, and rebuilt only where something changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lowbit.ir.dims import RangeError, fresh_all
from lowbit.ir.expr import Add, Cast, Const, Contract, Expr, Gather, Param, Split, Unpack

Rule = Callable[[Expr], Expr | None]


def topo(*roots: Expr) -> list[Expr]:
    """Every node below the roots, operands first, each once. Iterative: a parsed term may be deep."""
    seen: dict[Expr, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        e, ready = stack.pop()
        if e in seen:
            continue
        if ready:
            seen[e] = None
        else:
            stack.append((e, True))
            stack += [(a, False) for a in reversed(e.args) if a not in seen]
    return list(seen)


def params(*roots: Expr) -> dict[str, Param]:
    """The leaves by name. Raises ValueError, with both types, where one name stands for two leaves.

    >>> from lowbit.ir import param, params
    >>> list(params(param("codes", "u8", n=3) * param("scale", "f16", n=3)))
    ['codes', 'scale']
    """
    out: dict[str, Param] = {}
    for e in topo(*roots):
        if isinstance(e, Param) and out.setdefault(e.name, e) is not e:
            raise ValueError(f"param {e.name!r} occurs as {out[e.name].type} and as {e.type}")
    return out


def substitute(root: Expr, new: Mapping[Expr, Expr]) -> Expr:
    """`root` with nodes replaced; replacements are not searched again.

    >>> from lowbit.ir import param, substitute
    >>> a, b = param("a", "f32", n=3), param("b", "f32", n=3)
    >>> substitute(a * a + 1, {a: b}) is b * b + 1
    True
    """
    done: dict[Expr, Expr] = dict(new)
    for e in topo(root):
        if e not in done:
            done[e] = e.map(done.__getitem__)
    return done[root]


def rewrite(root: Expr, rule: Rule, *, top_down: bool = False) -> Expr:
    """Apply one rule wherever it matches, until it stops matching. The same object when it never did.

    A rule gives an equal term, or None where it does not match. It does not apply where its integers would leave the
    range that the term around them was checked with.

    >>> from lowbit.ir import Merge, param, rewrite
    >>> x = param("x", "f32", k=2)
    >>> def same_name(e):
    ...     return e.x if isinstance(e, Merge) and e.parts == (e.into,) else None
    >>> rewrite(Merge(x, ("k",), "k") + 1, same_name) is x + 1
    True
    """
    done: dict[Expr, Expr] = {}

    def go(e: Expr) -> Expr:
        if e not in done:
            here = e if top_down else e.map(go)
            new = _in_range(rule, here)
            changed = new is not None and new is not here
            done[e] = go(new) if changed and new is not None else here.map(go) if top_down else here
        return done[e]

    return go(root)


def _in_range(rule: Rule, e: Expr) -> Expr | None:
    try:
        new = rule(e)
    except RangeError:
        return None
    if new is None or new.bounds is None or e.bounds is None:
        return new
    return new if e.bounds[0] <= new.bounds[0] and new.bounds[1] <= e.bounds[1] else None


def rename(e: Expr, to: Mapping[str, str]) -> Expr:
    """The same array under other dim names, pushed towards the leaves so that patterns still see the nodes.

    All dims change at once, so one may take the name that another gives up. Bound dims that a new name would capture
    are renamed out of the way first.
    """
    to = {a: b for a, b in to.items() if a in e.dims}
    if not to:
        return e
    if clash := (e.dims.keys() - to.keys()) & set(to.values()):
        raise ValueError(f"rename {to}: {e.type} already has {sorted(clash)}")
    match e:
        case Const(shape, element, data):
            return Const(tuple((to.get(k, k), n) for k, n in shape), element, data)
        case Unpack(x, width, dim, count):
            return Unpack(rename(x, to), width, to.get(dim, dim), count)
        case Gather(table, index, dim):
            bound = fresh_all([dim], {*to.values(), *e.dims})
            return Gather(rename(table, {**to, **bound}), rename(index, to), bound.get(dim, dim))
        case Contract(factors, over, ring, acc):
            bound = fresh_all(sorted(over), {*to.values(), *e.dims})
            new = tuple(rename(f, {**to, **bound}) for f in factors)
            return Contract(new, frozenset(bound.get(d, d) for d in over), ring, acc)
        case Add() | Cast():
            return e.map(lambda a: rename(a, to))
        case _:
            via = fresh_all(to, {*e.dims, *to.values()}) if e.dims.keys() & set(to.values()) else {}
            for a, b in [*via.items(), *((via.get(a, a), b) for a, b in to.items())]:
                e = Split(e, a, ((b, e.dims[a]),))
            return e
