"""`lb.allocate`: which format each layer gets, so that a budget is kept and the errors do the least harm."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from scipy.optimize import Bounds, LinearConstraint, milp

from lowbit.array import dequantize
from lowbit.formats import Format
from lowbit.io.atomic import replacing
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.importance import check_measured, check_statistic, importance, weighed
from lowbit.nn.kernel import expect_module
from lowbit.nn.kinds import KINDS, dense_matrices, layers, refusal, weight
from lowbit.nn.linen import opened
from lowbit.nn.rules import Rule
from lowbit.quantizers import IneligibleError, Quantizer
from lowbit.quantizers.quantizer import quantize_array

By = Literal["loss", "trace", "output"]
NEEDS: Mapping[str, tuple[str, ...]] = {
    "loss": ("gradient_square",),
    "trace": ("gradient_square",),
    "output": ("gram", "second_moment"),
}
"""The statistics of a layer that an estimate takes: the first of them that there is."""
Choice = Format | tuple[Format, Quantizer]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Candidate:
    """A layer in a format.

    Attributes:
      layer: its path.
      rule: that gives it this format.
      weights: entries of its dense matrices.
      bits: stored for them, everything counted.
      harm: what its errors are estimated to do.
      shared: paths of further layers with the same weight, which is stored once.
    """

    layer: str
    rule: Rule
    weights: int
    bits: int
    harm: float
    shared: tuple[str, ...] = ()


@dataclass(frozen=True)
class Allocation:
    """What `lb.allocate` chose: `lb.quantize(model, found.rules)`.

    Attributes:
      chosen: a candidate for each layer.
      candidates: every one that there was.
    """

    chosen: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]

    @property
    def rules(self) -> list[Rule]:
        """One for each layer."""
        return [replace(c.rule, path=path) for c in self.chosen for path in (c.layer, *c.shared)]

    @property
    def bytes(self) -> int:
        """Stored for all layers."""
        return sum(c.bits for c in self.chosen) // 8

    @property
    def bits_per_weight(self) -> float:
        return sum(c.bits for c in self.chosen) / sum(c.weights for c in self.chosen)

    @property
    def harm(self) -> float:
        """Estimated, of all layers together."""
        return sum(c.harm for c in self.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the rules, of quantizers that were given what they are called, and what all come to."""
        rules = [_plain(rule) for rule in self.rules]
        return {"rules": rules, "bits_per_weight": self.bits_per_weight, "bytes": self.bytes, "harm": self.harm}

    def save(self, path: str | PathLike[str]) -> None:
        """Writes `to_dict` as a JSON file that appears whole or not at all."""
        with replacing(path) as file:
            file.write(json.dumps(self.to_dict(), indent=1).encode())

    def __str__(self) -> str:
        lines = [f"{c.layer}: {c.rule.format}, {c.bits / c.weights:.2f} bits, {c.harm:.3g}" for c in self.chosen]
        return "\n".join([*lines, f"together: {self.bits_per_weight:.3f} bits, {self.bytes:,} bytes, {self.harm:.3g}"])

    def curve(self, points: int = 24) -> list[tuple[float, float]]:
        """Bits per weight, and the least harm with so many, from the smallest choice of formats to the largest."""
        least, most = (sum(f(c.bits for c in of) for of in _by_layer(self.candidates).values()) for f in (min, max))
        found = [_solve(self.candidates, budget) for budget in np.linspace(least, most, points)]
        return [(a.bits_per_weight, a.harm) for a in found]

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw `curve`, each single format and the choice to an image file. Needs matplotlib, as `lowbit[demo]` has."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self.curve(), strict=True), label="allocated")
        for fmt in dict.fromkeys(c.rule.format for c in self.candidates):
            every = [c for c in self.candidates if c.rule.format == fmt]
            if len(every) == len(self.chosen):
                bits = sum(c.bits for c in every) / sum(c.weights for c in every)
                axes.plot(bits, sum(c.harm for c in every), "o", label=str(fmt))
        axes.plot(self.bits_per_weight, self.harm, "*", markersize=12, label="chosen")
        axes.set(xlabel="bits per weight", ylabel="estimated harm", yscale="log")
        axes.legend()
        figure.savefig(path, dpi=120)


def allocate(
    model: nnx.Module,
    stats: Mapping[str, LayerStats],
    *,
    formats: Sequence[Choice],
    bits: float | None = None,
    bytes: int | None = None,
    by: By = "loss",
) -> Allocation:
    """The format of each measured layer, so that all stay within a budget and the estimated harm is least.

    Every layer is quantized in every format, one at a time; which of them each layer gets is an integer program that is
    solved exactly. The harm of layers is taken to add up. Those that share a weight get one format, by the statistics
    of the first. With D the error of a weight:

    - by "loss": sum F D^2, F the mean squared gradients of the loss, as SqueezeLLM estimates what it costs the loss;
    - by "trace": mean(F) sum D^2, HAWQ-V2's average trace (Dong et al., NeurIPS 2020), F's in place of the Hessian's;
    - by "output": the squared error of the layer's output over the output's own square, from `gram`, or where that was
      not measured from `second_moment`.

    Args:
      model: left as it is.
      stats: what `lb.calibrate` measured: `gradient_square`, or for "output" `gram` or `second_moment`. Layers that it
        does not have are left out, and get no rule. A logged warning names those of which it has only zeros.
      formats: such as `lb.bcq(3, group=128)`, or (format, quantizer).
      bits: the budget per weight, scales and padding counted.
      bytes: instead, the budget of all these layers together.
      by: the estimate.

    Raises TypeError for `formats` that are no list of formats; ValueError for no budget or two, for one below the
    smallest formats (both sizes are named), for a layer that no format can hold, and where a statistic was not
    measured, is of another shape, NaN, inf or negative.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> model = nnx.Sequential(nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 8, rngs=nnx.Rngs(1)))
    >>> stats = lb.calibrate(model, [jnp.ones((2, 64))])
    >>> found = lb.allocate(model, stats, formats=[lb.bcq(2), lb.bcq(4)], bits=4.0, by="output")
    >>> [str(rule.format) for rule in found.rules], found.bits_per_weight <= 4.0
    (['bcq(bits=2)', 'bcq(bits=4)'], True)
    """
    expect_module(model, "allocate")
    _check(formats, bits, bytes, by)
    every: list[Candidate] = []
    for path, (layer, *shared) in _shared(opened(model), stats).items():
        if reason := refusal(layer):
            raise ValueError(f"layer {path!r} cannot be quantized: {reason}")
        made = _candidates(path, layer, stats, formats, by)
        if not made:
            raise ValueError(f"layer {path!r} fits none of {', '.join(map(str, formats))}: add a format that it fits")
        every += [replace(c, shared=tuple(shared)) for c in made]
    if not every:
        raise ValueError("stats has no layer of this model: there is nothing to allocate")
    if dead := [path for path, of in _by_layer(every).items() if not any(c.harm for c in of)]:
        logging.warning("lowbit: by what stats has, no format does harm to %s: each gets any", ", ".join(dead))
    weights = sum(of[0].weights for of in _by_layer(every).values())
    # A product such as 25 * (57 / 25) may be rounded to less than what it stands for.
    return _solve(tuple(every), 8 * bytes if bits is None else weights * bits * (1 + 2**-51))  # type: ignore[operator]


def _check(formats: Sequence[Choice], bits: float | None, bytes: float | None, by: str) -> None:
    if (bits is None) == (bytes is None):
        raise ValueError(f"bits={bits!r} and bytes={bytes!r}: give one budget, bits per weight or bytes for all layers")
    if not (budget := bytes if bits is None else bits) > 0:  # type: ignore[operator]
        raise ValueError(f"the budget is {budget!r}: it must be above 0")
    if by not in get_args(By):
        raise ValueError(f"by={by!r} must be one of {', '.join(get_args(By))}")
    if isinstance(formats, Format) or not formats:
        raise TypeError(f"formats={formats!r}: give a list of one or more, such as [lb.bcq(2), lb.bcq(4)]")
    for choice in formats:
        if not isinstance(choice[0] if isinstance(choice, tuple) else choice, Format):
            raise TypeError(f"{choice!r} is neither a format such as lb.bcq(2) nor (format, quantizer)")


def _shared(model: nnx.Module, stats: Mapping[str, LayerStats]) -> dict[str, list[Any]]:
    """The measured layers of a model by path, each followed by the paths of those that would share what is stored."""
    out: dict[str, list[Any]] = {}
    first: dict[Any, str] = {}
    for path, layer in layers(model).items():
        if path in stats:
            held = id(weight(layer)), None if refusal(layer) else KINDS[type(layer)].view(layer)
            if (owner := first.setdefault(held, path)) == path:
                out[path] = [layer]
            else:
                out[owner].append(path)
    return out


def _plain(rule: Rule) -> dict[str, Any]:
    assert rule.format is not None
    own = {} if rule.quantizer is None else {"quantizer": str(rule.quantizer)}
    return {"path": rule.path, "format": rule.format.name, "options": dict(rule.format.options), **own}


def _candidates(
    path: str, layer: Any, stats: Mapping[str, LayerStats], formats: Sequence[Choice], by: By
) -> list[Candidate]:
    dense, dims = dense_matrices(layer), KINDS[type(layer)].view(layer).dims
    harm = _harm(path, layer, stats, by)
    out = []
    for choice in formats:
        fmt, quantizer = (choice, None) if isinstance(choice, Format) else choice
        rule = Rule(path, fmt, quantizer)
        check_measured({path: stats[path]}, {path: rule}, {path: layer})
        counts = importance(stats, path, rule, layer)
        try:
            array = quantize_array(dense, fmt, quantizer, dims=dims, name=f"layer {path!r}", importance=counts)
        except IneligibleError:
            continue
        error = dequantize(array).astype(jnp.float32) - dense.astype(jnp.float32)
        stored = array.type.bits * int(np.prod(array.stack))
        out.append(Candidate(path, rule, dense.size, stored, harm(error)))
    return out


def _harm(path: str, layer: Any, stats: Mapping[str, LayerStats], by: By) -> Callable[[Any], float]:
    """The estimate for an error of the layer's matrices."""
    name = next((n for n in NEEDS[by] if getattr(stats[path], n) is not None), None)
    if name is None:
        needs = " or ".join(NEEDS[by])
        raise ValueError(f"by={by!r} takes {needs}, which stats does not have of layer {path!r}: measure it")
    check_statistic(stats, path, name, layer)
    dims, dense = KINDS[type(layer)].view(layer).dims, dense_matrices(layer).astype(jnp.float32)
    counts = weighed(stats, path, (name,), layer)

    def square(d: Any) -> float:
        """Of what the inputs make of an error."""
        rows = jnp.swapaxes(d, -1, -2) if dims[0] == "k" else d
        if name == "gram":
            return float((jnp.matmul(rows, counts, precision="highest") * rows).sum())
        return float((rows * rows * counts[..., None, :]).sum())

    if by == "output":
        own = square(dense)
        return lambda d: square(d) / own if own else 0.0
    if by == "trace":
        return lambda d: float(counts.mean() * (d * d).sum())
    return lambda d: float((counts * d * d).sum())


def _by_layer(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    out: dict[str, list[Candidate]] = {}
    for c in candidates:
        out.setdefault(c.layer, []).append(c)
    return out


def _solve(candidates: tuple[Candidate, ...], budget: float) -> Allocation:
    """Of the choices with at most `budget` bits the one with the least harm."""
    groups = _by_layer(candidates)
    if (least := sum(min(c.bits for c in of) for of in groups.values())) > budget:
        weights = sum(of[0].weights for of in groups.values())
        raise ValueError(
            f"the budget is {int(budget // 8):,} bytes, {budget / weights:.3g} bits per weight, and the smallest"
            f" formats need {-(-least // 8):,} bytes, {least / weights:.3g} bits: raise it or add a smaller format"
        )
    harm = np.array([c.harm for c in candidates])
    one_each = np.array([[c.layer == path for c in candidates] for path in groups], float)
    found = milp(
        1e6 * harm / (harm.max() or 1.0),  # it stops where it is 1e-6 from the best
        integrality=np.ones(len(candidates)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.array([[c.bits for c in candidates]], float), 0, np.floor(budget)),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, found.message  # the smallest formats are within the budget
    return Allocation(tuple(c for c, taken in zip(candidates, found.x, strict=True) if taken > 0.5), candidates)
