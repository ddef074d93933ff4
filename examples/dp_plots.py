"""The plots of `examples.dp_llm`."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.dp_table import Row

MARKERS = "osD^v<>"


def every(rows: Sequence[Row], method: str, folder: pathlib.Path) -> None:
    """curve.png, widths.png and drift.png; the last two of one method that chooses."""
    chosen = sorted((r for r in rows if r.method == method), key=lambda r: r.target)
    for name, draw, given in (("curve", curve, rows), ("widths", widths, chosen), ("drift", drift, chosen)):
        figure = draw(given)
        figure.savefig(folder / f"{name}.png", dpi=120)


def curve(rows: Sequence[Row]) -> Any:
    """Perplexity over effective bits."""
    figure, axes = _empty()
    for i, method in enumerate(dict.fromkeys(r.method for r in rows)):
        points = sorted((r.bits, r.perplexity) for r in rows if r.method == method)
        axes.plot(*zip(*points, strict=True), marker=MARKERS[i % 7], label=method, linewidth=1)
    axes.set(xlabel="effective bits per weight", ylabel="perplexity")
    axes.legend()
    return figure


def widths(rows: Sequence[Row]) -> Any:
    """How many tokens each layer reads at which width, at the middle one of the targets."""
    r = rows[len(rows) // 2]
    figure, axes = _empty()
    layers = {path: shares(r, path) for path in r.layers}
    start = np.zeros(len(layers))
    for b in sorted({b for of in layers.values() for b in of}):
        share = np.array([of.get(b, 0.0) for of in layers.values()])
        axes.barh(list(layers), share, left=start, label=f"{b} bits")
        start += share
    axes.set(xlabel="share of tokens", title=f"{r.method} at {r.target:g} bits", xlim=(0, 1))
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="small")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def shares(r: Row, path: str) -> dict[int, float]:
    """Of the tokens, by width: the mean of two widths says how many have which."""
    if path not in r.pairs:
        return {round(r.layers[path]): 1.0}
    low, high = r.pairs[path]
    share = (r.layers[path] - low) / (high - low)
    return {low: 1 - share, high: share}


def drift(rows: Sequence[Row]) -> Any:
    """How far the effective bits of sequences are from the mean of all."""
    figure, axes = _empty()
    relative = [100 * (np.array(r.of_queries) / np.mean(r.of_queries) - 1) for r in rows]
    axes.boxplot(relative, tick_labels=[f"{r.target:g}" for r in rows], whis=(1, 99), showfliers=False)
    axes.set(xlabel="target bits", ylabel="effective bits of a sequence, % from the mean (1st to 99th percentile)")
    return figure


def _empty() -> tuple[Any, Any]:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    return figure, figure.subplots()
