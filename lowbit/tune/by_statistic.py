"""Widths by a given threshold on the activations, without training or calibration: NestedFP's two modes row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.nn.kernel import Kernel
from lowbit.nn.statistics import Statistic, as_estimate
from lowbit.tune.nested import nested
from lowbit.tune.thresholds import choose_by

M = TypeVar("M", bound=nnx.Module)
Threshold = float | jax.Array


def switched_by(
    model: M,
    statistic: Statistic,
    threshold: Threshold | Mapping[str, Threshold],
    *,
    low: int | None = None,
    high: int | None = None,
    layers: str | Sequence[str] = "**",
) -> M:
    """A copy of a model of nested weights that reads a layer at the larger of two widths where its input asks for it.

    A row x of a layer's input does so where a statistic of it is above a threshold, or NaN. It is taken in float32, of
    x as the product gets it. What holds of `lb.tune.switched` models holds of these: see `lb.nn.switching`, by which
    they choose row by row or call by call. Thresholds may be arguments of a jitted function, and other ones are other
    arrays in the same program. For thresholds that a share of rows is above, see `lb.tune.thresholds`, which takes a
    statistic as its `estimators`: of `blended(model, high, target=low + share * (high - low))`.

    Args:
      model: left as it is; its arrays are shared.
      statistic: "norm", ||x||. "largest", max |x|. "peak", max |x| / rms x, from 1 to sqrt k and 0 of zeros, whatever
        the scale: how far its largest entry stands out.
      threshold: a number or a float array [], of all layers or of each by path. inf and -inf stand for one width.
      low, high: widths; the least and the largest of a layer's format if None. Prompts are read at `high`.
      layers: patterns over the paths of the layers that choose; all quantized ones by default.

    Raises ValueError for a statistic that there is not, layers that are not nested (they are named), a width that a
    layer does not have, `low` that is not below `high`, a threshold that is NaN or no single number, and a dict that
    lacks a layer or has one that is not chosen.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> small = lb.quantize(nnx.Linear(16, 8, rngs=nnx.Rngs(0), param_dtype=jnp.float16), lb.nested_fp())
    >>> model = lb.tune.switched_by(small, "peak", 3.0)
    >>> x = jnp.ones((4, 16), jnp.float16).at[0, 5].set(100)  # in the first row one input stands out
    >>> y, bits = lb.nn.effective_bits(lambda model, x: model(x), model, x)
    >>> float(bits.mean)
    10.0
    """
    estimate = as_estimate(statistic)
    out: M = nnx.clone(model)
    found = nested(out, layers)
    for path, kernel in found.items():
        widths = _widths(path, kernel, low, high)
        choose_by(kernel, {**widths, "threshold": _threshold(path, threshold), **estimate})
    if isinstance(threshold, Mapping) and (unused := sorted(threshold.keys() - found.keys())):
        raise ValueError(f"threshold has a layer {unused[0]!r}, and those that choose are {', '.join(found)}")
    return out


def _widths(path: str, kernel: Kernel, low: int | None, high: int | None) -> dict[str, jax.Array]:
    fmt = kernel.type.format
    low, high = (fmt.widths[end] if given is None else given for end, given in ((0, low), (-1, high)))
    if wrong := [width for width in (low, high) if width not in fmt.widths]:
        raise ValueError(f"layer {path!r} is {fmt}, of widths {fmt.widths}, not {wrong[0]}")
    if low >= high:
        raise ValueError(f"layer {path!r}: low={low} must be below high={high}; lb.at_width reads it at one width")
    return {"low": jnp.int32(low), "high": jnp.int32(high), "most": jnp.int32(high)}


def _threshold(path: str, given: Any) -> jax.Array:
    if isinstance(given, Mapping):
        if path not in given:
            raise ValueError(f"threshold has no number for layer {path!r}: give one for each, or name fewer in layers=")
        given = given[path]
    value = jnp.asarray(given, jnp.float32)
    if value.shape:
        raise ValueError(f"the threshold of layer {path!r} has the shape {list(value.shape)}: give one number")
    if not isinstance(value, jax.core.Tracer) and jnp.isnan(value):
        raise ValueError(f"the threshold of layer {path!r} is NaN: give a number, inf for its low width alone")
    return value
