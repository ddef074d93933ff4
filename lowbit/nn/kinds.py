"""The kinds of layers that can be quantized: one table for `quantize`, `calibrate`, `compare` and `report`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.conv import Conv, conv_groups, conv_rows, conv_view
from lowbit.nn.einsum import Einsum, einsum_outputs, einsum_rows, einsum_view
from lowbit.nn.experts import Experts, QuantizedExperts, experts_view
from lowbit.nn.general import LinearGeneral, general_outputs, general_rows, general_view
from lowbit.nn.kernel import Kernel, joined
from lowbit.nn.layers import Embed, Linear, embed_view, linear_view
from lowbit.nn.view import View


@dataclass(frozen=True)
class Kind:
    """One kind of dense layer.

    Attributes:
      quantized: the class of the layer that takes its place.
      make: from the dense layer and its quantized weight.
      view: how its weight is a stack of matrices; raises ValueError with the reason if it is none.
      rows: from a dense layer and an input of its product to what the matrices multiply, [*stack, ..., k]; [..., k] if
        the stack `shares` its rows, which are then measured together.
      outputs: from a dense layer and an output of its product to what the matrices gave, [*stack, ..., n], in the
        order of the rows; [..., n] if the stack `shares` its rows.
      attribute: that holds the weight.
      method: that is the product.
    """

    quantized: type[nnx.Module]
    make: Callable[[Any, Kernel], nnx.Module]
    view: Callable[[Any], View]
    rows: Callable[[Any, jax.Array], jax.Array] = lambda layer, inputs: inputs
    outputs: Callable[[Any, jax.Array], jax.Array] = lambda layer, outputs: outputs
    attribute: str = "kernel"
    method: str = "__call__"
    shares: bool = False


KINDS: Mapping[type[nnx.Module], Kind] = {
    nnx.Linear: Kind(Linear, lambda layer, kernel: Linear(kernel, layer.bias, layer.dtype), linear_view),
    nnx.Embed: Kind(
        Embed, lambda layer, kernel: Embed(kernel, layer.dtype), embed_view, attribute="embedding", method="attend"
    ),
    nnx.LinearGeneral: Kind(LinearGeneral, LinearGeneral, general_view, general_rows, general_outputs),
    nnx.Einsum: Kind(Einsum, Einsum, einsum_view, einsum_rows, einsum_outputs),
    nnx.Conv: Kind(Conv, Conv, conv_view, conv_rows, conv_groups),
    Experts: Kind(QuantizedExperts, QuantizedExperts, experts_view, shares=True),
}
"""Dense layers by their exact type: a subclass may compute something else."""

QUANTIZED: Mapping[type[nnx.Module], Kind] = {kind.quantized: kind for kind in KINDS.values()}
_PLACES = {dense: "lb.nn" if dense.__module__.startswith("lowbit") else "nnx" for dense in KINDS}
NAMES = " or ".join(", ".join(f"{_PLACES[d]}.{d.__name__}" for d in KINDS).rsplit(", ", 1))
OPTIONS = (
    "dot_general", "dot_general_cls", "einsum_op", "conv_general_dilated", "promote_dtype", "preferred_element_type",
    "mask",
)  # fmt: skip
"""Options of layers that change what they compute, so that only their defaults can be quantized."""


def layers(model: nnx.Module) -> dict[str, Any]:
    """The dense layers of a model that rules can name, by path; a shared layer appears once, under its first path.

    Raises ValueError for two of one name, as with nnx.Dict({"a/b": ...}) beside a.b.
    """
    found = [(path, m) for path, m in nnx.iter_modules(model) if type(m) in KINDS]
    named: dict[str, Any] = {}
    for path, layer in sorted(found, key=lambda pm: [_natural(k) for k in pm[0]]):
        if joined(path) in named:
            raise ValueError(f"two layers are named {joined(path)!r}: rename one, so that rules can tell them apart")
        named[joined(path)] = layer
    return named


def _natural(key: Any) -> tuple[int, Any]:
    return (0, key) if isinstance(key, int) else (1, str(key))


def weight(layer: Any) -> nnx.Variable[Any]:
    """The Variable that holds the weight of a dense layer of a known kind."""
    variable: nnx.Variable[Any] = getattr(layer, KINDS[type(layer)].attribute)
    return variable


def dense_matrices(layer: Any) -> Any:
    """A layer's dense weight, [*stack, k, n]."""
    return KINDS[type(layer)].view(layer).matrices(jnp.asarray(weight(layer).get_value()))


def statistic_shape(layer: Any, dims: str, chunks: int = 1) -> tuple[int, ...]:
    """[*stack, *dims], of a statistic of each input of a dense layer, "k", each two inputs, "kk", output, "n", or each
    of `chunks` parts of the outputs, "c"; with no dims a number for each matrix."""
    kind = KINDS[type(layer)]
    view = kind.view(layer)
    lead = view.lead(weight(layer).get_value())
    return (
        *lead,
        *(() if kind.shares else view.sizes(view.stack)),
        *(chunks if d == "c" else view.size(d) for d in dims),
    )


def refusal(layer: Any, *, filled: bool = True) -> str | None:
    """Why a layer cannot be quantized and what to do, or None. Only one that is `filled` needs a weight."""
    usual = inspect.signature(type(layer).__init__).parameters
    for name in OPTIONS:
        if name in usual and getattr(layer, name) is not usual[name].default:
            return f"its {name} is not the default one; leave it dense with a rule for its path with the format None"
    value = weight(layer).get_value()
    if filled and isinstance(value, jax.ShapeDtypeStruct):
        return "its weight is abstract; nnx.eval_shape(lambda m: lb.quantize(m, rules), model) gives an abstract result"
    try:
        KINDS[type(layer)].view(layer).lead(value)
    except ValueError as err:
        return f"{err}; leave it dense with a rule for its path with the format None"
    return None
