"""`Einsum` over a quantized kernel: its letters say which axes are a stack, summed, or kept."""

from __future__ import annotations

from string import ascii_letters

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.kernel import Kernel
from lowbit.nn.layers import no_sharding, product, result_dtype
from lowbit.nn.view import View, ends


class Einsum(nnx.Module):
    """`nnx.Einsum` over a quantized kernel. Made by `lb.quantize`.

    Letters of the kernel that input and output share are a stack of matrices, those of the input alone are k, those of
    the output alone n. k runs over its letters in the order in which the kernel has them, the last one fastest: the
    groups of a format lie along that. Attributes, result and bias are as in Flax; sums are accumulated in float32.
    """

    def __init__(self, layer: nnx.Einsum, kernel: Kernel) -> None:
        self.kernel = kernel
        self.bias = nnx.data(layer.bias)
        self.einsum_str, self.kernel_shape, self.bias_shape = layer.einsum_str, layer.kernel_shape, layer.bias_shape
        self.dtype = layer.dtype
        self.view = einsum_view(layer)

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: None = None) -> jax.Array:
        """The einsum of input and kernel. Raises ValueError for another string than the layer was quantized for."""
        no_sharding(out_sharding)
        if einsum_str is not None and einsum_str.replace(" ", "") != self.einsum_str:
            raise ValueError(f"the kernel was quantized for {self.einsum_str!r}, it cannot compute {einsum_str!r}")
        bias = None if self.bias is None else self.bias.get_value()
        dtype = result_dtype(self.dtype, inputs, self.kernel, bias)
        stack = self.view.sizes(self.view.stack)
        y = product(einsum_rows(self, jnp.asarray(inputs, dtype)), self.kernel, stack)

        x, kernel, out = _operands(self.einsum_str, inputs.ndim)
        size = dict(zip(kernel, self.kernel_shape, strict=True))
        kept = [kernel[a] for a in self.view.kept]
        have = [*(kernel[a] for a in self.view.stack), *(c for c in x if c not in kernel), *kept]
        y = y.reshape(*y.shape[:-1], *(size[c] for c in kept)).transpose([have.index(c) for c in out])
        return y if bias is None else y + jnp.asarray(bias, dtype).reshape([size.get(c, 1) for c in out])


def einsum_view(layer: nnx.Einsum | Einsum) -> View:
    """Raises ValueError with the reason when the string is no product with a stack of matrices."""
    text, shape = layer.einsum_str, tuple(layer.kernel_shape)
    x, kernel, out = _operands(text, None)
    if "." in kernel or ("..." in text.split(",")[0]) != ("..." in text.split("->")[1]):
        raise ValueError(f"its einsum {text!r} has an ellipsis that is not one of both input and output")
    for name, letters in (("input", x), ("kernel", kernel), ("output", out)):
        if len(set(letters)) < len(letters):
            raise ValueError(f"its einsum {text!r} repeats a letter within the {name}")
    if len(kernel) != len(shape):
        raise ValueError(f"its einsum {text!r} names {len(kernel)} axes of a kernel with the shape {shape}")
    if alone := (set(x) ^ set(kernel)) - set(out):
        raise ValueError(f"its einsum {text!r} sums {min(alone)!r} over one operand alone, which is no product")
    summed = tuple(i for i, c in enumerate(kernel) if c not in out)
    if not summed:
        raise ValueError(f"its einsum {text!r} sums over no axis of the kernel, which is no product")
    stack = tuple(i for i, c in enumerate(kernel) if c in out and c in x)
    return View(shape, stack, summed, tuple(i for i, c in enumerate(kernel) if c not in x))


def einsum_rows(layer: nnx.Einsum | Einsum, inputs: jax.Array) -> jax.Array:
    """The input as the matrices meet it: [*stack, ..., k]."""
    x, kernel, _ = _operands(layer.einsum_str, inputs.ndim)
    view = einsum_view(layer)
    if len(x) != inputs.ndim:
        raise ValueError(f"the input has shape {inputs.shape}, but {layer.einsum_str!r} names {len(x)} axes of it")
    return view.rows(inputs, *([x.index(kernel[a]) for a in axes] for axes in (view.stack, view.summed)))


def einsum_outputs(layer: nnx.Einsum, outputs: jax.Array) -> jax.Array:
    """The output as the matrices gave it: [*stack, ..., n]."""
    view, text = einsum_view(layer), layer.einsum_str
    _, kernel, out = _operands(text, outputs.ndim + len(text.split(",")[0]) - len(text.split("->")[1]))
    return ends(outputs, *([out.index(kernel[a]) for a in axes] for axes in (view.stack, view.kept)))


def _operands(text: str, ndim: int | None) -> tuple[str, str, str]:
    """The letters of input, kernel and output; the input's ellipsis as letters of its own, one if ndim is not known."""
    operands, out = text.split("->")
    x, kernel = operands.split(",")
    count = 1 if ndim is None else max(0, ndim - len(x) + 3)
    free = "".join(c for c in ascii_letters if c not in text)[:count]
    return x.replace("...", free), kernel, out.replace("...", free)
