"""An average precision for each layer, learned: the second phase of DP-LLM (Park et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.array import QuantArray
from lowbit.nn.kernel import Kernel, Threshold, layer_kernels
from lowbit.ops import matmul
from lowbit.quant_type import QuantType
from lowbit.tune.nested import largest, mean_over, nested, weights
from lowbit.tune.step import Loss
from lowbit.tune.text import next_token_loss

M = TypeVar("M", bound=nnx.Module)
LEAST_SHARE = 0.01
"""A layer starts no nearer than this to its least or largest width, a share of the way: the sigmoid is flat there."""

NEAR = 0.25
"""Bits. The lowest target of the paper is so far above the least width, and has a pull of its own."""


class Blend(nnx.Module):
    """Makes the products of a layer at an average precision, p = lo + (B - lo) sigmoid(z).

    With l <= p <= h two of its widths, none between them, and r = (h - p) / (h - l), y = r x W_l + (1 - r) x W_h.

    Attributes:
      widths: from the least, lo, to the largest that the layer may have, B.
      weights: of the layer.
      z: a `Threshold`; None where B is lo.
    """

    def __init__(self, widths: tuple[int, ...], weights: int, z: float | None) -> None:
        self.widths, self.weights = widths, weights
        self.z = nnx.data(None if z is None else Threshold(jnp.float32(z)))

    @property
    def bits(self) -> jax.Array:
        """p, float32 []."""
        lo, most = self.widths[0], self.widths[-1]
        return jnp.float32(lo) if self.z is None else lo + (most - lo) * jax.nn.sigmoid(self.z.get_value())

    def __call__(self, x: jax.Array, array: QuantArray) -> jax.Array:
        """[..., k] -> [..., n]. Gradients reach x and z, and neither the weight nor an adapter on it."""
        if self.z is None:
            return matmul(x, QuantArray(jax.lax.stop_gradient(array.fields), array.type.at(self.widths[0])))
        return _blend(array.type, self.widths, x, array.fields, self.bits)


def blended(
    model: M,
    most: int | Mapping[str, int],
    target: float,
    *,
    widths: Sequence[int] | None = None,
    layers: str | Sequence[str] = "**",
) -> M:
    """A copy of a model of nested weights in which each layer has an average precision that can be trained.

    Each of the layers gets a `lb.Threshold`, one number, and its products blend the two widths next to its precision.
    `lb.tune.train(blended, data, tx=optax.adamw(1e-2, weight_decay=1e-2), steps=..., wrt=lb.Threshold,
    loss=lb.tune.Toward(target))` trains them; published are 5 epochs over 1000 sequences of 512 tokens, one a step.

    Both widths are decoded from the same stored arrays where they are multiplied, forward and backward; between the two
    no decoded weight is kept.

    Args:
      model: left as it is; its arrays are shared.
      most: the largest width, of all layers or of each by path, as `max_widths` gives it. A layer whose largest width
        is its least has nothing to train.
      target: the mean precision in bits over all weights of these layers, at which all of them start.
      widths: that may be blended, such as (3, 6); every width of a layer's format if None, so that the two are next to
        each other. Published is that pairs farther apart lose more.
      layers: patterns over the paths of the layers that choose; all quantized ones by default.

    Raises ValueError for a target that these widths cannot have on average, layers that are not nested (they are
    named), a layer that `most` lacks, a width that a layer does not have, and a largest width that `widths` lacks.

    >>> from flax import nnx
    >>> import jax, lowbit as lb
    >>> small = lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), lb.any_precision(3, 6))
    >>> model = lb.tune.blended(small, most=5, target=3.5)
    >>> round(float(lb.tune.mean_bits(model)), 3), len(jax.tree.leaves(nnx.state(model, lb.Threshold)))
    (3.5, 1)
    """
    out: M = nnx.clone(model)
    found = nested(out, layers)
    levels = {path: _levels(path, kernel, most, widths) for path, kernel in found.items()}
    least, highest = ({path: of[end] for path, of in levels.items()} for end in (0, -1))
    low, high = mean_over(found, least), mean_over(found, highest)
    if not low <= target <= high:
        raise ValueError(
            f"target={target} is out of reach: with these widths the mean over {len(found)} layers is from {low:.4g} to"
            f" {high:.4g} bits; give a target within, or a larger budget"
        )
    for path, kernel in found.items():
        if kernel.width is not None:
            del kernel.width
        kernel.reader = Blend(levels[path], weights(kernel), _start(levels[path], target))
    return out


def _levels(path: str, kernel: Kernel, most: int | Mapping[str, int], widths: Sequence[int] | None) -> tuple[int, ...]:
    """Those that a layer may have, up to its largest."""
    highest, held = largest(path, kernel, most), kernel.type.format.widths
    for width in widths or ():
        if width not in held:
            raise ValueError(f"layer {path!r} is {kernel.type.format}, of widths {held}, not {width}")
    if widths is not None and highest not in widths:
        raise ValueError(f"most={highest} of layer {path!r} is none of widths={tuple(widths)}: add it, or give another")
    return tuple(b for b in held if b <= highest and (widths is None or b in widths))


def _start(widths: tuple[int, ...], target: float) -> float | None:
    lo, most = widths[0], widths[-1]
    if lo == most:
        return None
    share = min(max((target - lo) / (most - lo), LEAST_SHARE), 1 - LEAST_SHARE)
    return log(share / (1 - share))


def blends(model: nnx.Module) -> dict[str, Blend]:
    """By layer path. Raises ValueError for a model that has none."""
    found = {path: k.reader for path, k in layer_kernels(model).items() if isinstance(k.reader, Blend)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer with an average precision: lb.tune.blended makes them")
    return found


def mean_bits(model: nnx.Module) -> jax.Array:
    """The mean precision of a `blended` model over the weights of its layers, float32 []. Raises ValueError for one
    that has none."""
    found = blends(model).values()
    return jnp.asarray(_mean(found, lambda blend: blend.bits))


def _mean(found: Collection[Blend], of: Callable[[Blend], Any]) -> Any:
    """Of a number for each layer, by their weights."""
    return sum(blend.weights * of(blend) for blend in found) / sum(blend.weights for blend in found)


@dataclass(frozen=True)
class Toward:
    """A loss that also pulls the mean precision to a target: `loss` + alpha (mean bits - target)^2.

    Attributes:
      target: in bits a weight.
      alpha: of the pull. If None the published one: 1, but 10 for targets within `NEAR` of the least widths.
      loss: of the model, as `lb.tune.train` takes it.
    """

    target: float
    alpha: float | None = None
    loss: Loss = next_token_loss

    def __call__(self, model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """The sum of losses, each with the pull, and their number."""
        total, count = self.loss(model, batch)
        gap = mean_bits(model) - self.target
        return total + count * self._alpha(blends(model).values()) * gap**2, count

    def _alpha(self, found: Collection[Blend]) -> float:
        if self.alpha is not None:
            return self.alpha
        return 10.0 if self.target <= _mean(found, lambda blend: blend.widths[0]) + NEAR else 1.0


def pair(widths: tuple[int, ...], bits: Any) -> tuple[Any, Any]:
    """Between which two widths a precision lies, as the index of the lesser, and how far from it to the larger."""
    levels = jnp.asarray(widths, jnp.float32)
    index = jnp.clip((levels <= bits).sum() - 1, 0, len(widths) - 2)
    return index, (bits - levels[index]) / (levels[index + 1] - levels[index])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blend(
    t: QuantType, widths: tuple[int, ...], x: jax.Array, fields: dict[str, jax.Array], bits: jax.Array
) -> jax.Array:
    return _blend_fwd(t, widths, x, fields, bits)[0]


Saved = tuple[jax.Array, dict[str, jax.Array], jax.Array, jax.Array]


def _blend_fwd(
    t: QuantType, widths: tuple[int, ...], x: jax.Array, fields: dict[str, jax.Array], bits: jax.Array
) -> tuple[jax.Array, Saved]:
    index, share = pair(widths, bits)

    def both(low: int, high: int) -> Any:
        def run(x: jax.Array, fields: dict[str, jax.Array]) -> Any:
            return tuple(matmul(x, QuantArray(fields, t.at(b))) for b in (low, high))

        return run

    y_low, y_high = jax.lax.switch(index, _of_pairs(widths, both), x, fields)
    return _mixed(share, y_low, y_high), (x, fields, bits, y_high - y_low)


def _blend_bwd(t: QuantType, widths: tuple[int, ...], saved: Saved, dy: jax.Array) -> Any:
    x, fields, bits, difference = saved
    index, share = pair(widths, bits)

    def both(low: int, high: int) -> Any:
        def run(dy: jax.Array, fields: dict[str, jax.Array]) -> Any:
            reads = [partial(lambda w, x: matmul(x, w), QuantArray(fields, t.at(b))) for b in (low, high)]
            return tuple(jax.vjp(read, x)[1](dy)[0] for read in reads)

        return run

    dx_low, dx_high = jax.lax.switch(index, _of_pairs(widths, both), dy, fields)
    levels = jnp.asarray(widths, jnp.float32)
    d_share = jnp.sum(dy.astype(jnp.float32) * difference.astype(jnp.float32))
    return _mixed(share, dx_low, dx_high), None, d_share / (levels[index + 1] - levels[index])


_blend.defvjp(_blend_fwd, _blend_bwd)


def _of_pairs(widths: tuple[int, ...], make: Any) -> list[Any]:
    return [make(low, high) for low, high in pairwise(widths)]


def _mixed(share: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return ((1 - share) * low.astype(jnp.float32) + share * high.astype(jnp.float32)).astype(low.dtype)
