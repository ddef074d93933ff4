"""Which of the formats that its layers could have a model gets: candidates, and the choice of one for each layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lowbit.io.atomic import replacing
from lowbit.nn.rules import Rule
from lowbit.quantizers import Quantizer


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
        least, most = (sum(f(c.bits for c in of) for of in by_layer(self.candidates).values()) for f in (min, max))
        found = [solve(self.candidates, budget) for budget in np.linspace(least, most, points)]
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


def _plain(rule: Rule) -> dict[str, Any]:
    assert rule.format is not None
    own = {} if rule.quantizer is None else {"quantizer": _call(rule.quantizer)}
    return {"path": rule.path, "format": rule.format.name, "options": dict(rule.format.options), **own}


def _call(quantizer: Quantizer) -> str:
    """What makes a quantizer again: its own text leaves out the statistics that it weighs by."""
    if not is_dataclass(quantizer):
        return str(quantizer)
    given = ", ".join(f"{f.name}={getattr(quantizer, f.name)!r}" for f in fields(quantizer))
    return f"{type(quantizer).__name__}({given})"


def by_layer(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    out: dict[str, list[Candidate]] = {}
    for c in candidates:
        out.setdefault(c.layer, []).append(c)
    return out


def solve(candidates: tuple[Candidate, ...], budget: float, least_used: float = 0.0) -> Allocation:
    """Of the choices with at most `budget` bits, and at least `least_used`, the one with the least harm."""
    groups = by_layer(candidates)
    smallest = {path: min(c.bits for c in of) for path, of in groups.items()}
    if (least := sum(smallest.values())) > budget:
        weights = sum(of[0].weights for of in groups.values())
        raise ValueError(
            f"the budget is {int(budget // 8):,} bytes, {budget / weights:.3g} bits per weight, and the smallest"
            f" formats need {-(-least // 8):,} bytes, {least / weights:.3g} bits: raise it or add a smaller format"
        )
    harm = np.array([c.harm for c in candidates])
    one_each = np.array([[c.layer == path for c in candidates] for path in groups], float)
    # Bits beyond the smallest formats: the smaller the numbers, the less is within the solver's tolerance.
    beyond = np.array([[c.bits - smallest[c.layer] for c in candidates]], float)
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(beyond, least_used - least if least_used else -np.inf, np.floor(budget) - least),
    ]
    while True:
        found = milp(
            1e6 * harm / (harm.max() or 1.0),  # it stops where it is 1e-6 from the best
            integrality=np.ones(len(candidates)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            # Its presolve lost the best choice of some, and took minutes more for 560 layers of 8 formats.
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        # The smallest formats are within the budget, and who gives `least_used` knows of a choice.
        assert found.x is not None, found.message
        taken = found.x > 0.5
        chosen = tuple(c for c, is_taken in zip(candidates, taken, strict=True) if is_taken)
        if sum(c.bits for c in chosen) <= budget:
            return Allocation(chosen, candidates)
        # Within the tolerance, and some bits of billions above the budget: any choice but that one.
        constraints.append(LinearConstraint(taken[None].astype(float), 0, len(groups) - 1))
