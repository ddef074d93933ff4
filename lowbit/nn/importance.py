"""What a quantizer weighs errors by: the product of the statistics that it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import mul
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowbit.nn.calibrate import LayerStats
from lowbit.nn.kinds import KINDS, statistic_shape, weight
from lowbit.nn.probe import SIDE
from lowbit.nn.rules import GRAMS, Rule, needed
from lowbit.quantizers.checks import check_gram, check_importance


def importance(stats: Mapping[str, LayerStats], path: str, rule: Rule, layer: Any) -> jax.Array | None:
    """How much each squared error in a layer's matrices counts, as `quantize_array` takes it.

    If only the inputs matter [*stack, k], [*stack, k, k] for `gram` and [*stack, c, k, k] for `guided_gram`, with 1 for
    the axes of a stack that shares its rows, or else of the matrices' shape. None for a layer without statistics, and
    for a quantizer that needs none.
    """
    names = needed(rule)
    return weighed(stats, path, names, layer) if path in stats and names else None


def weighed(stats: Mapping[str, LayerStats], path: str, names: Sequence[str], layer: Any) -> jax.Array:
    """The product of these statistics of a layer, likewise."""
    kind = KINDS[type(layer)]
    view = kind.view(layer)
    values = {name: jnp.asarray(getattr(stats[path], name)) for name in names}
    if kind.shares:
        values = {name: _unshared(v, len(view.stack), name) for name, v in values.items()}
    if all(SIDE.get(name) in ("k", "kk", "ckk") for name in names):
        return reduce(mul, values.values())
    placed = [
        jnp.expand_dims(v, tuple(i - 2 for i, d in enumerate(view.dims) if d not in SIDE[name]))
        if name in SIDE
        else view.matrices(v)
        for name, v in values.items()
    ]
    lead = view.lead(weight(layer).get_value())
    return jnp.broadcast_to(reduce(mul, placed), (*lead, *view.sizes(view.stack), *map(view.size, view.dims)))


def _unshared(value: jax.Array, stack: int, name: str) -> jax.Array:
    """With 1 for each axis of the stack, before those of the statistic."""
    if name not in SIDE:
        return value
    own = len(SIDE[name])
    return jnp.expand_dims(value, tuple(range(-own - stack, -own)))


def all_zero(stats: Mapping[str, LayerStats], rules: Mapping[str, Rule]) -> list[str]:
    """The layers that were measured, but of which all numbers that a rule needs are zero; traced ones are not seen."""

    def is_zero(value: Any) -> bool:
        return not isinstance(value, jax.core.Tracer) and not np.asarray(value).any()

    return [p for p, rule in rules.items() if p in stats and any(is_zero(getattr(stats[p], n)) for n in needed(rule))]


def check_measured(stats: Mapping[str, LayerStats], rules: Mapping[str, Rule], layers: Mapping[str, Any]) -> None:
    """Raises ValueError unless every statistic that a rule needs of a layer was measured, on a weight of its shape,
    and is finite."""
    for path in sorted(stats.keys() & rules.keys()):
        for name in needed(rules[path]):
            if getattr(stats[path], name) is None:
                raise ValueError(
                    f"the quantizer of layer {path!r} weighs errors by {name!r}, which stats does not have: "
                    "lb.calibrate(..., rules=rules) measures what the rules need"
                )
            check_statistic(stats, path, name, layers[path])


def check_statistic(stats: Mapping[str, LayerStats], path: str, name: str, layer: Any) -> None:
    """Raises ValueError unless what was measured of a layer is of a weight of its shape, and finite."""
    value, shape = getattr(stats[path], name), weight(layer).shape
    chunks = value.shape[-3] if name == "guided_gram" and value.ndim > 2 else 1
    if value.shape != (statistic_shape(layer, SIDE[name], chunks) if name in SIDE else shape):
        raise ValueError(
            f"stats has {name!r} of layer {path!r} with the shape {value.shape}, but the weight's is {shape}: "
            "calibrate this model"
        )
    check = check_gram if name in GRAMS else check_importance
    check(value, f"{name!r} of layer {path!r} in stats")
