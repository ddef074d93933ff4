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
SETTINGS: Mapping[str, tuple[Any, ...]] = {"by": get_args(By)}
"""What of a `Switch` is no array, and the values that it may have: a saved model has it beside the arrays."""
WIDTHS = ("low", "high", "most")
TERMS = ("slope", "offset", "largest", "peak", "projection")
ESTIMATES = tuple(map(frozenset[str], (TERMS[:2], *((term,) for term in TERMS[2:]), ())))
"""What an estimate is made of: of a statistic of x, of a projection, or of both products, which is exact."""


class Choice(nnx.Variable[jax.Array]):
    """What a layer chooses its width by: no parameter, and never trained."""


class Seen(nnx.Variable[jax.Array]):
    """float32 [2]: the sum of the widths of rows, and their number."""


class Rows(NamedTuple):
    """What a model tells layers that switch of the rows that they multiply.

    Attributes:
      positions: int32 [...], negative where there is no token: such a row asks for nothing and is not counted.
      older: [..., k], the input of the layer as it would be without the sublayer before it; None where no layer is
        asked by it. What is estimated from it need not wait for that sublayer.
    """

    positions: jax.Array
    older: jax.Array | None = None


class Switch(nnx.Module):
    """Makes the products of a layer at one of two widths, which its input chooses.

    All that it chooses by is in Variables, so one compiled function serves any thresholds. The estimate e is
    `slope` ||x|| + `offset`, `largest` max |x|, `peak` max |x| / rms x, or ||`projection` x||; without any of these it
    is ||y_h - y_l||, made of both products. Where e is NaN, as of a row with a NaN, the layer uses h.

    Attributes:
      low, high, most: int32 [], the two widths, and that of prompts.
      threshold: float32 []; inf and -inf stand for one width.
      asynchronous: there if the estimate is of `Rows.older`, not of the input; a Variable, so that files have it too.
      by: see `switching`.
    """

    def __init__(self, values: Mapping[str, jax.Array]) -> None:
        self.low, self.high, self.most, self.threshold = (Choice(values[name]) for name in (*WIDTHS, "threshold"))
        self.slope, self.offset, self.largest, self.peak, self.projection = (
            nnx.data(Choice(values[name]) if name in values else None) for name in TERMS
        )
        self.asynchronous = nnx.data(Choice(values["asynchronous"]) if "asynchronous" in values else None)
        self.by: By = "row"
        self.seen: Seen | None = nnx.data(None)

    def __call__(self, x: jax.Array, array: QuantArray, rows: Rows | None = None) -> jax.Array:
        """[..., k] -> [..., n]. Without `rows` each row has a token. Raises ValueError for an asynchronous layer that
        is not told of older inputs."""
        low, high, most = (getattr(self, name).get_value() for name in WIDTHS)
        has_token = None if rows is None else rows.positions >= 0
        if self.by == "most":
            return self._read(x, array, most, has_token)
        is_high = ~(self.estimate(self._asked_by(x, rows), array) <= self.threshold.get_value())  # so also of NaN
        if has_token is not None:
            is_high &= has_token
        if self.by == "call":
            return self._read(x, array, jnp.where(is_high.any(), high, low), has_token)
        self._note(jnp.where(is_high, high, low), has_token)
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

    def _asked_by(self, x: jax.Array, rows: Rows | None) -> jax.Array:
        """What the estimate is of."""
        if self.asynchronous is None:
            return x
        if rows is None or rows.older is None:
            raise ValueError(
                "this layer chooses its width by an older input than its own, and was given none: call it as a part of "
                "its lb.models.Decoder, or make the model with lb.tune.switched(..., asynchronous=False)"
            )
        return jnp.asarray(rows.older, x.dtype)

    def _read(self, x: jax.Array, array: QuantArray, width: jax.Array, has_token: jax.Array | None) -> jax.Array:
        self._note(jnp.broadcast_to(width, x.shape[:-1]), has_token)
        return at_width(matmul, x, array, width)

    def _note(self, widths: jax.Array, has_token: jax.Array | None) -> None:
        if self.seen is not None:
            counts = jnp.ones(widths.shape, bool) if has_token is None else has_token
            now = jnp.stack([jnp.where(counts, widths, 0).sum(), counts.sum()])
            self.seen.set_value(self.seen.get_value() + now.astype(jnp.float32))


def ask(layer: Any, x: jax.Array, rows: Rows) -> jax.Array:
    """layer(x), of which it is told more if it switches."""
    y: jax.Array = layer(x, rows) if isinstance(_reader(layer), Switch) else layer(x)
    return y


def asks_older(*layers: Any) -> bool:
    """Whether one of these layers chooses its width by `Rows.older`."""
    found = map(_reader, layers)
    return any(isinstance(r, Switch) and r.asynchronous is not None and r.by != "most" for r in found)


def _reader(layer: Any) -> Any:
    return getattr(getattr(layer, "kernel", None), "reader", None)


def changed(x: jax.Array, array: QuantArray, low: int | jax.Array, high: int | jax.Array) -> jax.Array:
    """||y_h - y_l|| of each row, float32 [...]: the products as they are made, so with activations rounded or not."""
    y_low, y_high = (at_width(matmul, x, array, width).astype(jnp.float32) for width in (low, high))
    return norm(y_high - y_low)


class EffectiveBits(NamedTuple):
    """The widths that layers were read at.

    Attributes:
      mean: float32 [], over all switched weights.
      layers: float32 [] by layer path, over the rows that it multiplied; NaN of a layer that multiplied none.
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
        prompts. `lb.models.generate` and `Batcher` read prompts by "most" and take steps by "call", in which the
        sequences of a batch have one width, the maximum over them; a row without a sequence asks for nothing.

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
    left as it is. A model of `lb.models` does not count places without a token; of others each row counts.

    Raises ValueError for a model without layers that switch, and Flax its TraceContextError where `call` runs such
    layers within `jax.vmap`, `jax.lax.scan` or `jax.checkpoint`: count within these, or use `nnx.remat`.

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
    found = expect_switches(own)
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


def expect_switches(model: nnx.Module) -> dict[str, Switch]:
    """By layer path. Raises ValueError for a model that has none."""
    found = switches(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that switches: make them with lb.tune.switched")
    return found
