"""forms of one term -> the cheapest: the only place that compares costs and picks between equal terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.ir.cost import Cost, cost
from lowbit.ir.expr import Expr
from lowbit.passes.pipeline import PIPELINES, Pipeline, run
from lowbit.passes.style import PLAIN, Style


@dataclass(frozen=True)
class Machine:
    """What one unit of each cost takes on a kind of device, in nanoseconds, and what does not fit.

    A coarse model: it has to rank forms whose costs differ several-fold, not to predict times.

    Attributes:
      byte: reading one stored byte, or writing one of a computed table larger than `cache`.
      dot: a multiply-add in a matrix product.
      pointwise: a multiply-add anywhere else.
      moved: an element of an operand whose layout does not suit a batched product.
      field: an element unpacked or converted.
      lookup: an element gathered from a computed table of at most `cache` bytes, or from a stored one.
      far_lookup: the same from a larger table.
      select: an element chosen from two.
      scatter: an element added into a bucket.
      cache: bytes.
      style: how to write a term for its compiler.
    """

    name: str
    byte: float
    dot: float
    pointwise: float
    moved: float
    field: float
    lookup: float
    far_lookup: float
    select: float
    scatter: float
    cache: int
    style: Style = PLAIN

    def nanoseconds(self, c: Cost) -> float:
        """Predicted time."""
        near = c.table <= self.cache
        moved_bytes = c.bytes + (0 if near else c.table)  # a table that no cache holds is written to memory
        arithmetic = c.dot * self.dot + (c.fma - c.dot) * self.pointwise + c.moved * self.moved + c.fields * self.field
        looked_up = c.lookups * (self.lookup if near else self.far_lookup)
        looked_up += c.selected * self.select
        return moved_bytes * self.byte + arithmetic + looked_up + c.scattered * self.scatter


TIE = 1.1
"""Predictions closer than this factor say nothing, and the simpler form runs."""


@dataclass(frozen=True)
class Form:
    """One way to compute a term."""

    name: str
    term: Expr
    cost: Cost
    nanoseconds: float


def forms(e: Expr, machine: Machine, pipelines: Mapping[str, Pipeline] = PIPELINES) -> tuple[Form, ...]:
    """Every distinct form of `e`, cheapest first, except that of those that TIE the first pipeline's leads."""
    terms: dict[Expr, str] = {}
    for name, pipeline in pipelines.items():
        terms.setdefault(run(e, pipeline), name)
    out = [Form(name, t, c, machine.nanoseconds(c)) for t, name in terms.items() for c in (cost(t),)]
    least = min(f.nanoseconds for f in out)
    leading = next(f for f in out if f.nanoseconds <= TIE * least)
    return (leading, *sorted((f for f in out if f is not leading), key=lambda f: f.nanoseconds))


def choose(e: Expr, machine: Machine, pipelines: Mapping[str, Pipeline] = PIPELINES) -> Expr:
    """The form of `e` that the machine is predicted to run fastest."""
    return forms(e, machine, pipelines)[0].term
