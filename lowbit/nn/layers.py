"""Quantized layers that stand where their Flax namesakes stood."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.kernel import Kernel
from lowbit.ops import matmul, take


class Linear(nnx.Module):
    """`nnx.Linear` over a quantized kernel [in, out]. Made by `lb.quantize`.

    The product is accumulated in float32; result and bias follow Flax's promotion of input, kernel and bias, or
    `dtype`.
    """

    def __init__(self, kernel: Kernel, bias: nnx.Variable[Any] | None, dtype: Any = None) -> None:
        self.kernel = kernel
        self.bias = nnx.data(bias)
        self.in_features, self.out_features = kernel.shape
        self.use_bias = bias is not None
        self.dtype = dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[..., in_features] -> [..., out_features]. Raises ValueError for another last dim."""
        bias = None if self.bias is None else self.bias.get_value()
        dtype = _dtype(self.dtype, inputs, self.kernel, bias)
        y = matmul(jnp.asarray(inputs, dtype), self.kernel.array)
        return y if bias is None else y + jnp.asarray(bias, dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class Embed(nnx.Module):
    """`nnx.Embed` over a quantized table [num_embeddings, features]: rows are decoded as they are looked up.

    `attend` is the product with the same stored arrays, for output heads tied to the embedding.
    """

    def __init__(self, embedding: Kernel, dtype: Any = None) -> None:
        self.embedding = embedding
        self.num_embeddings, self.features = embedding.shape
        self.dtype = dtype

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Integer ids [...] -> rows [..., features]; an id out of range gives NaN."""
        rows = take(self.embedding.array, inputs)
        return rows if self.dtype is None else jnp.asarray(rows, self.dtype)

    def attend(self, query: jax.Array) -> jax.Array:
        """The product with every row: [..., features] -> [..., num_embeddings]."""
        return matmul(jnp.asarray(query, _dtype(self.dtype, query, self.embedding, None)), self.embedding.array)


def _dtype(given: Any, x: jax.Array, kernel: Kernel, bias: jax.Array | None) -> Any:
    if given is not None:
        return given
    return jnp.result_type(x, kernel.dtype, *(() if bias is None else (bias,)))
