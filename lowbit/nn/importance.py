"""What a quantizer weighs errors by: the product of the statistics that it names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import mul
from typing import Any

import jax
import jax.numpy as jnp

from lowbit.nn.calibrate import LayerStats
from lowbit.nn.kinds import KINDS, dense_matrices, measured_shapes
from lowbit.nn.rules import Rule, needed

SIDE = {"second_moment": "k", "largest": "k", "output_gradient": "n"}
"""The dim of a statistic that has one number for each input or output; the others have the weight's shape."""


def importance(stats: Mapping[str, LayerStats], path: str, rule: Rule, layer: Any) -> jax.Array | None:
    """How much each squared error in a layer's matrices counts: [*stack, k] if only inputs matter, or of their shape.

    None for a layer without statistics, and for a quantizer that needs none.
    """
    names = needed(rule)
    if path not in stats or not names:
        return None
    kind = KINDS[type(layer)]
    view, dims = kind.view(layer), kind.view(layer).dims

    def each(name: str) -> jax.Array:
        value = jnp.asarray(getattr(stats[path], name))
        return value[..., None, :] if kind.shares and SIDE.get(name) == "k" else value

    values = {name: each(name) for name in names}
    if all(SIDE.get(name) == "k" for name in names):
        return reduce(mul, values.values())
    placed = [
        jnp.expand_dims(v, -1 - dims.index(SIDE[name])) if name in SIDE else view.matrices(v)
        for name, v in values.items()
    ]
    return jnp.broadcast_to(reduce(mul, placed), dense_matrices(layer).shape)


def check_measured(stats: Mapping[str, LayerStats], rules: Mapping[str, Rule], found: Mapping[str, Any]) -> None:
    """Raises ValueError unless every statistic that a rule needs of a layer was measured, on a weight of its shape."""
    for path in sorted(stats.keys() & rules.keys()):
        for name in needed(rules[path]):
            value = getattr(stats[path], name)
            if value is None:
                raise ValueError(
                    f"the quantizer of layer {path!r} weighs errors by {name!r}, which stats does not have: "
                    "lb.calibrate(..., rules=rules) measures what the rules need"
                )
            shapes = measured_shapes(found[path])
            if value.shape != shapes[name]:
                raise ValueError(
                    f"stats has {name!r} of layer {path!r} with the shape {value.shape}, but the weight's is "
                    f"{shapes['gradient_square']}: calibrate this model"
                )
