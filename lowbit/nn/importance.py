"""What a quantizer weighs errors by: the product of the statistics that it names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import mul

import jax
import jax.numpy as jnp

from lowbit.nn.calibrate import LayerStats
from lowbit.nn.rules import Rule, needed

SIDE = {"second_moment": "k", "largest": "k", "output_gradient": "n"}
"""The dim of a statistic that has one number for each input or output; the others have the weight's shape."""


def importance(
    stats: Mapping[str, LayerStats], path: str, rule: Rule, dims: tuple[str, str], shape: tuple[int, ...]
) -> jax.Array | None:
    """How much each squared error in a layer's weight counts: [k] if only the input matters, or else of its shape.

    None for a layer without statistics, and for a quantizer that needs none.
    """
    names = needed(rule)
    if path not in stats or not names:
        return None
    values = {name: jnp.asarray(getattr(stats[path], name)) for name in names}
    if all(SIDE.get(name) == "k" for name in names):
        return reduce(mul, values.values())
    placed = [jnp.expand_dims(v, 1 - dims.index(SIDE[name])) if name in SIDE else v for name, v in values.items()]
    return jnp.broadcast_to(reduce(mul, placed), shape)


def check_measured(
    stats: Mapping[str, LayerStats], rules: Mapping[str, Rule], shapes: Mapping[str, dict[str, int]]
) -> None:
    """Raises ValueError unless every statistic that a rule needs of a layer was measured, on a weight of its shape."""
    for path in sorted(stats.keys() & rules.keys()):
        for name in needed(rules[path]):
            value, sizes = getattr(stats[path], name), shapes[path]
            if value is None:
                raise ValueError(
                    f"the quantizer of layer {path!r} weighs errors by {name!r}, which stats does not have: "
                    "lb.calibrate(..., rules=rules) measures what the rules need"
                )
            shape = (sizes[SIDE[name]],) if name in SIDE else tuple(sizes.values())
            if value.shape != shape:
                raise ValueError(
                    f"stats has {name!r} of layer {path!r} with the shape {value.shape}, but the weight's is "
                    f"{tuple(sizes.values())}: calibrate this model"
                )
