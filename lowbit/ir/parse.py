"""The inverse of `text`, for terms read from files: limited in size, and every stated type is checked."""

from __future__ import annotations

import base64
import binascii
import re
from typing import cast

from lowbit.ir.dims import Shape
from lowbit.ir.dtypes import DTYPES, DType, exactly
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

MAX_CHARS = 1 << 20
MAX_NODES = 4096


class ParseError(ValueError):
    """The text is not a term: the message gives the line and what was expected."""


_TYPE = re.compile(r"(\w+)\[([^\]]*)\]")
_ID, _DIM, _IDS = r"%(\d+)", r"(\w+)", r"((?:%\d+ ?)+)"
_OPS: dict[str, re.Pattern[str]] = {
    "param": re.compile(rf"param {_DIM}(?: in (-?\d+)\.\.(-?\d+))?"),
    "const": re.compile(r"const (?:\{(.*)\}|b64:([A-Za-z0-9+/=]*))"),
    "unpack": re.compile(rf"unpack {_ID} (\d+) x (\d+) -> {_DIM}"),
    "bitcast": re.compile(rf"bitcast {_ID}(?: along {_DIM})?"),
    "gather": re.compile(rf"gather {_ID}\[{_DIM}={_ID}\]"),
    "bucket": re.compile(rf"bucket\[([\w ]*)\] {_ID} -> {_DIM}={_ID}"),
    "add": re.compile(rf"{_ID} \+ {_ID}"),
    "contract": re.compile(r"(sum|xor)\[([\w ]*)\] (%\d+(?: \* %\d+)*)"),
    "split": re.compile(rf"split {_ID} {_DIM} -> ([\w ]+)"),
    "merge": re.compile(rf"merge {_ID} ([\w ]+) -> {_DIM}"),
    "cast": re.compile(rf"cast {_ID}( rounding)?"),
    "slice": re.compile(rf"slice {_ID} {_DIM} (\d+)\.\.(\d+)"),
    "pad": re.compile(rf"pad {_ID} {_DIM} (\d+) (\d+)"),
    "concat": re.compile(rf"concat {_IDS} ?along {_DIM}"),
    "call": re.compile(rf"call {_DIM}(?: {_IDS})?"),
}


def parse(source: str) -> Expr:
    """The term that `lowbit.ir.text` printed.

    Raises ParseError for anything else: an unknown operation, a forward reference, a type that is not the node's,
    more than MAX_CHARS characters or MAX_NODES lines.

    >>> from lowbit.ir import param, parse, text
    >>> scaled = param("codes", "u8", n=3) * 0.5
    >>> parse(text(scaled)) is scaled
    True
    """
    if len(source) > MAX_CHARS:
        raise ParseError(f"the text has {len(source)} characters, at most {MAX_CHARS} are read")
    lines = source.strip().split("\n")
    if len(lines) > MAX_NODES:
        raise ParseError(f"the text has {len(lines)} lines, at most {MAX_NODES} are read")
    nodes: list[Expr] = []
    for line in lines:
        left, _, right = line.strip().rpartition(" : ")
        head = f"%{len(nodes)} = "
        if not left.startswith(head):
            raise ParseError(f"line {len(nodes) + 1}: expected '{head}... : type', found {line[:80]!r}")
        try:
            node = _node(left[len(head) :].strip(), *_type(right), nodes)
            made = str(node.type)  # Python refuses to write sizes of thousands of digits
        except (ValueError, TypeError, KeyError, IndexError) as err:
            raise ParseError(f"line {len(nodes) + 1}: {err} in {line[:80]!r}") from err
        if made != right.strip():
            raise ParseError(f"line {len(nodes) + 1}: states type {right.strip()}, but the node is {made}")
        nodes.append(node)
    return nodes[-1]


def _type(source: str) -> tuple[DType, Shape]:
    found = _TYPE.fullmatch(source.strip())
    if not found or found[1] not in DTYPES:
        raise ParseError(f"{source.strip()!r} is not a type such as f32[m=2 k=8]")
    pairs = [p.partition("=") for p in found[2].split()]
    return cast(DType, found[1]), tuple((k, int(n)) for k, _, n in pairs)


def _node(source: str, dtype: DType, shape: Shape, nodes: list[Expr]) -> Expr:
    op = source.split(None, 1)[0].split("[")[0]
    op = {"sum": "contract", "xor": "contract"}.get(op, "add" if op.startswith("%") else op)
    found = _OPS[op].fullmatch(source) if op in _OPS else None
    if not found:
        raise ParseError(f"{op!r} is not an operation, or not written like that,")
    return _build(op, found, dtype, shape, nodes)


def _build(op: str, m: re.Match[str], dtype: DType, shape: Shape, nodes: list[Expr]) -> Expr:
    sizes = dict(shape)

    def at(ids: str) -> tuple[Expr, ...]:
        return tuple(nodes[int(i)] for i in re.findall(r"\d+", ids))

    match op:
        case "param":
            return Param(m[1], shape, dtype, (int(m[2]), int(m[3])) if m[2] else None)
        case "const":
            return Const(shape, dtype, _data(m, dtype))
        case "unpack":
            return Unpack(nodes[int(m[1])], int(m[3]), m[4], int(m[2]))
        case "bitcast":
            return Bitcast(nodes[int(m[1])], dtype, m[2])
        case "gather":
            return Gather(nodes[int(m[1])], nodes[int(m[3])], m[2])
        case "bucket":
            return Bucket(nodes[int(m[2])], nodes[int(m[4])], m[3], sizes[m[3]], frozenset(m[1].split()))
        case "add":
            return Add(nodes[int(m[1])], nodes[int(m[2])])
        case "contract":
            return Contract(at(m[3]), frozenset(m[2].split()), "gf2" if m[1] == "xor" else "real", dtype)
        case "split":
            return Split(nodes[int(m[1])], m[2], tuple((k, sizes[k]) for k in m[3].split()))
        case "merge":
            return Merge(nodes[int(m[1])], tuple(m[2].split()), m[3])
        case "cast":
            return Cast(nodes[int(m[1])], dtype, bool(m[2]))
        case "slice":
            return Slice(nodes[int(m[1])], m[2], int(m[3]), int(m[4]))
        case "pad":
            return Pad(nodes[int(m[1])], m[2], int(m[3]), int(m[4]))
        case "concat":
            return Concat(at(m[1]), m[2])
        case _:
            return Call(m[1], at(m[2] or ""))


def _data(m: re.Match[str], dtype: DType) -> bytes:
    if m[1] is None:
        try:
            return base64.b64decode(m[2], validate=True)
        except binascii.Error as err:
            raise ParseError(f"bad base64 ({err})") from err
    array = exactly([float(v) for v in m[1].split(",")], dtype)
    return array.astype(array.dtype.newbyteorder("<")).tobytes()
