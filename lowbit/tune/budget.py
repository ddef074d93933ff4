"""How wide each layer may become within a memory budget: the first phase of DP-LLM (Park et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx

from lowbit.array import QuantArray, dequantize
from lowbit.nn.allocate import harm_by
from lowbit.nn.allocation import Candidate, solve
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.kernel import Kernel
from lowbit.nn.kinds import dense_matrices
from lowbit.nn.kinds import layers as dense_layers
from lowbit.nn.rules import Rule
from lowbit.tune.nested import nested, weights


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
    width need not be on the device.

    Args:
      model: quantized in nested formats; left as it is.
      dense: the model that it was made from.
      stats: `gradient_square` of each layer, by `lb.calibrate(dense, ..., statistics=["gradient_square"], loss=...)`.
      bits: the budget of index bits per weight; tables are not counted.
      layers: patterns over the paths of the quantized layers that choose their widths.

    Raises ValueError for a budget below the least widths (both sizes are named), for layers that are not nested (they
    are named), and for those that `dense` or `stats` lack; TypeError for what is no module.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> dense = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 16, rngs=nnx.Rngs(1)))
    >>> wanted = {"statistics": ["gradient_square"], "loss": lambda model, x: (model(x) ** 2).mean()}
    >>> stats = lb.calibrate(dense, [jnp.ones((4, 16))], **wanted)
    >>> small = lb.quantize(dense, lb.any_precision(2, 4))
    >>> sum(lb.tune.max_widths(small, dense, stats, bits=3.0).values())
    6
    """
    candidates: list[Candidate] = []
    known = dense_layers(dense)
    for path, kernel in nested(model, layers).items():
        if path not in known or path not in stats:
            lacks = "the dense model" if path not in known else "stats"
            raise ValueError(f"{lacks} has no layer {path!r}: give the model that this one was made from, and its own")
        candidates += _candidates(path, kernel, known[path], stats)
    return {c.layer: c.bits // c.weights for c in solve(tuple(candidates), bits * _total(candidates)).chosen}


def _candidates(path: str, kernel: Kernel, layer: nnx.Module, stats: Mapping[str, LayerStats]) -> list[Candidate]:
    harm, exact = harm_by(path, layer, stats, "loss"), dense_matrices(layer).astype(jnp.float32)
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
    return out


def _total(candidates: Sequence[Candidate]) -> float:
    return sum({c.layer: c.weights for c in candidates}.values()) * (1 + 2**-51)  # a product may be rounded down
