"""Quantized layers that stand where their Flax namesakes stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.array import QuantArray
from lowbit.nn.kernel import Kernel
from lowbit.nn.view import View
from lowbit.ops import matmul, take
from lowbit.widths import at_width


class Linear(nnx.Module):
    """`nnx.Linear` over a quantized kernel [in, out]. Made by `lb.quantize`.

    The product is accumulated in float32; result and bias follow Flax's promotion of input, kernel and bias, or
    `dtype`.
    """

    def __init__(self, kernel: Kernel, bias: nnx.Variable[Any] | None, dtype: Any = None) -> None:
        self.kernel = kernel
        self.bias = nnx.data(bias)
        self.in_features, self.out_features = kernel.shape[-2:]
        self.use_bias = bias is not None
        self.dtype = dtype

    def __call__(self, inputs: jax.Array, rows: Any = None) -> jax.Array:
        """[..., in_features] -> [..., out_features]. Raises ValueError for another last dim.

        `rows` is for what makes the products of a layer that switches, `lb.nn.Rows`; no other layer takes them.
        """
        bias = None if self.bias is None else self.bias.get_value()
        dtype = result_dtype(self.dtype, inputs, self.kernel, bias)
        y = product(jnp.asarray(inputs, dtype), self.kernel, rows=rows)
        return y if bias is None else y + jnp.asarray(bias, dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Embed(nnx.Module):
    """`nnx.Embed` over a quantized table [num_embeddings, features]: rows are decoded as they are looked up.

    `attend` is the product with the same stored arrays, for output heads tied to the embedding.
    """

    def __init__(self, embedding: Kernel, dtype: Any = None) -> None:
        self.embedding = embedding
        self.num_embeddings, self.features = embedding.shape[-2:]
        self.dtype = dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Integer ids [...] -> rows [..., features]; an id out of range gives NaN."""
        rows = product(jnp.asarray(inputs), self.embedding, by=lambda ids, table: take(table, ids))
        return rows if self.dtype is None else jnp.asarray(rows, self.dtype)

    def attend(self, query: jax.Array) -> jax.Array:
        """The product with every row: [..., features] -> [..., num_embeddings]."""
        return product(jnp.asarray(query, result_dtype(self.dtype, query, self.embedding, None)), self.embedding)


def linear_view(layer: nnx.Linear) -> View:
    return View(_shape(layer.kernel, layer.in_features, layer.out_features), (), (0,), (1,))


def embed_view(layer: nnx.Embed) -> View:
    return View(_shape(layer.embedding, layer.num_embeddings, layer.features), (), (1,), (0,))


def _shape(weight: nnx.Variable[Any], *said: int) -> tuple[int, ...]:
    """A matrix says itself what it is: it may have been put in place of the layer's first one. A stack cannot."""
    return tuple(weight.shape) if weight.ndim == 2 else said


def product(
    x: jax.Array,
    kernel: Kernel,
    stack: tuple[int, ...] = (),
    by: Callable[[jax.Array, QuantArray], jax.Array] = matmul,
    rows: Any = None,
) -> jax.Array:
    """The product of one layer, whose own matrices are a stack of this shape, at the kernel's width. `rows` is what its
    reader is told beside."""
    array = expect_stack(kernel, stack)
    if kernel.reader is not None:
        made: jax.Array = kernel.reader(x, array) if rows is None else kernel.reader(x, array, rows)
        return made
    return by(x, array) if kernel.width is None else at_width(by, x, array, kernel.width.get_value().reshape(-1)[0])


def expect_stack(kernel: Kernel, stack: tuple[int, ...]) -> QuantArray:
    """The array of a layer, which is a stack of this shape.

    Raises ValueError for a layer that `nnx.vmap` stacked and that is called as if it were one.
    """
    array = kernel.array
    if array.stack != stack:
        raise ValueError(
            f"the weight is a stack {list(array.stack)} of {array.type}, and this layer multiplies a stack "
            f"{list(stack)}: call stacked layers in nnx.scan or nnx.vmap, or slice their state"
        )
    return array


def no_sharding(out_sharding: Any) -> None:
    """Flax's layers take an `out_sharding`, None unless a mesh has explicit axes."""
    if out_sharding is not None:
        raise NotImplementedError(f"out_sharding={out_sharding!r}: quantized layers leave the sharding to the compiler")


def result_dtype(given: Any, x: jax.Array, kernel: Kernel, bias: jax.Array | None) -> Any:
    """What Flax promotes the operands to."""
    if given is not None:
        return given
    return jnp.result_type(x, kernel.dtype, *(() if bias is None else (bias,)))
