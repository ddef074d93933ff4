"""What is static about a quantized array: its logical dims, its format, and how its fields are laid out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, Literal, get_args

from lowbit.formats.format import Format, definition
from lowbit.formats.low_rank import LORA_A, LORA_B, LowRank
from lowbit.ir.build import cast, contract, param
from lowbit.ir.dims import Shape
from lowbit.ir.dtypes import DType, bits, is_float, short
from lowbit.ir.expr import Bitcast, Concat, Contract, Expr, Gather, Param
from lowbit.ir.walk import params, substitute, topo
from lowbit.kernels.layout import Layout, layout
from lowbit.passes.in_int8 import Numerics, activations_in_int8, checked_numerics, product_in_int8
from lowbit.passes.pointwise import UnsuitableError

LayoutName = Literal["own", "mma"]
"""How fields are laid out: as the format's decode term says, or as the kernels read them (`lowbit.kernels.layout`)."""

Split = tuple[str, str, int]
"""(field, dim, at): the field is stored as two, its first `at` entries along the dim in float32, to be trained."""


@dataclass(frozen=True)
class QuantType:
    """What is static about a quantized array: hashable, comparable, and all that a jitted function depends on.

    Attributes:
      dims: the logical array's dims in its order: (("k", 512), ("n", 256)) for a Flax kernel, n first for an embedding.
      dtype: the logical element type, that of the array that was quantized.
      format: the format with its options.
      splits: fields stored in two parts so that one can be trained and the other not.
      adapter: what is added to the decoded weight and trains instead of everything else in it.
      layout: of the stored fields. Files hold "own".
      numerics: what products are made of: see `lb.matmul`. The weight itself is the same.
    """

    dims: Shape
    dtype: DType
    format: Format
    splits: tuple[Split, ...] = ()
    adapter: LowRank | None = None
    layout: LayoutName = "own"
    numerics: Numerics = "float"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(n for _, n in self.dims)

    @property
    def decode(self) -> Expr:
        """The decode term, with the dims n and k, of fields in the format's own layout."""
        return _decode(self)

    @property
    def fields(self) -> Mapping[str, Param]:
        """The stored arrays by name; in the format's own layout they are the leaves of the decode term."""
        return _fields(self)

    @property
    def bits(self) -> int:
        """Bits of everything stored, padding included."""
        return sum(prod(f.dims.values()) * bits(f.dtype) for f in self.fields.values())

    @property
    def bits_per_weight(self) -> float:
        return self.bits / prod(self.shape)

    @property
    def encoding(self) -> str:
        """The format, the adapter on it, and other numerics: "bcq(bits=3) + lora(rank=8, alpha=16) in int8x2"."""
        encoded = " + ".join(str(part) for part in (self.format, self.adapter) if part is not None)
        return encoded if self.numerics == "float" else f"{encoded} in {self.numerics}"

    def role(self, field: str) -> str:
        """One of "code" (integers), "codebook" (a table that codes select from), "scale", "frozen" (not trained) or
        "adapter"."""
        leaf = self.fields[field]
        if not is_float(leaf.dtype):
            return "code"
        if self.adapter is not None:
            return "adapter" if field in (LORA_A, LORA_B) else "frozen"
        if any(field == f"{split}_rest" for split, _, _ in self.splits):
            return "frozen"
        decode = next(term for term in readings(self) if field in params(term))
        tables = (e.table for e in topo(decode) if isinstance(e, Gather))
        return "codebook" if any(_is_rows_of(t, params(decode)[field]) for t in tables) else "scale"

    def at(self, width: int) -> QuantType:
        """The type that reads the same stored arrays at another width. Raises ValueError for one that there is not."""
        return replace(self, format=self.format.at(width))

    def activations(self, x: Expr) -> Expr:
        """What products multiply with in place of activations x [m, k]."""
        return self.format.activations(x) if self.numerics == "float" else activations_in_int8(x, self.numerics)

    def product(self, x: Param) -> Expr:
        """x @ w as a term, for activations x [m, k].

        Raises `lowbit.passes.pointwise.UnsuitableError`, a ValueError, for numerics that the format does not have.
        """
        if self.numerics == "float":
            return contract((self.activations(x), self.decode), ("k",))
        try:
            if self.format.activations(x) is not x:
                raise UnsuitableError("it encodes activations itself")
            return product_in_int8(x, self.decode, self.numerics)
        except UnsuitableError as err:
            raise UnsuitableError(f"{self.format} has no products in {self.numerics}: {err}") from err

    def resized(self, **sizes: int) -> QuantType:
        """The same format at another size: `type.resized(n=4)` is the type of four rows."""
        # A field split off whole stays whole.
        splits = tuple((f, d, sizes.get(d, at) if (d, at) in self.dims else at) for f, d, at in self.splits)
        return replace(self, dims=tuple((k, sizes.get(k, n)) for k, n in self.dims), splits=splits)

    def __str__(self) -> str:
        return f"{self.dtype}[{' '.join(f'{k}={n}' for k, n in self.dims)}] as {self.encoding}"

    def __repr__(self) -> str:
        return f"QuantType({self}, {self.bits_per_weight:.3g} bits/weight)"

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope.rendering_parts import build_one_line_tree_node, text  # who calls this has it

        return build_one_line_tree_node(text(repr(self)), path)


def _is_rows_of(table: Expr, leaf: Param) -> bool:
    """Whether a gathered table is the leaf itself, seen through steps that only move or convert entries."""
    while table is not leaf and len(table.args) == 1 and not isinstance(table, Contract):
        table = table.args[0]
    return table is leaf


@lru_cache(maxsize=4096)
def _decode(t: QuantType) -> Expr:
    sizes = dict(t.dims)
    if sizes.keys() != {"k", "n"}:
        raise ValueError(f"a quantized array has the dims k and n, not {tuple(sizes)}")
    e = t.format.decode(sizes["n"], sizes["k"])
    if dict(e.dims) != sizes:
        raise ValueError(f"format {t.format} decodes to {e.type}, which is not [n={sizes['n']} k={sizes['k']}]")
    for field, dim, at in t.splits:
        if field in params(e) or not t.format.widths:  # or it is of another width
            e = _split_field(e, params(e)[field], dim, at)
    return e if t.adapter is None else e + t.adapter.decode(sizes["n"], sizes["k"])


def readings(t: QuantType) -> tuple[Expr, ...]:
    """The decode terms at every width, or the only one."""
    return tuple(_decode(t.at(width)) for width in t.format.widths) or (_decode(t),)


def check_products(t: QuantType) -> None:
    """Raises UnsuitableError where a type, read at any of its widths, has no products in its numerics."""
    x = param("x", "f32", None, m=1, k=dict(t.dims)["k"])
    for one in [t.at(width) for width in t.format.widths] or [t]:
        one.product(x)


@lru_cache(maxsize=4096)
def float_words(t: QuantType) -> dict[str, DType]:
    """The fields whose words a reading takes for the bits of a float, and for which."""
    nodes = (e for term in readings(t) for e in topo(term) if isinstance(e, Bitcast) and is_float(e.to))
    return {e.x.name: e.to for e in nodes if isinstance(e.x, Param) and e.x.name in t.fields}


def _split_field(e: Expr, leaf: Param, dim: str, at: int) -> Expr:
    first = param(f"{leaf.name}_first", "f32", None, **{**leaf.dims, dim: at})
    rest = leaf.dims[dim] - at
    if rest == 0:
        return substitute(e, {leaf: first})
    tail = param(f"{leaf.name}_rest", leaf.dtype, None, **{**leaf.dims, dim: rest})
    whole = Concat((first, cast(tail, "f32")), dim)
    return substitute(e, {leaf: whole})


@lru_cache(maxsize=4096)
def _fields(t: QuantType) -> dict[str, Param]:
    own = params(*readings(t))  # which raises where two readings differ on what is stored
    return dict(sorted((own if t.layout == "own" else kernel_layout(t).fields).items()))


def kernel_layout(t: QuantType) -> Layout:
    """How the kernels have the fields of such an array. Raises UnsuitableError with the reason why they cannot."""
    return layout(*readings(t))


def type_to_json(t: QuantType) -> dict[str, Any]:
    """A type as plain data; `type_from_json` is its inverse."""
    data = {
        "dims": [list(d) for d in t.dims],
        "dtype": t.dtype,
        "format": t.format.name,
        "version": t.format.version,
        "options": dict(t.format.options),
        "splits": [list(s) for s in t.splits],
    }
    if t.adapter is not None:
        data["adapter"] = asdict(t.adapter)
    if t.numerics != "float":
        data["numerics"] = t.numerics
    return data if t.layout == "own" else {**data, "layout": t.layout}


def type_from_json(data: Mapping[str, Any]) -> QuantType:
    """Raises UnknownFormatError for a format nobody registered, ValueError for another version of it."""
    known = definition(data["format"]).version
    if data["version"] != known:
        raise ValueError(f"format {data['format']!r} has version {data['version']}, this library reads version {known}")
    fmt = Format(data["format"], tuple(sorted(data["options"].items())))
    dims = tuple((str(k), int(n)) for k, n in data["dims"])
    splits = tuple((str(f), str(d), int(at)) for f, d, at in data["splits"])
    adapter = LowRank(**data["adapter"]) if "adapter" in data else None
    if (arranged := data.get("layout", "own")) not in get_args(LayoutName):
        raise ValueError(f"layout {arranged!r} is not one this library reads: {', '.join(get_args(LayoutName))}")
    numerics = checked_numerics(data.get("numerics", "float"))
    return QuantType(dims, short(data["dtype"]), fmt, splits, adapter, arranged, numerics)
