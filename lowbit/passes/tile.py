"""e = the sum, or the stack, of e over slices of one dim: made part by part, no array in between is large.

    e = sum_i e[d = slice i]       when the root sums over d, and every other node keeps d as it gets it
    e = stack_i e[d = slice i]     when the root keeps d too

An identity like the others, but with a loop in it, which no term can say: lowerings apply it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from lowbit.ir.call import call_spec
from lowbit.ir.cost import is_select, is_slice, nbytes
from lowbit.ir.dims import Dims, RangeError, fresh
from lowbit.ir.dtypes import bits
from lowbit.ir.expr import Bitcast, Bucket, Call, Concat, Const, Contract, Expr, Gather, Merge, Pad, Param, Slice, Split
from lowbit.ir.order import dots, slot_dims
from lowbit.ir.walk import params, substitute, topo
from lowbit.passes.one_loop import added_up, one_loop


@dataclass(frozen=True)
class Tiles:
    """A term in parts.

    Attributes:
      dim: the dim that is cut.
      size: of a part along it; the last part has what remains.
      sums: whether the parts are summed; else they are stacked along the dim.
      outer: what is computed once, by the name of the leaf that stands for it in `term`: all that does not depend on
        the part, and constants that are cut like stored arrays.
      term: the whole term over those leaves.
    """

    dim: str
    size: int
    sums: bool
    outer: Mapping[str, Expr]
    term: Expr

    @property
    def total(self) -> int:
        return next(p.dims[self.dim] for p in params(self.term).values() if self.dim in p.dims)

    def part(self, size: int) -> Expr:
        """The term over leaves that have `size` along the dim."""
        new: dict[Expr, Expr] = {
            p: Param(p.name, tuple((k, size if k == self.dim else n) for k, n in p.shape), p.element, p.within)
            for p in params(self.term).values()
            if self.dim in p.dims
        }
        return substitute(self.term, new)


def tile(e: Expr, limit: float) -> Tiles | None:
    """The parts in which to make `e` so that no array in between has more than `limit` bytes, as far as one dim goes.

    None when nothing is that large, or no dim can be cut. A part may be too large still: tile it again.
    """
    if written(e) <= limit:
        return None
    found = [t for dim in _candidates(e) if (t := _along(e, dim, limit)) is not None]
    enough = max([limit, *sorted(map(_least, found))[:1]])
    return next((t for t in found if _least(t) <= enough), None)


def _least(t: Tiles) -> int:
    """Bytes of the largest array that the thinnest parts need, what is computed once included."""
    return max([written(t.part(1)), *(max(nbytes(e), written(e)) for e in t.outer.values())])


def written(e: Expr) -> int:
    """Bytes of the largest array below the root that a lowering has to write: the others fuse into their consumer."""
    nodes = topo(e)
    loops = {n: step for n in nodes if isinstance(n, Contract) and (step := one_loop(n))}
    fused = {f for n in loops for f in n.factors if isinstance(f, Gather)}
    looked_up = (n for n in nodes if isinstance(n, Gather | Bucket) and not (is_select(n) or is_slice(n)))
    found = [nbytes(n) for n in looked_up if n is not e and n not in fused]
    found += [_size(added_up(step), n) for n, step in loops.items()]
    for n in nodes:
        if isinstance(n, Contract) and n not in loops:
            dims = slot_dims(n)
            for at, step in dots(n).items():
                computed = [s for s in step.slots if s >= len(n.factors) or n.factors[s].args]
                result = [at] if n is not e or at < len(dims) - 1 else []
                found += [_size(dims[s], n) for s in (*computed, *result)]
    return max(found, default=0)


def largest_operand(e: Expr) -> Expr | None:
    """The largest operand of a matrix product that is computed, before it is merely reshaped; None without one."""
    found: list[Expr] = []
    for n in topo(e):
        if isinstance(n, Contract) and one_loop(n) is None:
            factors = (s for step in dots(n).values() for s in step.slots if s < len(n.factors))
            found += [_unshaped(n.factors[s]) for s in factors]
    return max((f for f in found if f.args), key=nbytes, default=None)


def _unshaped(e: Expr) -> Expr:
    while isinstance(e, Merge | Split):
        e = e.x
    return e


def _size(dims: Dims, e: Contract) -> int:
    return prod(dims.values()) * bits(e.acc) // 8


def _candidates(e: Expr) -> list[str]:
    """Dims to cut, the outermost of the largest stored integer array first: its slices are contiguous."""
    codes = [p for p in params(e).values() if p.bounds is not None] or list(params(e).values())
    stored = max(codes, key=nbytes, default=None)
    return list(stored.dims) if stored is not None else []


def _along(e: Expr, dim: str, limit: float) -> Tiles | None:
    sums = dim not in e.dims
    if sums and not (isinstance(e, Contract) and e.ring == "real" and dim in e.over):
        return None
    nodes = topo(e)
    if not all(keeps(n, dim) for n in nodes if not (sums and n is e)):
        return None
    outer = dict(_invariant(e, dim, {n.name for n in nodes if isinstance(n, Param)}))
    try:
        term = substitute(e, {whole: leaf for leaf, whole in outer.items()})
    except RangeError:  # the sum of a Const's own entries was in range, that of any entries as large is not
        return None
    tiles = Tiles(dim, 1, sums, {leaf.name: whole for leaf, whole in outer.items()}, term)
    if _least(tiles) >= written(e):
        return None
    return Tiles(dim, _part_size(tiles.total, written(e), limit), sums, tiles.outer, term)


def keeps(e: Expr, dim: str) -> bool:
    """Whether a slice of `e` along `dim` is `e` over the same slice of its operands."""
    if isinstance(e, Param | Const):  # a Const with the dim becomes a leaf
        return True
    comes = any(dim in a.dims for a in e.args)
    if comes != (dim in e.dims):
        return False
    match e:
        case Split(_, d, _) | Slice(_, d, _, _) | Pad(_, d, _, _) | Concat(_, d) | Bitcast(_, _, d) | Bucket(_, _, d):
            return d != dim
        case Merge(_, parts, into):
            return dim not in (*parts, into)
        case Call(name):
            return not comes or call_spec(name).elementwise
        case _:
            return True


def _invariant(e: Expr, dim: str, taken: set[str]) -> Iterator[tuple[Param, Expr]]:
    """The maximal computed subterms without the dim, and the Consts with it, each with the leaf to stand for it."""
    seen: set[Expr] = set()
    stack = [e]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.args and any(not p.args and dim in p.dims for p in topo(n)):
            stack += n.args
        elif dim in n.dims if isinstance(n, Const) else n.args and params(n):
            name = fresh("outer", taken)
            taken.add(name)
            yield Param(name, tuple(n.dims.items()), n.dtype, n.bounds), n


def _part_size(total: int, size: int, limit: float) -> int:
    """The largest part within the limit, rounded down to a divisor of the whole if one is near."""
    count = min(total, -(-size // max(1, int(limit))))
    divisor = next((c for c in range(count, min(total, 2 * count) + 1) if total % c == 0), None)
    return total // divisor if divisor else -(-total // count)
