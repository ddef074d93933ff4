"""bucket(sum_v a[v] * x[v], i)  =  sum_v a[v] * bucket(x[v], i)      for factors a without the dims of the index

What does not depend on the index is multiplied once for each bucket instead of once for each element that goes into
one: the gradient of a table that all outputs index alike is a product with the activations in its order.
"""

from __future__ import annotations

from lowbit.ir.build import contract
from lowbit.ir.dims import RangeError
from lowbit.ir.expr import Bucket, Contract, Expr


def commute_bucket(e: Expr) -> Expr | None:
    match e:
        case Bucket(Contract(factors, over, "real", acc), index, dim, size, summed):
            bound = index.dims.keys() | summed
            far = [f for f in factors if not bound & f.dims.keys()]
            near = [f for f in factors if bound & f.dims.keys()]
            if not far or not near or over & (bound | {dim}):  # the last: a dim of the sum would be captured
                return None
            inner = over - {k for f in far for k in f.dims}
            try:
                buckets = Bucket(contract(near, inner, acc=acc), index, dim, size, summed)
            except RangeError:  # without the far factors, the bucket sums outgrow the accumulator
                return None
            return contract((*far, buckets), over - inner, acc=acc)
        case _:
            return None
