"""What `examples.dp_llm` measures of a model, its tables, and what is claimed of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import numpy as np

DP, EXACT, BLENDED, ASYNCHRONOUS = "DP-LLM", "DP-LLM, exact", "DP-LLM, blended", "DP-LLM, asynchronous"
MIXES = ("HAWQ-V2", "LLM-MQ")
COMPARED = ((DP, "HAWQ-V2"), (DP, "LLM-MQ"), (EXACT, "HAWQ-V2"), (EXACT, BLENDED), (ASYNCHRONOUS, DP))
"""Each over the other at the same target."""
PAIRS = ((4, 5), (4, 6), (3, 5), (3, 6))
WIDER = tuple((str(pair), str(PAIRS[0])) for pair in PAIRS[1:])
TOLERANCE = 0.02
"""Of the target, that effective bits may be off."""
ERRORS = 2.0
"""Standard errors of a mean of differences that may be chance."""
MARGIN = 0.002
"""Of the loss, that DP-LLM is shown to be within: over all targets, with as many standard errors added."""


@dataclass(frozen=True)
class Row:
    """What was measured of a model.

    Attributes:
      target: bits a weight that were asked for.
      bits: effective bits, the mean over positions.
      layers: the same by layer.
      losses: bits a byte of each sequence.
      pairs: of layers that choose, their two widths.
      of_queries: effective bits of each sequence, of a model that chooses.
    """

    method: str
    target: float
    bits: float
    perplexity: float
    bits_per_byte: float
    layers: dict[str, float]
    losses: list[float] = field(default_factory=list)
    pairs: dict[str, tuple[int, int]] = field(default_factory=dict)
    of_queries: list[float] = field(default_factory=list)

    def drift(self, share: float) -> float:
        """What so many of the sequences stay within, relative to the mean of all: of effective bits."""
        return float(np.quantile(np.abs(np.array(self.of_queries) / np.mean(self.of_queries) - 1), share))


Both = tuple[Row, Row]


def over(both: Sequence[Both]) -> tuple[float, float]:
    """By how many bits a byte the first ones lose more than the second ones, and the standard error: of the differences
    on the same sequences, each the mean over all that are given."""
    differences = np.mean([np.subtract(a.losses, b.losses) for a, b in both], axis=0)
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / count**0.5) if count > 1 else nan


def beside(rows: Sequence[Row], method: str, other: str) -> dict[float, Both]:
    """The rows of two methods by target, where both have one."""
    own, others = ({r.target: r for r in rows if r.method == name} for name in (method, other))
    return {target: (own[target], others[target]) for target in sorted(own.keys() & others.keys())}


def broken(rows: Sequence[Row]) -> list[str]:
    """What does not hold of what is claimed: that layers which choose use both widths, that effective bits are at the
    target, and that no mix loses less than DP-LLM: at one, beyond what may be chance, and over all, by `MARGIN`."""
    wrong = [text for row in rows for text in _off(row)]
    for mix in MIXES:
        found = beside(rows, DP, mix)
        for target, both in found.items():
            more, error = over([both])
            if not more <= ERRORS * error:  # nor NaN
                wrong.append(f"{DP} at {target} loses {more:.4f} bits a byte to {mix}, +- {error:.4f}")
        if found:
            more, error = over([*found.values()])
            least = MARGIN * float(np.mean([other.bits_per_byte for _, other in found.values()]))
            if not more + ERRORS * error <= least:
                wrong.append(
                    f"{DP} is not shown to be within {least:.4f} bits a byte of {mix}: {more:+.4f} +- {error:.4f}"
                )
    return wrong


def _off(r: Row) -> list[str]:
    at, wrong = f"{r.method} at {r.target}", []
    if r.of_queries and not r.pairs:
        wrong.append(f"{at}: no layer chooses")
    for path, (low, high) in r.pairs.items():
        if not low < r.layers[path] < high:
            wrong.append(f"{at}: layer {path!r} has {r.layers[path]} bits always, of {low} and {high}")
    if not abs(r.bits / r.target - 1) <= TOLERANCE:
        wrong.append(f"{at}: {r.bits:.3f} effective bits, more than {TOLERANCE:.0%} off")
    return wrong


def gains(rows: Sequence[Row], compared: Sequence[tuple[str, str]] = COMPARED) -> str:
    """What methods lose more than others, in bits a byte with its standard error, as Markdown."""
    found = {f"{a} over {b}": beside(rows, a, b) for a, b in compared}
    targets = sorted({target for of in found.values() for target in of})
    lines = [f"| target | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for target in targets:
        lines.append(_line(f"{target:g}", [[of[target]] for of in found.values()]))
    if len(targets) > 1:
        lines.append(_line("all", [[*of.values()] for of in found.values()]))
    return "\n".join(lines) + "\n"


def _line(name: str, cells: Sequence[Sequence[Both]]) -> str:
    return f"| {name} | {' | '.join('{:+.4f} ± {:.4f}'.format(*over(both)) for both in cells)} |"


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    lines = [
        "| target | method | effective bits | perplexity | bits/byte | layers that choose | drift p90 | p99 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r.target, r.method)):
        cells = [f"{r.target:g}", r.method, f"{r.bits:.3f}", f"{r.perplexity:.4f}", f"{r.bits_per_byte:.4f}"]
        choose = f"{len(r.pairs)} of {len(r.layers)}" if r.of_queries else ""
        drift = [f"{r.drift(share):.2%}" for share in (0.9, 0.99)] if r.of_queries else ["", ""]
        lines.append(f"| {' | '.join([*cells, choose, *drift])} |")
    return "\n".join(lines) + "\n"


def read(result: Mapping[str, Any], name: str) -> list[Row]:
    """The rows of a file of results."""
    return [Row(**of | {"pairs": {path: tuple(pair) for path, pair in of["pairs"].items()}}) for of in result[name]]
