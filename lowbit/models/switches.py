"""Layers that choose their widths, in a model's folder: their arrays are in its file, the rest in its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from lowbit.array import QuantArray
from lowbit.nn.switch import SETTINGS, WIDTHS, Switch, switches

Settings = Mapping[str, Mapping[str, Any]]


def settings(model: nnx.Module) -> Settings:
    """What of the switches of a model is no array, by layer path, as plain data."""
    return {path: {name: getattr(switch, name) for name in SETTINGS} for path, switch in switches(model).items()}


def abstract_switches(entries: Mapping[str, Any], stated: Any) -> dict[str, Switch]:
    """Switches without arrays, by layer path.

    Args:
      entries: what the file of a model holds, by name. The names of a switch's arrays tell what it estimates by.
      stated: of `settings`.

    Raises ValueError for settings that no switch has, and for layers whose arrays are not those of one.
    """
    if not isinstance(stated, Mapping):
        raise ValueError(f"states switches = {stated!r}, which are no settings by layer")
    return {path: _abstract(path, entries, of) for path, of in stated.items()}


def _abstract(path: str, entries: Mapping[str, Any], stated: Any) -> Switch:
    if not isinstance(stated, Mapping) or stated.keys() != SETTINGS.keys():
        raise ValueError(f"states {stated!r} of layer {path!r}, which are not the settings {', '.join(SETTINGS)}")
    for name, value in stated.items():
        if value not in SETTINGS[name]:
            raise ValueError(f"states {name} = {value!r} of layer {path!r}, which is none of {SETTINGS[name]}")
    weight, before = entries.get(f"{path}/kernel"), f"{path}/kernel/reader/"
    arrays = {name.removeprefix(before): a for name, a in entries.items() if name.startswith(before)}
    if not isinstance(weight, QuantArray) or not arrays.keys() >= {*WIDTHS, "threshold"}:
        raise ValueError(f"states that layer {path!r} chooses its width, and stored are {sorted(arrays)} to choose by")
    like = {name: jax.ShapeDtypeStruct((), a.dtype) for name, a in arrays.items()}
    if (g := arrays.get("projection")) is not None:
        like["projection"] = jax.ShapeDtypeStruct((*g.shape[:1], dict(weight.type.dims)["k"]), g.dtype)
    switch = Switch(like)  # type: ignore[arg-type]
    for name, value in stated.items():
        setattr(switch, name, value)
    return switch
