"""Layers that choose their width by what they are given (DP-LLM, Park et al. 2025), on the device.

A layer has two widths l < h and a threshold T, and uses h where an estimate of ||y_h - y_l||, what that changes in its
products, or a statistic of x is above T. Where activations are not rounded the norm is ||(W_h - W_l) x||.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.array import QuantArray
from lowbit.nn.kernel import Kernel, expect_module, layer_kernels
from lowbit.nn.statistics import largest, norm, peak
from lowbit.ops import matmul
from lowbit.widths import at_width

M = TypeVar("M", bound=nnx.Module)
By = Literal["row", "call", "most"]
WIDTHS = ("low", "high", "most")
TERMS = ("slope", "offset", "largest", "peak", "projection")
ESTIMATES = tuple(map(frozenset[str], (TERMS[:2], *((term,) for term in TERMS[2:]), ())))
"""What an estimate is made of: of a statistic of x, of a projection, or of both products, which is exact."""


class Choice(nnx.Variable[jax.Array]):
    """What a layer chooses its width by: no parameter, and never trained."""


class Seen(nnx.Variable[jax.Array]):
    """float32 [2]: the sum of the widths of rows, and their number."""


class Switch(nnx.Module):
    """Makes the products of a layer at one of two widths, which its input chooses.

    All that it chooses by is in Variables, so one compiled function serves any thresholds. The estimate e is
    `slope` ||x|| + `offset`, `largest` max |x|, `peak` max |x| / rms x, or ||`projection` x||; without any of these it
    is ||y_h - y_l||, made of both products. Where e is NaN, as of a row with a NaN, the layer uses h.

    Attributes:
      low, high, most: int32 [], the two widths, and that of prompts.
      threshold: float32 []; inf and -inf stand for one width.
      by: see `switching`.
    """

    def __init__(self, values: Mapping[str, jax.Array]) -> None:
        self.low, self.high, self.most, self.threshold = (Choice(values[name]) for name in (*WIDTHS, "threshold"))
        self.slope, self.offset, self.largest, self.peak, self.projection = (
            nnx.data(Choice(values[name]) if name in values else None) for name in TERMS
        )
        self.by: By = "row"
        self.seen: Seen | None = nnx.data(None)

    def __call__(self, x: jax.Array, array: QuantArray) -> jax.Array:
        """[..., k] -> [..., n]."""
        low, high, most = (getattr(self, name).get_value() for name in WIDTHS)
        if self.by == "most":
            return self._read(x, array, most)
        is_high = ~(self.estimate(x, array) <= self.threshold.get_value())  # not >, which is false of NaN
        if self.by == "call":
            return self._read(x, array, jnp.where(is_high.any(), high, low))
        self._note(jnp.where(is_high, high, low))
        return jnp.where(is_high[..., None], at_width(matmul, x, array, high), at_width(matmul, x, array, low))

    def estimate(self, x: jax.Array, array: QuantArray) -> jax.Array:
        """float32 [...], of each row of x [..., k]."""
        if self.projection is not None:
            g = self.projection.get_value()
            projected = jnp.einsum("...k,pk->...p", x.astype(g.dtype), g, preferred_element_type=jnp.float32)
            return norm(projected)
        if self.slope is not None:
            assert self.offset is not None
            return self.slope.get_value() * norm(x) + self.offset.get_value()
        for factor, statistic in ((self.largest, largest), (self.peak, peak)):
            if factor is not None:
                return factor.get_value() * statistic(x)
        return changed(x, array, self.low.get_value(), self.high.get_value())

    def _read(self, x: jax.Array, array: QuantArray, width: jax.Array) -> jax.Array:
        self._note(jnp.broadcast_to(width, x.shape[:-1]))
        return at_width(matmul, x, array, width)

    def _note(self, widths: jax.Array) -> None:
        if self.seen is not None:
            now = jnp.stack([widths.sum().astype(jnp.float32), jnp.float32(widths.size)])
            self.seen.set_value(self.seen.get_value() + now)


def changed(x: jax.Array, array: QuantArray, low: int | jax.Array, high: int | jax.Array) -> jax.Array:
    """||y_h - y_l|| of each row, float32 [...]: the products as they are made, so with activations rounded or not."""
    y_low, y_high = (at_width(matmul, x, array, width).astype(jnp.float32) for width in (low, high))
    return norm(y_high - y_low)


class EffectiveBits(NamedTuple):
    """The widths that layers were read at.

    Attributes:
      mean: float32 [], over all switched weights.
      layers: float32 [] by layer path, over the rows that it multiplied; NaN of a layer that did not run.
    """

    mean: jax.Array
    layers: dict[str, jax.Array]


def switching(model: M, by: By) -> M:
    """The model with its layers choosing their widths row by row, call by call, or not at all; arrays are shared.

    Args:
      model: of `lb.tune.switched`; what does not switch stays as it is.
      by: "row", as it is at first: each position of each sequence has its own width, as if it were decoded alone. Both
        widths are computed, so this is for evaluation. "call": one width for a whole call, the largest that one of its
        rows asks for: a step of decoding, which computes that width alone. "most": the maximum of each layer, for
        prompts. `lb.models.generate` and `Batcher` read prompts by "most" and take steps by "call", in which rows
        without a sequence ask too.

    Raises ValueError for another `by`, TypeError for what is no module.
    """
    expect_module(model, "switch")
    if by not in get_args(By):
        raise ValueError(f"by={by!r} must be one of {', '.join(get_args(By))}")
    out: M = nnx.clone(model)
    for switch in switches(out).values():
        switch.by = by
    return out


def effective_bits(call: Callable[..., Any], model: nnx.Module, *args: Any) -> tuple[Any, EffectiveBits]:
    """What `call(model, *args)` returns, and the widths that were chosen for it.

    To be used within a jitted function or outside of one: the bits are arrays, and nothing waits for them. The model is
    left as it is. Rows that are padding count too.

    Raises ValueError for a model without layers that switch.

    >>> from flax import nnx
    >>> import jax, jax.numpy as jnp, lowbit as lb
    >>> dense = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.relu)
    >>> small = lb.quantize(dense, lb.any_precision(3, 6))
    >>> x = jax.random.normal(jax.random.key(0), (64, 16))
    >>> start = lb.tune.blended(small, most=6, target=3.5)
    >>> model = lb.tune.switched(small, lb.tune.thresholds(start, dense, [x]))
    >>> y, bits = lb.nn.effective_bits(lambda model, x: model(x), model, x)
    >>> 3 <= float(bits.mean) <= 4
    True
    """
    expect_module(model, "count the bits of")
    own = nnx.merge(*nnx.split(model), copy=True)  # Variables of this trace, which may be set
    found = switches(own)
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that switches: make them with lb.tune.switched")
    for switch in found.values():
        switch.seen = Seen(jnp.zeros(2))
    out = call(own, *args)
    seen = {path: switch.seen.get_value() for path, switch in found.items() if switch.seen is not None}
    layers = {path: total / count for path, (total, count) in seen.items()}
    sizes = {path: prod(kernel.shape) for path, kernel in switched_kernels(own).items()}
    ran = {path: jnp.where(seen[path][1] > 0, sizes[path], 0) for path in layers}
    mean = sum(jnp.where(ran[path] > 0, ran[path] * layers[path], 0) for path in layers) / sum(ran.values())
    return out, EffectiveBits(jnp.asarray(mean, jnp.float32), layers)


def switched_kernels(model: Any) -> dict[str, Kernel]:
    """The kernels of the layers that switch, by layer path."""
    return {path: k for path, k in layer_kernels(model).items() if isinstance(k.reader, Switch)}


def switches(model: Any) -> dict[str, Switch]:
    return {path: kernel.reader for path, kernel in switched_kernels(model).items()}
