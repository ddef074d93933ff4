"""How wide each layer may become within a memory budget: the first phase of DP-LLM (Park et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.array import QuantArray, dequantize
from lowbit.formats.format import Format
from lowbit.nn.allocate import harm_by
from lowbit.nn.allocation import Candidate, solve
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.kernel import Kernel
from lowbit.nn.kinds import dense_matrices
from lowbit.nn.kinds import layers as dense_layers
from lowbit.nn.rules import Rule
from lowbit.tune.nested import largest, nested, weights

M = TypeVar("M", bound=nnx.Module)


def max_widths(
    model: nnx.Module,
    dense: nnx.Module,
    stats: Mapping[str, LayerStats],
    *,
    bits: float,
    layers: str | Sequence[str] = "**",
) -> dict[str, int]:
    """The largest width that each layer needs stored, so that all of them keep a budget and lose least.

    With D_b the error of a weight read at b bits and F the mean squared gradients of the loss, an integer program picks
    a width for each layer that minimizes the sum of F D_b^2, and is solved exactly. The planes of a layer beyond its
    width need not be stored: `narrowed` drops them.

    Args:
      model: quantized in nested formats; left as it is.
      dense: the model that it was made from.
      stats: `gradient_square` of each layer, by `lb.calibrate(dense, ..., statistics=["gradient_square"], loss=...)`.
      bits: the budget of index bits per weight; tables are not counted.
      layers: patterns over the paths of the quantized layers that choose their widths.

    Raises ValueError for a budget below the least widths (both sizes are named), for layers that are not nested (they
    are named), for those that `dense` or `stats` lack, and for weights that are not those of `dense`: even zeros are
    nearer to these. TypeError for what is no module.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> dense = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 16, rngs=nnx.Rngs(1)))
    >>> wanted = {"statistics": ["gradient_square"], "loss": lambda model, x: (model(x) ** 2).mean()}
    >>> stats = lb.calibrate(dense, [jnp.ones((4, 16))], **wanted)
    >>> small = lb.quantize(dense, lb.any_precision(2, 4))
    >>> sum(lb.tune.max_widths(small, dense, stats, bits=3.0).values())
    6
    """
    found: list[Candidate] = []
    known = dense_layers(dense)
    for path, kernel in nested(model, layers).items():
        if path not in known or path not in stats:
            lacks = "the dense model" if path not in known else "stats"
            raise ValueError(f"{lacks} has no layer {path!r}: give the model that this one was made from, and its own")
        found += candidates(path, kernel, known[path], harm_by(path, known[path], stats, "loss"))
    return within(found, bits)


def candidates(path: str, kernel: Kernel, layer: nnx.Module, harm: Callable[[jax.Array], float]) -> list[Candidate]:
    """A nested weight at each of its widths, with the harm of its error, float32 [*stack, k, n].

    Raises ValueError for a dense layer that it was not made from.
    """
    exact = dense_matrices(layer).astype(jnp.float32)
    if exact.shape != kernel.shape:
        raise ValueError(
            f"layer {path!r} is {list(kernel.shape)} and in the dense model {list(exact.shape)}: give the model that "
            "it was made from"
        )
    out = []
    for b in kernel.type.format.widths:
        t, size = kernel.type.at(b), weights(kernel)
        error = dequantize(QuantArray(kernel.array.fields, t)).astype(jnp.float32) - exact
        out.append(Candidate(path, Rule(path, t.format), size, size * b, harm(error)))
    if jnp.vdot(error, error) > jnp.vdot(exact, exact):  # at the largest width
        raise ValueError(
            f"layer {path!r} is farther from that of the dense model than zeros are, at {b} bits: give the model that "
            "it was made from"
        )
    return out


def within(found: Sequence[Candidate], bits: float, least: float = 0.0) -> dict[str, int]:
    """The width of each layer that has the least harm in all, with so many bits per weight at most and at least."""
    total = sum({c.layer: c.weights for c in found}.values()) * (1 + 2**-51)  # a product may be rounded down
    return {c.layer: c.bits // c.weights for c in solve(tuple(found), bits * total, least * total).chosen}


def narrowed(model: M, most: int | Mapping[str, int], *, layers: str | Sequence[str] = "**") -> M:
    """A copy of a model of nested weights without the planes and tables that only widths beyond the largest read.

    An `lb.any_precision(3, 6)` layer of the largest width 4 becomes `lb.any_precision(3, 4)`, bit for bit the same at
    widths 3 and 4. One of the largest width 3 is read at that width alone, and goes through `blended` and what follows
    like the others.

    Args:
      model: left as it is; arrays that are stored whole are shared.
      most: the largest width, of all layers or of each by path, as `max_widths` gives it.
      layers: patterns over the paths of the quantized layers.

    Raises ValueError for layers that are not nested (they are named), a layer that `most` lacks, a width that a layer
    does not have or, as 8 of `lb.nested_fp`, cannot have alone, and for layers that were blended, switched or laid out
    by `lb.prepare`.

    >>> from flax import nnx
    >>> import lowbit as lb
    >>> small = lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), lb.any_precision(3, 6))
    >>> less = lb.tune.narrowed(small, 4)
    >>> less.kernel.type.format.widths, less.kernel.planes.shape, small.kernel.planes.shape
    ((3, 4), (4, 8, 1, 2), (6, 8, 1, 2))
    """
    out: M = nnx.clone(model)
    for path, kernel in nested(out, layers).items():
        width = largest(path, kernel, most)
        if kernel.reader is not None or kernel.type.layout != "own":
            raise ValueError(f"layer {path!r} chooses between its widths or is laid out for a device: narrow it before")
        if width < kernel.type.format.widths[-1]:
            _narrow(path, kernel, width)
    return out


def _narrow(path: str, kernel: Kernel, width: int) -> None:
    fmt = kernel.type.format
    options = dict(fmt.options)
    if "hi" not in options:
        raise ValueError(f"layer {path!r} is {fmt}, which is stored whole: its largest width is {fmt.widths[-1]}")
    if (fmt["width"] or fmt["hi"]) > width:
        options["width"] = None
        kernel.stats.set_value(jnp.full_like(kernel.stats.get_value(), jnp.nan))  # of what it was read at
    old = kernel.type.fields
    kernel.type = replace(kernel.type, format=Format(fmt.name, tuple(sorted({**options, "hi": width}.items()))))
    for name in old.keys() - kernel.type.fields.keys():
        delattr(kernel, name)
    for name, leaf in kernel.type.fields.items():  # planes begin with those of the least width
        variable = getattr(kernel, name)
        variable.set_value(variable.get_value()[(..., *map(slice, leaf.dims.values()))])
