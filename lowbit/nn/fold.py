"""Folds: factors of the channels between layers, taken out of what makes them and put into what they go to.

With a source whose output channels are y [n] and layers that multiply nothing but y, for any positive s [n]

    source / s  followed by  layers whose input channels are times s  =  the model as it was.

Whether a model has that form is not in its parameters. So it is tried: powers of two round nothing, and a model that
computes the same with some of its channels halved has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.nn.kernel import joined
from lowbit.nn.kinds import KINDS, dense_matrices, layers, weight


@dataclass(frozen=True)
class Fold:
    """The output channels of `source` go into the layers `into` and nowhere else.

    Attributes:
      source: the path of a layer, whose weight and bias can be scaled, or of a module with a `scale` (and a `bias`)
        for each channel, such as nnx.RMSNorm. A `*` matches within a part, as in rules.
      into: the paths of one or more layers; the i-th `*` of each is what the i-th of the source stands for.

    What lies between may do anything that scaling passes through: a product with other values, nnx.relu, attention
    weights applied to values, but no other nonlinear function and no residual connection.

    >>> import lowbit as lb
    >>> lb.Fold("layers/*/norm", ["layers/*/attn/q", "layers/*/attn/k"]).into
    ('layers/*/attn/q', 'layers/*/attn/k')
    """

    source: str
    into: Sequence[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "into", (self.into,) if isinstance(self.into, str) else tuple(self.into))
        if not self.into:
            raise ValueError(f"the fold of {self.source!r} goes into no layer: name at least one")
        if odd := [p for p in self.into if p.count("*") != self.source.count("*") or "**" in p]:
            raise ValueError(
                f"the fold of {self.source!r} into {odd[0]!r}: both need the same number of `*`, each within a part"
            )


@dataclass(frozen=True)
class Placed:
    """A fold in a model: modules by path, and how many channels there are."""

    source: str
    module: Any
    into: Mapping[str, Any]
    channels: int

    def __str__(self) -> str:
        return f"the fold of {self.source!r} into {', '.join(map(repr, self.into))}"

    def apply(self, s: jax.Array) -> None:
        """Divides the source by s [channels] and multiplies the layers; in place."""
        for variable, value in _divided(self.module, s):
            variable.set_value(value.astype(variable.dtype))
        for layer in self.into.values():
            variable = weight(layer)
            variable.set_value(_times(layer, s, "k").astype(variable.dtype))
        changed = [(path, weight(layer)) for path, layer in self.into.items()]
        for path, variable in [*changed, *((self.source, v) for v, _ in _divided(self.module, s))]:
            if not jnp.isfinite(variable.get_value()).all():
                raise ValueError(f"{self} overflows the {variable.dtype} of {path!r}: cast its parameters to float32")


def placed(folds: Sequence[Fold], model: nnx.Module) -> list[Placed]:
    """Each fold wherever its patterns match. Raises ValueError for one that fits nowhere, or whose sizes differ."""
    if isinstance(folds, Fold) or not all(isinstance(fold, Fold) for fold in folds):
        raise TypeError(f"folds={folds!r}: give a list of lb.Fold(source, into)")
    modules = {joined(path): m for path, m in nnx.iter_modules(model)}
    out = [p for fold in folds for p in _matched(fold, modules, layers(model))]
    taken: dict[str, Placed] = {}
    for p in out:
        for path in p.into:
            if path in taken:
                raise ValueError(f"layer {path!r} is in {taken[path]} and in {p}: its inputs have one source")
            taken[path] = p
    return out


def _matched(fold: Fold, modules: Mapping[str, Any], found: Mapping[str, Any]) -> list[Placed]:
    pattern = re.compile(re.escape(fold.source).replace(r"\*", "([^/]*)"))
    out = []
    for source, module in modules.items():
        if (match := pattern.fullmatch(source)) is None:
            continue
        into: dict[str, Any] = {}
        for pattern_of_layer in fold.into:
            parts = zip(pattern_of_layer.split("*"), (*match.groups(), ""), strict=True)
            path = "".join(a + b for a, b in parts)
            if path not in found:
                raise ValueError(f"the fold of {source!r} goes into {path!r}, {_none_such(path, found)}")
            into[path] = found[path]
        out.append(Placed(source, module, into, _channels(source, module, into)))
    if not out:
        raise ValueError(f"the fold of {fold.source!r} has no source: it is {_none_such(fold.source, modules)}")
    return out


def _none_such(path: str, paths: Mapping[str, Any]) -> str:
    close = get_close_matches(path, paths, n=3, cutoff=0.3) or list(paths)[:3]
    return f"none of the {len(paths)} such as {', '.join(map(repr, close))}"


def _channels(source: str, module: Any, into: Mapping[str, Any]) -> int:
    """Of a fold's source, checked against the inputs of its layers."""
    for path, layer in {source: module, **into}.items():
        if type(layer) in KINDS and len(shape := dense_matrices(layer).shape) != 2:
            raise ValueError(f"{path!r} is a stack of matrices {list(shape)}: it cannot be folded")
    if type(module) in KINDS:
        n = KINDS[type(module)].view(module).size("n")
    elif isinstance(scale := getattr(module, "scale", None), nnx.Variable):
        n = scale.get_value().size
    else:
        raise ValueError(
            f"the source {source!r} of a fold is a {type(module).__name__} without a scale for each channel: give a "
            "layer, or a norm that has one"
        )
    for path, layer in into.items():
        if (k := KINDS[type(layer)].view(layer).size("k")) != n:
            raise ValueError(f"the fold of {source!r} into {path!r}: {n} channels come out, and {k} go in")
    return n


def _divided(module: Any, s: jax.Array) -> list[tuple[nnx.Variable[Any], jax.Array]]:
    """The parameters of a source that its outputs are linear in, and what they become."""
    if type(module) in KINDS:
        out = [(weight(module), _times(module, 1 / s, "n"))]
    else:
        out = [(module.scale, module.scale.get_value() / s.reshape(module.scale.shape))]
    bias = getattr(module, "bias", None)
    if isinstance(bias, nnx.Variable):
        out.append((bias, bias.get_value() / s.reshape(bias.shape)))
    return out


def _times(layer: Any, s: jax.Array, dim: str) -> jax.Array:
    """The layer's weight with one of the dims of its matrix times s."""
    view = KINDS[type(layer)].view(layer)
    return view.kernel(dense_matrices(layer) * (s[:, None] if view.dims[0] == dim else s[None, :]))


def check_folds(model: nnx.Module, folds: Sequence[Placed], batch: Any, call: Callable[[Any, Any], Any] | None) -> None:
    """Raises ValueError unless the model computes the same when some channels of every fold are halved.

    A power of two changes no bit, but of what underflows: so no output may differ by more than one rounding of the
    coarsest type, relative to itself and the median.
    """
    run = nnx.jit(call or (lambda m, b: m(b)))
    want = run(nnx.clone(model), batch)
    if not any(jnp.any(x) for x in _floats(want)) or any(jnp.isnan(x).any() for x in _floats(want)):
        raise ValueError("the model's outputs on the batch are all zero, or NaN: they do not show what folds change")
    if together := _differs(run, model, folds, batch, want):
        alone = (_differs(run, model, [fold], batch, want) for fold in folds)
        raise ValueError(next(filter(None, alone), together))


def _differs(
    run: Callable[[Any, Any], Any], model: nnx.Module, folds: Sequence[Placed], batch: Any, want: Any
) -> str | None:
    """What these folds change, if anything."""
    other = nnx.clone(model)
    rng = np.random.default_rng(0)
    for fold in placed([Fold(f.source, tuple(f.into)) for f in folds], other):
        s = 2 ** rng.integers(0, 2, fold.channels)
        s[rng.integers(fold.channels)] = 2
        fold.apply(jnp.asarray(s, jnp.float32))
    off = max(float(_off(a, b)) for a, b in zip(_floats(want), _floats(run(other, batch)), strict=True))
    allowed = max(_roundings(folds, want))
    if off <= allowed:
        return None
    return (
        f"{folds[0]} changes what the model computes: outputs differ by up to {off:.3g} of their size, and by rounding "
        f"not more than {allowed:.3g}; name every layer that the source's channels go into, and fold nothing that a "
        "nonlinear function or a residual connection lies behind"
    )


def _off(a: jax.Array, b: jax.Array) -> jax.Array:
    """The largest difference of two outputs, relative to the first and its median."""
    x, y = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.where(x == y, 0.0, jnp.abs(x - y) / (jnp.abs(x) + jnp.median(jnp.abs(x)))).max(initial=0.0)


def _floats(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)]


def _roundings(folds: Sequence[Placed], outputs: Any) -> list[float]:
    """The machine epsilons of every type that may be computed in."""
    within = [layer for fold in folds for layer in (fold.module, *fold.into.values())]
    types = [weight(m).dtype for m in within if type(m) in KINDS] + [x.dtype for x in _floats(outputs)]
    types += [m.dtype for m in within if getattr(m, "dtype", None) is not None]
    return [float(jnp.finfo(t).eps) for t in types]
