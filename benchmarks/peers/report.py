"""What the race says: a table for each weight, every product that someone else makes faster, and a plot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu_results import Results, Row
from benchmarks.peers.race import BATCHES, SHAPES

NONE_YET = "No run has been made yet."
OURS = "lowbit"
Times = Mapping[int, Row]


def page(results: Results) -> Iterator[str]:
    """Markdown: times in microseconds, in bold where nobody with as few bits is faster; then losses and reasons."""
    if not results.rows:
        yield NONE_YET
        return
    yield f"On {results.machine['device']}, {results.machine['date']}; {said_versions(results)}."
    for n, k in SHAPES:
        rows = [row for row in results.rows.values() if (row["n"], row["k"]) == (n, k)]
        if rows:
            yield from ("", f"### {n} x {k}", "", *table(rows))
    yield from ("", "### Where lowbit is not the fastest", "", *losses(list(results.rows.values())))
    yield from ("", "### What has no time", "", *failures(list(results.rows.values())))


def said_versions(results: Results) -> str:
    found = {name: v for row in results.rows.values() for name, v in row.get("versions", {}).items()}
    return ", ".join(f"{name} {found[name]}" for name in sorted(found))


def by_peer(rows: list[Row]) -> dict[str, dict[int, Row]]:
    out: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        out[row["peer"]][row["m"]] = row
    return out


def table(rows: list[Row]) -> Iterator[str]:
    """One line a contender: bits read for each weight, microseconds for each number of rows of x."""
    yield "| | bits | " + " | ".join(f"m={m}" for m in BATCHES) + " |"
    yield "| --- " * (len(BATCHES) + 2) + "|"
    for name, times in by_peer(rows).items():
        timed = [row for row in times.values() if "seconds" in row]
        bits = f"{8 * timed[0]['bytes'] / timed[0]['n'] / timed[0]['k']:.3g}" if timed else "-"
        yield f"| {name} | {bits} | " + " | ".join(cell(times.get(m), rows) for m in BATCHES) + " |"


def cell(row: Row | None, rows: list[Row]) -> str:
    if row is None or "seconds" not in row:
        return "" if row is None else "wrong" if "wrong" in row else "-"
    beside = [r for r in rows if r["m"] == row["m"] and "seconds" in r and r["bytes"] < 1.2 * row["bytes"]]
    said = f"{1e6 * row['seconds']:.1f}" + ("" if row["clock"] == "CUPTI" else "*")
    return f"**{said}**" if min(r["seconds"] for r in beside) == row["seconds"] else said


def losses(rows: list[Row]) -> Iterator[str]:
    """One line for each product of lowbit that a rival makes faster: the fastest one, and by how much."""
    timed = [row for row in rows if "seconds" in row]
    found = 0
    ours = [row for row in timed if row["peer"].startswith(OURS)]
    for row in ours:
        rivals = [r for r in timed if rivals_of(row, r)]
        best = min(rivals, key=lambda r: float(r["seconds"]), default=row)
        if best["seconds"] < row["seconds"]:
            found += 1
            ratio = row["seconds"] / best["seconds"]
            yield f"- {row['name']}: {best['peer']} is {ratio:.2f} times as fast"
    yield f"{'- ' * bool(found)}{found} of {len(ours)} products of lowbit are not the fastest of their kind."


def rivals_of(ours: Row, row: Row) -> bool:
    """Whether a row is of the same product by someone else: a weight of the same format, or a dense one."""
    same = all(row[what] == ours[what] for what in ("n", "k", "m"))
    kinds = (ours["what"], "dense", "e4m3")
    return same and not row["peer"].startswith(OURS) and (row["rival"] or row["what"]) in kinds


def failures(rows: list[Row]) -> Iterator[str]:
    """What is missing, failed or wrong, by contender, with the reason."""
    reasons: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        if "seconds" not in row:
            reasons[row["peer"], row.get("reason") or f"wrong: {row['wrong']}"] += 1
    for (name, reason), count in reasons.items():
        yield f"- {name}, {count} of its products: {' '.join(reason.split())}"
    if not reasons:
        yield "Nothing."


def draw(figure: Any, results: Results) -> None:
    """Microseconds by rows of x for the first weight: a panel for each number of bits, dense products in all."""
    n, k = SHAPES[0]
    rows = [row for row in results.rows.values() if (row["n"], row["k"]) == (n, k) and "seconds" in row]
    for axes, bits in zip(figure.subplots(1, 3, sharey=True), (2, 3, 4), strict=True):
        for name, times in by_peer(rows).items():
            stored = 8 * next(iter(times.values()))["bytes"] / n / k
            if int(stored) in (bits, 8, 16):
                style = "o-" if name.startswith(OURS) else "k:" if stored >= 8 else "x--"
                points = [(m, 1e6 * times[m]["seconds"]) for m in sorted(times)]
                axes.plot(*zip(*points, strict=True), style, label=name, markersize=4, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="rows of x", title=f"{bits} bits, {n} x {k}")
        axes.legend(fontsize=6)
    figure.axes[0].set_ylabel("microseconds")
