"""Reading 4: what a term costs, counting each shared node once.

`Contract` is counted along the cheapest order of pairwise products, which is also the order the lowering runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import assert_never

from lowbit.ir.call import call_spec
from lowbit.ir.dims import union
from lowbit.ir.dtypes import DType, bits
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
from lowbit.ir.order import contraction_order, dots, has_vector, slot_dims
from lowbit.ir.walk import topo


@dataclass(frozen=True)
class Cost:
    """Counts of one evaluation.

    Attributes:
      read: bytes of the leaves, by element type; of a leaf of which the term has slices only, those of the slices.
      fma: multiply-adds, additions included.
      dot: those of them inside matrix products, which hardware runs far faster than the rest.
      moved: elements of the operands of batched matrix products, whose batch has to be brought outermost.
      lookups: elements gathered from more than two entries, and operands of matrix products gathered from two.
      selected: elements gathered from two, which a loop over the elements does as it goes.
      scattered: elements added into buckets.
      fields: elements made by Unpack, Bitcast and Cast.
      table: bytes of the largest gathered table that is computed, not stored.
      largest: bytes of the largest intermediate array, were it written out.
    """

    read: dict[DType, int] = field(default_factory=dict)
    fma: int = 0
    dot: int = 0
    moved: int = 0
    lookups: int = 0
    selected: int = 0
    scattered: int = 0
    fields: int = 0
    table: int = 0
    largest: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.read.values())


def cost(root: Expr) -> Cost:
    """What one evaluation of the term reads and does.

    >>> from lowbit.ir import cost, param
    >>> c = cost((param("x", "f32", m=2, k=8) * param("w", "f16", n=3, k=8)).sum("k"))
    >>> c.read, c.fma, c.dot
    ({'f32': 64, 'f16': 48}, 48, 48)
    """
    fma = dot = moved = lookups = selected = scattered = fields = table = largest = 0
    for e in topo(root):
        n = prod(e.dims.values())
        match e:
            case Param() | Const() | Split() | Merge() | Slice() | Pad() | Concat():
                pass
            case Gather() if is_slice(e):
                pass
            case Unpack() | Bitcast() | Cast():
                fields += n
            case Gather() if is_select(e):
                selected += n
            case Gather():
                lookups += n
                stored = isinstance(e.table, Param | Const)
                table = max(table, 0 if stored else nbytes(e.table))
            case Bucket():
                scattered += prod(union("bucket", e.x.dims, e.index.dims).values())
            case Add():
                fma += n
            case Contract():
                every, products, copied = contraction_work(e)
                lookups += _selected_operands(e)
                fma, dot, moved = fma + every, dot + products, moved + copied
            case Call(name, operands):
                fma += call_spec(name).operations(*(o.type for o in operands))
            case _:
                assert_never(e)
        if not isinstance(e, Param | Const):
            largest = max(largest, nbytes(e))
    return Cost(_read(root), fma, dot, moved, lookups, selected, scattered, fields, table, largest)


def _read(root: Expr) -> dict[DType, int]:
    used: dict[Param, int] = {root: nbytes(root)} if isinstance(root, Param) else {}
    for e in topo(root):
        for leaf in e.args:
            if isinstance(leaf, Param):
                used[leaf] = min(nbytes(leaf), used.get(leaf, 0) + nbytes(e if isinstance(e, Slice) else leaf))
    read: dict[DType, int] = {}
    for leaf, size in used.items():
        read[leaf.dtype] = read.get(leaf.dtype, 0) + size
    return read


def nbytes(e: Expr) -> int:
    """Bytes of the array, were it written out."""
    return prod(e.dims.values()) * bits(e.dtype) // 8


def contraction_work(e: Contract) -> tuple[int, int, int]:
    """Multiply-adds of a contraction, those inside matrix products, and the operands' elements of batched ones."""
    dims, products = slot_dims(e), dots(e).values()
    moved = 0
    for step in products:
        a, b = (dims[s] for s in step.slots)
        if a.keys() & b.keys() & step.out.keys():
            moved += prod(a.values()) + prod(b.values())
    return sum(step.fma for step in contraction_order(e)), sum(step.fma for step in products), moved


def is_slice(e: Expr) -> bool:
    """Whether it is a look-up of one entry that is known."""
    return isinstance(e, Gather) and isinstance(e.index, Const) and not e.index.dims


def is_select(e: Expr) -> bool:
    """Whether it is a look-up of one of two entries."""
    return isinstance(e, Gather) and e.table.dims[e.dim] == 2 and not is_slice(e)


def _selected_operands(e: Contract) -> int:
    """Elements of the factors made by selects that have to be written, for a product with more than one vector."""
    dims, made = slot_dims(e), {at for at, f in enumerate(e.factors) if is_select(f)}
    matrices = (step for step in dots(e).values() if not has_vector(*(dims[s] for s in step.slots)))
    return sum(prod(dims[s].values()) for step in matrices for s in made.intersection(step.slots))
