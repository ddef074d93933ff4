"""The roofline of a GPU with the measured products on it: `python -m benchmarks.gpu_plot out.png`.

Across, operations for each byte that a product must move; upwards, operations a second. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also when it is run as a file

from benchmarks.gpu_cases import BATCHES, COPY, DTYPES, FORMATS, HALVES, SHAPES, Case, ways
from benchmarks.gpu_results import Results, Row, newest, peaks


def point(case: Case, row: Row) -> tuple[float, float]:
    """Operations a byte, operations a second."""
    operations = 2 * case.m * case.n * case.k
    return operations / case.bytes, operations / row["seconds"]


def curves(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Points of the first shape by the weight's format, of the fastest way to run it, few rows first."""
    out = {}
    for what in (HALVES, *FORMATS):
        points = []
        for m in sorted(BATCHES):
            cases = [Case(what, *SHAPES[0], m, DTYPES[0], way) for way in ways(what, m)]
            found = [point(case, results.rows[case.name]) for case in cases if case.name in results.rows]
            points += [max(found, key=lambda p: p[1])] if found else []
        if points:
            out[what] = points
    return out


def draw(axes: Any, results: Results) -> None:
    """Roofs by the data sheet and by the measured copy, and a curve for each format."""
    of = peaks(results.machine["device"])
    roofs = {"data sheet": of.memory}
    if copy := results.rows.get(COPY):
        roofs["measured copy"] = copy["bytes"] / copy["seconds"]
    intensity = [2.0**i for i in range(14)]
    for (name, memory), style in zip(roofs.items(), ("-", "--"), strict=False):
        axes.plot(intensity, [min(i * memory, of.products) for i in intensity], f"k{style}", label=name, linewidth=1)
    for what, points in curves(results).items():
        axes.plot(*zip(*points, strict=True), "o-", label=what, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    n, k = SHAPES[0]
    axes.set_title(f"{n} x {k}, {DTYPES[0]}, 1 to {max(BATCHES)} rows\n{results.machine['device']}", fontsize=10)
    axes.legend(fontsize=8)


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="image to write")
    given = parser.parse_args(args)
    results = newest("gpu_matmul")
    if not curves(results):
        print("nothing is measured yet: run make gpu on an H100 or H200, and put its results into benchmarks/results/")
        return 1
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    draw(figure.subplots(), results)
    figure.savefig(given.out, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
