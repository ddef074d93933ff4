"""The pipelines: ordered tuples of named passes, each giving one form of the same term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lowbit.ir.expr import Expr
from lowbit.ir.text import text
from lowbit.ir.walk import Rule, rewrite
from lowbit.passes.bucket import bucket, bucket_shared
from lowbit.passes.commute_bucket import commute_bucket
from lowbit.passes.commute_gather import commute_gather, commute_gather_shared
from lowbit.passes.distribute import distribute, distribute_stored
from lowbit.passes.flatten import flatten
from lowbit.passes.fold import fold
from lowbit.passes.hoist_merge import hoist_merge
from lowbit.passes.hoist_slice import hoist_slice
from lowbit.passes.join_planes import join_planes
from lowbit.passes.split_index import split_index
from lowbit.passes.tabulate import tabulate


@dataclass(frozen=True)
class Pass:
    """A few identities applied wherever they match, until none does.

    Attributes:
      defining: where it changes nothing, its pipeline does not either: the form would be another one, badly named.
    """

    name: str
    rules: tuple[Rule, ...]
    top_down: bool = False
    defining: bool = False

    def __call__(self, e: Expr) -> Expr:
        def first(n: Expr) -> Expr | None:
            return next((new for rule in self.rules if (new := rule(n)) is not None), None)

        return rewrite(e, first, top_down=self.top_down)


HOIST = Pass("hoist_merge", (hoist_merge, hoist_slice))
FLATTEN = Pass("flatten", (flatten,))
TABULATE = Pass("tabulate", (tabulate,), top_down=True)
JOIN = Pass("join_planes", (join_planes,))
DIGITS = Pass("split_index", (split_index,), defining=True)
DISTRIBUTE = Pass("distribute", (distribute,))
APART = Pass("distribute_stored", (distribute_stored,))
SHARED = Pass("shared_index", (bucket_shared, commute_gather_shared, commute_bucket))
COMMUTE = Pass("commute_gather", (commute_gather,))
BUCKET = Pass("bucket", (bucket,))
FOLD = Pass("fold", (fold,))

Pipeline = tuple[Pass, ...]

PIPELINES: Mapping[str, Pipeline] = {
    "decode": (),
    "apart": (APART, SHARED),
    "table": (APART, SHARED, HOIST, TABULATE, DISTRIBUTE, COMMUTE, FOLD),
    "planes": (APART, SHARED, HOIST, DISTRIBUTE, FLATTEN, TABULATE, COMMUTE, FOLD),
    "join": (APART, SHARED, HOIST, JOIN, DISTRIBUTE, COMMUTE, FOLD),
    "select": (APART, SHARED, HOIST, DIGITS),
    "bucket": (APART, SHARED, HOIST, JOIN, DISTRIBUTE, FOLD, BUCKET),
}
"""The forms that `choose` compares: decode first; multiply by each part of a weight that is a sum, such as a low-rank
adapter, and with the activations in an order that the weight is stored in; look partial sums up; the same with zero
points and place values as terms and factors of their own; make one index of the planes, for weights or partial sums;
select by each plane, where they are an index already; or add up the activations that share an index."""


def run(e: Expr, pipeline: Pipeline, dump: Callable[[str], None] | None = None) -> Expr:
    """Apply the passes in order. `dump=print` shows the text after each pass that changed something.

    >>> from lowbit.ir import merge, param
    >>> from lowbit.passes import PIPELINES, run
    >>> x, w = param("x", "f32", k=8), param("w", "f32", n=3, g=2, t=4)
    >>> print(run((x * merge(w, "g", "t", into="k")).sum("k"), PIPELINES["table"]))
    %0 = param x                     : f32[k=8]
    %1 = split %0 k -> g t           : f32[g=2 t=4]
    %2 = param w                     : f32[n=3 g=2 t=4]
    %3 = sum[g t] %1 * %2            : f32[n=3]
    """
    start = e
    for step in pipeline:
        new = step(e)
        if dump is not None:
            dump(f"-- {step.name}" + (f"\n{text(new, short=True)}" if new is not e else ": no change"))
        if step.defining and new is e:
            return start
        e = new
    return e
