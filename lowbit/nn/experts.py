"""The experts of a mixture as one layer: rows sorted by expert, each multiplied by its own matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.grouped import grouped_matmul
from lowbit.nn.kernel import Kernel
from lowbit.nn.layers import product, result_dtype
from lowbit.nn.view import View


class Experts(nnx.Module):
    """A dense matrix for each expert, kernel [num_experts, in_features, out_features]; `lb.quantize` replaces it.

    Args:
      num_experts, in_features, out_features: of the kernel, which is initialized as in `nnx.Linear`, each expert apart.
      dtype: of the computation; that of input and kernel together if None.
      param_dtype: of the kernel.
      rngs: its stream `params` is used.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> experts = lb.nn.Experts(4, 16, 8, rngs=nnx.Rngs(0))
    >>> x, sizes = jnp.ones((6, 16)), jnp.array([1, 0, 3, 2])  # the first row is the first expert's, ...
    >>> experts(x, sizes).shape, lb.quantize(experts, lb.bcq(3))(x, sizes).shape
    ((6, 8), (6, 8))
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        start = nnx.initializers.lecun_normal(batch_axis=0)
        self.kernel = nnx.Param(start(rngs.params(), (num_experts, in_features, out_features), param_dtype))
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.dtype = dtype

    def __call__(self, inputs: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """[rows, in_features], sorted by expert, and the rows of each -> [rows, out_features]: `jax.lax.ragged_dot`."""
        kernel = self.kernel.get_value()
        dtype = jnp.result_type(inputs, kernel) if self.dtype is None else self.dtype
        return jax.lax.ragged_dot(jnp.asarray(inputs, dtype), jnp.asarray(kernel, dtype), group_sizes)


class QuantizedExperts(nnx.Module):
    """`lb.nn.Experts` over a quantized kernel. Made by `lb.quantize`; see `lb.grouped_matmul`."""

    def __init__(self, layer: Experts, kernel: Kernel) -> None:
        self.kernel = kernel
        self.num_experts, self.in_features, self.out_features = layer.num_experts, layer.in_features, layer.out_features
        self.dtype = layer.dtype

    def __call__(self, inputs: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """[rows, in_features], sorted by expert, and the rows of each -> [rows, out_features]."""
        x = jnp.asarray(inputs, result_dtype(self.dtype, inputs, self.kernel, None))
        return product(x, self.kernel, (self.num_experts,), lambda x, w: grouped_matmul(x, w, group_sizes))


def experts_view(layer: Experts) -> View:
    return View((layer.num_experts, layer.in_features, layer.out_features), (0,), (1,), (2,))
