"""sum_p a[p] * s(b[p])  =  (sum_p a[p] * S[p, c])[c = sum_p r**p b[p]],  S[p, c] = s(digit p of c in base r)

Planes become digits of one small-table index: 2- to 4-bit weights of any kind are a look-up of at most 16 entries,
with the scales folded into the table.
"""

from __future__ import annotations

from math import prod

from lowbit.ir.build import const, contract
from lowbit.ir.dims import fresh
from lowbit.ir.dtypes import is_float
from lowbit.ir.expr import CONST_LIMIT, Const, Contract, Expr, Gather, Param
from lowbit.ir.oracle import align
from lowbit.ir.walk import topo
from lowbit.passes.tabulate import is_function_of, table_of


def join_planes(e: Expr) -> Expr | None:
    if not isinstance(e, Contract) or not is_float(e.acc):  # an integer sum of planes is the index already
        return None
    for p in sorted(e.over):
        for at, f in enumerate(e.factors):
            if p in f.dims and not isinstance(f, Const) and (digit := _digit(f, p)):
                table = _table(e, p, at, f, digit)
                # A table as large as what is looked up in it replaces nothing: any short summed dim would qualify.
                if table is not None and prod(table.dims.values()) <= prod(digit.dims.values()):
                    return _look_up(e, p, at, digit, table)
    return None


def _digit(f: Expr, plane: str) -> Expr | None:
    """The leaf-side integer with few values that `f` is a function of, plane by plane."""
    for word in topo(f):
        if word.bounds is None or isinstance(word, Const) or plane not in word.dims or word.bounds[0] < 0:
            continue
        planes, base = word.dims[plane], word.bounds[1] + 1
        small = base > 1 and planes > 1 and planes * base**planes <= CONST_LIMIT
        if small and (word is f or is_function_of(f, word)) and not isinstance(word, Param):
            return word
    return None


def _table(e: Contract, p: str, at: int, f: Expr, digit: Expr) -> Expr | None:
    """sum_p a[p] * S[p, c]; None if s is not one function of the digit, or one for each plane."""
    assert digit.bounds is not None
    planes, base = digit.dims[p], digit.bounds[1] + 1
    entry = fresh("c", digit.dims)
    single = (const(range(base), f.dtype, entry), f, entry) if digit is f else table_of(f, digit)
    if single is None or single[0].dims.keys() - {p, single[2]}:
        return None
    table, _, entry = single
    digits = [[code // base**i % base for code in range(base**planes)] for i in range(planes)]
    rows = align(table.values, table.dims, {p: planes, entry: base}).repeat(1 if p in table.dims else planes, 0)
    joined = [[row[d] for d in ds] for row, ds in zip(rows, digits, strict=True)]
    near = [g for i, g in enumerate(e.factors) if i != at and p in g.dims]
    return contract((*near, const(joined, table.dtype, p, _code_dim(e))), (p,), acc=e.acc)


def _look_up(e: Contract, p: str, at: int, digit: Expr, table: Expr) -> Expr:
    assert digit.bounds is not None
    far = [g for i, g in enumerate(e.factors) if i != at and p not in g.dims]
    place_values = [(digit.bounds[1] + 1) ** i for i in range(digit.dims[p])]
    index = contract((digit, const(place_values, "i32", p)), (p,))
    return contract((*far, Gather(table, index, _code_dim(e))), e.over - {p}, acc=e.acc)


def _code_dim(e: Contract) -> str:
    return fresh("c", {k for g in e.factors for k in g.dims})
