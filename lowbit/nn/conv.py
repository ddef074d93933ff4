"""`Conv` over a quantized kernel: a product with the patches of the input."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import canonicalize_padding
from jax import lax

from lowbit.nn.kernel import Kernel
from lowbit.nn.layers import no_sharding, product, result_dtype
from lowbit.nn.view import View


class Conv(nnx.Module):
    """`nnx.Conv` over a quantized kernel [*window, in / groups, out]. Made by `lb.quantize`.

    The kernel is a matrix, or one for each group of features, whose k runs over the input features and within a
    feature over the window: the groups of a format lie along that, so `group=prod(kernel_size)` gives each filter its
    own scales. A window of one point with stride 1 is a plain product; any other one writes the patches of the input,
    prod(kernel_size) times its size. Attributes, padding and bias are as in Flax; sums are accumulated in float32.
    """

    def __init__(self, layer: nnx.Conv, kernel: Kernel) -> None:
        self.kernel = kernel
        self.bias = nnx.data(layer.bias)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kernel_size, self.kernel_shape = layer.kernel_size, layer.kernel_shape
        self.strides, self.padding, self.feature_group_count = layer.strides, layer.padding, layer.feature_group_count
        self.input_dilation, self.kernel_dilation = layer.input_dilation, layer.kernel_dilation
        self.use_bias, self.dtype = layer.use_bias, layer.dtype
        self.view = conv_view(layer)

    def __call__(self, inputs: jax.Array, out_sharding: None = None) -> jax.Array:
        """[*batch, *space, in_features] -> [*batch, *space, out_features]; ValueError for other in_features."""
        no_sharding(out_sharding)
        bias = None if self.bias is None else self.bias.get_value()
        dtype = result_dtype(self.dtype, inputs, self.kernel, bias)
        y = product(conv_rows(self, jnp.asarray(inputs, dtype)), self.kernel, self.view.sizes(self.view.stack))
        if self.view.stack:
            y = jnp.moveaxis(y, 0, -2)
            y = y.reshape(*y.shape[:-2], -1)
        batch = inputs.shape[: inputs.ndim - len(self.kernel_size) - 1]
        y = y.reshape(*batch, *y.shape[1:])
        return y if bias is None else y + jnp.asarray(bias, dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def conv_view(layer: nnx.Conv | Conv) -> View:
    *window, features, out = layer.kernel_shape
    space, groups = tuple(range(len(window))), layer.feature_group_count
    axes = len(space), *space
    if groups == 1:
        return View((*window, features, out), (), axes, (len(space) + 1,))
    split = (*window, features, groups, out // groups)
    return View((*window, features, out), (len(space) + 1,), axes, (len(space) + 2,), split)


def conv_rows(layer: nnx.Conv | Conv, inputs: jax.Array) -> jax.Array:
    """The patches as the matrices meet them: [batch, *space, k], after the groups of features if there are several.

    Raises ValueError for another number of features or too few axes.
    """
    window: tuple[int, ...] = layer.kernel_size
    if inputs.ndim <= len(window) or inputs.shape[-1] != layer.in_features:
        raise ValueError(
            f"the input has shape {inputs.shape}: it must be [*batch, *space, features] with {len(window)} axes of "
            f"space and {layer.in_features} features"
        )
    x = inputs.reshape(-1, *inputs.shape[inputs.ndim - len(window) - 1 :])
    strides, spread, dilation = (_each(v, window) for v in (layer.strides, layer.input_dilation, layer.kernel_dilation))
    padding = canonicalize_padding(layer.padding, len(window))
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        widths = [(0, 0), *(((s - 1) // 2, s // 2) for s in spans), (0, 0)]
        x, padding = jnp.pad(x, widths, mode="wrap" if padding == "CIRCULAR" else "reflect"), "VALID"
    elif padding == "CAUSAL":
        if len(window) != 1:
            raise ValueError(f"CAUSAL padding is for one axis of space, not for a window {window}")
        x, padding = jnp.pad(x, [(0, 0), (spans[0] - 1, 0), (0, 0)]), "VALID"
    padded = not isinstance(padding, str) and any(map(any, padding))
    if padded or prod((*window, *strides, *spread)) > 1:
        space = "".join(chr(ord("0") + i) for i in range(len(window)))
        # Patches are sums of one entry and zeros: exact where the multiplications are.
        x = lax.conv_general_dilated_patches(
            x, window, strides, padding, lhs_dilation=spread, rhs_dilation=dilation,
            dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"), precision=lax.Precision.HIGHEST,
        )  # fmt: skip
    return conv_groups(layer, x)


def conv_groups(layer: nnx.Conv | Conv, x: jax.Array) -> jax.Array:
    """[..., features], in or out, with the groups of features first if there are several: [groups, ..., features]."""
    groups = layer.feature_group_count
    return x if groups == 1 else jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)


def _each(value: int | Sequence[int] | None, window: tuple[int, ...]) -> tuple[int, ...]:
    """A value for each axis of space, from one for all; None is 1, as in Flax."""
    return (value or 1,) * len(window) if value is None or isinstance(value, int) else tuple(value)
