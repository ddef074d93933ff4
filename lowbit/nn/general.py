"""`LinearGeneral` over a quantized kernel: the product over several axes of the input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.kernel import Kernel
from lowbit.nn.layers import no_sharding, product, result_dtype
from lowbit.nn.view import View


class LinearGeneral(nnx.Module):
    """`nnx.LinearGeneral` over a quantized kernel [*batch, *in, *out]. Made by `lb.quantize`.

    The kernel is a stack [*batch] of matrices whose k runs over `in_features` in their order, the last one fastest:
    the groups of a format lie along that. Attributes, result and bias are as in Flax; the product is accumulated in
    float32.
    """

    def __init__(self, layer: nnx.LinearGeneral, kernel: Kernel) -> None:
        self.kernel = kernel
        self.bias = nnx.data(layer.bias)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.axis, self.batch_axis = layer.axis, layer.batch_axis
        self.use_bias, self.dtype = layer.use_bias, layer.dtype
        self.view = general_view(layer)

    def __call__(self, inputs: jax.Array, out_sharding: None = None) -> jax.Array:
        """As in Flax: the batch axes first, then the other axes that stay, then `out_features`.

        Raises ValueError for an input with other sizes along the axes of the product.
        """
        no_sharding(out_sharding)
        bias = None if self.bias is None else self.bias.get_value()
        dtype = result_dtype(self.dtype, inputs, self.kernel, bias)
        batch = self.view.sizes(self.view.stack)
        y = product(general_rows(self, jnp.asarray(inputs, dtype)), self.kernel, batch)
        y = y.reshape(*y.shape[:-1], *self.out_features)
        if bias is None:
            return y
        kept = y.ndim - len(batch) - len(self.out_features)
        return y + jnp.asarray(bias, dtype).reshape(*batch, *(1,) * kept, *self.out_features)


def general_view(layer: nnx.LinearGeneral | LinearGeneral) -> View:
    batch = tuple(layer.batch_axis.values())
    shape = (*batch, *layer.in_features, *layer.out_features)
    first = len(batch) + len(layer.in_features)
    axes = tuple(range(len(shape)))
    return View(shape, axes[: len(batch)], axes[len(batch) : first], axes[first:])


def general_outputs(layer: nnx.LinearGeneral, outputs: jax.Array) -> jax.Array:
    """The output as the matrices gave it: [*batch, ..., n]."""
    return outputs.reshape(*outputs.shape[: outputs.ndim - len(layer.out_features)], -1)


def general_rows(layer: nnx.LinearGeneral | LinearGeneral, inputs: jax.Array) -> jax.Array:
    """The input as the matrices meet it: [*batch, ..., k]."""
    axes = (sorted(a % inputs.ndim for a in given) for given in (layer.batch_axis, layer.axis))
    return general_view(layer).rows(inputs, *axes)
