"""The quantized array: stored arrays plus one expression that says how they decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from lowbit.formats.format import Format, definition
from lowbit.formats.low_rank import LORA_A, LORA_B, LowRank
from lowbit.ir.build import cast, param
from lowbit.ir.dims import Shape
from lowbit.ir.dtypes import DType, bits, is_float, numpy_dtype, short
from lowbit.ir.expr import Concat, Contract, Expr, Gather, Param
from lowbit.ir.walk import params, substitute, topo
from lowbit.passes.lower_xla import align, emit

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
    """

    dims: Shape
    dtype: DType
    format: Format
    splits: tuple[Split, ...] = ()
    adapter: LowRank | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(n for _, n in self.dims)

    @property
    def decode(self) -> Expr:
        """The decode term, with the dims n and k."""
        return _decode(self)

    @property
    def fields(self) -> Mapping[str, Param]:
        """The stored arrays by name, as leaves of the decode term."""
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
        """The format, and the adapter on it: "bcq(bits=3) + lora(rank=8, alpha=16)"."""
        return " + ".join(str(part) for part in (self.format, self.adapter) if part is not None)

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
        tables = (e.table for e in topo(self.decode) if isinstance(e, Gather))
        return "codebook" if any(_is_rows_of(t, leaf) for t in tables) else "scale"

    def resized(self, **sizes: int) -> QuantType:
        """The same format at another size: `type.resized(n=4)` is the type of four rows."""
        return replace(self, dims=tuple((k, sizes.get(k, n)) for k, n in self.dims))

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
        e = _split_field(e, params(e)[field], dim, at)
    return e if t.adapter is None else e + t.adapter.decode(sizes["n"], sizes["k"])


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
    return dict(sorted(params(_decode(t)).items()))


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class QuantArray:
    """A quantized matrix, or a stack of them.

    Invariants, checked by `QuantArray.of` and not when a pytree is rebuilt (so that tree_map and stacking work):

    - `fields` has exactly the names of `type.fields`, each with the dtype of that leaf and, after the axes of the stack
      (none for one matrix), its shape;
    - codes lie within the range their leaf states;
    - the logical array is `type.decode` of the fields, in `type.dtype`, dims in the order of `type.dims`, after the
      axes of the stack.

    So the type is that of one slice: `jax.vmap`, `jax.lax.scan` and stacking with tree_map leave it as it is.
    """

    fields: dict[str, jax.Array]
    type: QuantType

    @staticmethod
    def of(fields: Mapping[str, Any], type: QuantType) -> QuantArray:
        """A checked QuantArray. Raises ValueError naming the field, and both shapes and dtypes."""
        if fields.keys() != type.fields.keys():
            raise ValueError(f"{type.format} stores {sorted(type.fields)}, but the fields are {sorted(fields)}")
        arrays = {name: jnp.asarray(fields[name]) for name in type.fields}
        stacks = {name: _stack(arrays[name].shape, leaf) for name, leaf in type.fields.items()}
        first = next(iter(stacks))
        for name, leaf in type.fields.items():
            a = arrays[name]
            if a.shape != (*stacks[name], *leaf.dims.values()) or a.dtype != numpy_dtype(leaf.dtype):
                given = f"{a.dtype}{list(a.shape)}"
                raise ValueError(f"{type.format} stores {name!r} as {leaf.type}, but the array is {given}")
            if stacks[name] != stacks[first]:
                raise ValueError(
                    f"{first!r} is a stack {list(stacks[first])} of {type.fields[first].type}, but {name!r} is a stack "
                    f"{list(stacks[name])} of {leaf.type}: every field has the same leading axes"
                )
            if leaf.within is not None and not isinstance(a, jax.core.Tracer) and a.size:
                low, high = int(a.min()), int(a.max())
                if low < leaf.within[0] or high > leaf.within[1]:
                    least, most = leaf.within
                    raise ValueError(f"{name!r} holds {low}..{high}, outside its range {least}..{most}")
        return QuantArray(arrays, type)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes that every field has, () for one matrix."""
        name, leaf = next(iter(self.type.fields.items()))
        return _stack(getattr(self.fields[name], "shape", ()), leaf)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stack, *self.type.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        return numpy_dtype(self.type.dtype)

    def __repr__(self) -> str:
        # After a tree_map the fields may be anything.
        fields = (f"{n} {v.dtype}{list(v.shape)}" for n, v in self.fields.items() if hasattr(v, "shape"))
        stack = f"stack {list(self.stack)} of " if self.stack else ""
        return f"QuantArray({stack}{self.type}, {self.type.bits_per_weight:.3g} bits/weight: {', '.join(fields)})"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, jax.Array]], tuple[tuple[str, ...], QuantType]]:
        names = tuple(self.fields)
        return [(jax.tree_util.DictKey(n), self.fields[n]) for n in names], (names, self.type)

    @classmethod
    def tree_unflatten(cls, aux: tuple[tuple[str, ...], QuantType], leaves: Any) -> QuantArray:
        names, type_ = aux
        return cls(dict(zip(names, leaves, strict=True)), type_)


def _stack(shape: tuple[int, ...], leaf: Param) -> tuple[int, ...]:
    """The axes of a stored array before those of its leaf."""
    return tuple(shape[: max(0, len(shape) - len(leaf.dims))])


def over_stack(f: Callable[..., Any], w: QuantArray, *args: Any) -> Any:
    """`f(slice, *args)` for each slice of a stack: arguments and results begin with the axes of the stack."""
    for _ in w.stack:
        f = jax.vmap(f)
    return f(w, *args)


def expect_array(w: Any, who: str) -> QuantArray:
    """`w` itself; raises TypeError for what is no QuantArray, such as a layer's kernel, which holds one."""
    if not isinstance(w, QuantArray):
        instead = "pass its .array" if isinstance(getattr(w, "array", None), QuantArray) else "see lb.quantize_array"
        raise TypeError(f"{who} takes a QuantArray, not a {type(w).__name__}: {instead}")
    return w


def dequantize(w: QuantArray) -> jax.Array:
    """The dense array that `w` stands for, in its logical shape and dtype. Differentiable in scales and codebooks.

    Of a stack every slice is decoded: [*stack, k, n]. Raises TypeError for what is no QuantArray.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.ones((8, 4)), lb.uniform(4))
    >>> lb.dequantize(w).shape
    (8, 4)
    """
    dense: jax.Array = over_stack(lambda one: _dequantize(one.type, one.fields), expect_array(w, "dequantize"))
    return dense


@partial(jax.jit, static_argnums=0)
def _dequantize(t: QuantType, fields: dict[str, jax.Array]) -> jax.Array:
    value = align(emit(t.decode, fields), t.decode.dims, dict(t.dims))
    return value.astype(numpy_dtype(t.dtype))


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
    return data if t.adapter is None else {**data, "adapter": asdict(t.adapter)}


def type_from_json(data: Mapping[str, Any]) -> QuantType:
    """Raises UnknownFormatError for a format nobody registered, ValueError for another version of it."""
    known = definition(data["format"]).version
    if data["version"] != known:
        raise ValueError(f"format {data['format']!r} has version {data['version']}, this library reads version {known}")
    fmt = Format(data["format"], tuple(sorted(data["options"].items())))
    dims = tuple((str(k), int(n)) for k, n in data["dims"])
    splits = tuple((str(f), str(d), int(at)) for f, d, at in data["splits"])
    adapter = LowRank(**data["adapter"]) if "adapter" in data else None
    return QuantType(dims, short(data["dtype"]), fmt, splits, adapter)


def _aux_to_bytes(aux: tuple[tuple[str, ...], QuantType]) -> bytes:
    return json.dumps([list(aux[0]), type_to_json(aux[1])]).encode()


def _aux_from_bytes(data: bytes) -> tuple[tuple[str, ...], QuantType]:
    names, type_ = json.loads(data)
    return tuple(names), type_from_json(type_)


export.register_pytree_node_serialization(
    QuantArray,
    serialized_name="lowbit.QuantArray",
    serialize_auxdata=_aux_to_bytes,
    deserialize_auxdata=_aux_from_bytes,
)
