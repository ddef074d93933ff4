"""Reading 3: a term as text, one node a line, shared nodes named once, types at the right.

The grammar is the one `lowbit.ir.parse` reads: `parse(text(e)) is e`.
"""

from __future__ import annotations

import base64
from typing import assert_never

import numpy as np

from lowbit.ir.dtypes import full_range, numpy_dtype
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
from lowbit.ir.walk import topo

INLINE = 16
"""Entries of a Const that are printed as numbers; more are printed as bytes, or in short form as a digest."""


def text(root: Expr, *, short: bool = False) -> str:
    """The term as text. `short` replaces long tables by their digest: easier to read, no longer parseable.

    >>> from lowbit.ir import param, text
    >>> x, w = param("x", "f32", m=2, k=8), param("w", "f32", n=3, k=8)
    >>> print(text((x * w).sum("k")))
    %0 = param x                     : f32[m=2 k=8]
    %1 = param w                     : f32[n=3 k=8]
    %2 = sum[k] %0 * %1              : f32[m=2 n=3]
    """
    nodes = topo(root)
    name = {e: f"%{i}" for i, e in enumerate(nodes)}
    left = [f"{name[e]} = {_right_hand(e, name, short)}" for e in nodes]
    column = min(max(32, *(len(s) for s in left)), 56)
    return "\n".join(f"{s.ljust(column)} : {e.type}" for s, e in zip(left, nodes, strict=True))


def _right_hand(e: Expr, name: dict[Expr, str], short: bool) -> str:
    match e:
        case Param(n, _, dtype, within):
            narrowed = within is not None and within != full_range(dtype)
            return f"param {n}" + (f" in {within[0]}..{within[1]}" if narrowed and within else "")
        case Const():
            return f"const {const_text(e, short)}"
        case Unpack(x, width, dim, count):
            return f"unpack {name[x]} {count} x {width} -> {dim}"
        case Bitcast(x, _, dim):
            return f"bitcast {name[x]}" + (f" along {dim}" if dim else "")
        case Gather(table, index, dim):
            return f"gather {name[table]}[{dim}={name[index]}]"
        case Bucket(x, index, dim, _, over):
            return f"bucket[{' '.join(sorted(over))}] {name[x]} -> {dim}={name[index]}"
        case Add(a, b):
            return f"{name[a]} + {name[b]}"
        case Contract(factors, over, ring, _):
            op = "xor" if ring == "gf2" else "sum"
            return f"{op}[{' '.join(sorted(over))}] " + " * ".join(name[f] for f in factors)
        case Split(x, dim, into):
            return f"split {name[x]} {dim} -> {' '.join(k for k, _ in into)}"
        case Merge(x, parts, into):
            return f"merge {name[x]} {' '.join(parts)} -> {into}"
        case Cast(x, _, rounds):
            return f"cast {name[x]}" + (" rounding" if rounds else "")
        case Slice(x, dim, start, stop):
            return f"slice {name[x]} {dim} {start}..{stop}"
        case Pad(x, dim, before, after):
            return f"pad {name[x]} {dim} {before} {after}"
        case Concat(parts, dim):
            return f"concat {' '.join(name[p] for p in parts)} along {dim}"
        case Call(call, operands):
            return f"call {call} {' '.join(name[o] for o in operands)}".rstrip()
        case _:
            assert_never(e)


def const_text(e: Const, short: bool) -> str:
    flat = e.values.ravel()
    if flat.size <= INLINE:
        numbers = [_number(v) for v in flat]
        if np.array(numbers, dtype=np.float64).astype(numpy_dtype(e.element)).tobytes() == flat.tobytes():
            return "{" + ", ".join(numbers) + "}"
    return f"#{e.digest}" if short else "b64:" + base64.b64encode(e.data).decode()


def _number(v: np.generic) -> str:
    value = float(v)
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 and str(value)[0:2] != "-0" else repr(value)
