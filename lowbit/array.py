"""The quantized array: stored arrays plus one expression that says how they decode."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from lowbit.ir.dtypes import numpy_dtype
from lowbit.ir.expr import Param
from lowbit.kernels.arrange import arrange, restore
from lowbit.passes.in_int8 import Numerics, checked_numerics
from lowbit.passes.lower_xla import align, emit
from lowbit.quant_type import QuantType, float_words, kernel_layout, readings, type_from_json, type_to_json


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class QuantArray:
    """A quantized matrix, or a stack of them.

    Invariants, checked by `QuantArray.of` and not when a pytree is rebuilt (so that tree_map and stacking work):

    - `fields` has exactly the names of `type.fields`, each with the dtype of that leaf and, after the axes of the stack
      (none for one matrix), its shape;
    - codes lie within the range their leaf states, and those that are read as floats are not NaN or inf;
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
        _check_finite(arrays, type)
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
        stack = f"stack {list(self.stack)} of " if self.stack else ""
        # After a tree_map the fields may be anything.
        fields = (f"{n} {v.dtype}{list(v.shape)}" for n, v in self.fields.items() if hasattr(v, "shape"))
        return f"QuantArray({stack}{self.type}, {self.type.bits_per_weight:.3g} bits/weight: {', '.join(fields)})"

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, jax.Array]], tuple[tuple[str, ...], QuantType]]:
        names = tuple(self.fields)
        return [(jax.tree_util.DictKey(n), self.fields[n]) for n in names], (names, self.type)

    @classmethod
    def tree_unflatten(cls, aux: tuple[tuple[str, ...], QuantType], leaves: Any) -> QuantArray:
        names, type_ = aux
        return cls(dict(zip(names, leaves, strict=True)), type_)


def _check_finite(arrays: Mapping[str, jax.Array], t: QuantType) -> None:
    for name, read_as in float_words(t).items():
        floats = jax.lax.bitcast_convert_type(arrays[name], numpy_dtype(read_as))
        bad = (~jnp.isfinite(floats)).sum()
        if not isinstance(bad, jax.core.Tracer) and bad:
            raise ValueError(f"{name!r} holds {bad} codes among {floats.size} that are NaN or inf, read as {read_as}")


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


def in_numerics(w: QuantArray, numerics: Numerics | None) -> QuantArray:
    """The same array for products in other numerics. Raises ValueError for those that do not exist."""
    return w if numerics is None else QuantArray(w.fields, replace(w.type, numerics=checked_numerics(numerics)))


def own(w: QuantArray) -> QuantArray:
    """The same array with its fields laid out as its format says; `w` itself if they are."""
    if w.type.layout == "own":
        return w
    to = replace(w.type, layout="own")
    return over_stack(lambda one: QuantArray(_restored(to, one.fields), to), w)


@partial(jax.jit, static_argnums=0)
def _restored(t: QuantType, fields: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return restore(kernel_layout(t), fields)


def laid_out(w: QuantArray) -> QuantArray:
    """The same array in the layout that GPU kernels read. Bits that pad a group come out as zeros.

    Raises `lowbit.passes.pointwise.UnsuitableError`, with the reason, for a format that has none, or that no kernel
    multiplies in the numerics of the type.
    """
    to = replace(w.type, layout="mma")
    if to.numerics != "float":
        kernel_layout(to).integers(readings(to).index(to.decode))
    return over_stack(lambda one: QuantArray(_arranged(to, one.fields), to), own(w))


@partial(jax.jit, static_argnums=0)
def _arranged(t: QuantType, fields: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return arrange(kernel_layout(t), fields)


def dequantize(w: QuantArray) -> jax.Array:
    """The dense array that `w` stands for, in its logical shape and dtype. Differentiable in scales and codebooks.

    Of a stack every slice is decoded: [*stack, k, n]. Raises TypeError for what is no QuantArray.

    >>> import jax.numpy as jnp, lowbit as lb
    >>> w = lb.quantize_array(jnp.ones((8, 4)), lb.uniform(4))
    >>> lb.dequantize(w).shape
    (8, 4)
    """
    dense: jax.Array = over_stack(lambda one: _dequantize(one.type, one.fields), own(expect_array(w, "dequantize")))
    return dense


@partial(jax.jit, static_argnums=0)
def _dequantize(t: QuantType, fields: dict[str, jax.Array]) -> jax.Array:
    value = align(emit(t.decode, fields), t.decode.dims, dict(t.dims))
    return value.astype(numpy_dtype(t.dtype))


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
