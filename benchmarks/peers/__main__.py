"""`python -m benchmarks.peers [PART=i/n]`: lowbit beside other libraries on an H100 or H200; `--list` needs no GPU.

Results are added one by one to benchmarks/results/<device>_jax-<version>/peers.json, under $OUT if that is set. A run
goes on where another stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_results import Results, Row, newest, opened, part, peaks
from benchmarks.peers.peer import Peer, everyone
from benchmarks.peers.race import BATCHES, SHAPES, device, machine, name_of, race
from benchmarks.peers.report import OURS, draw, page

NAME = "peers"
SECONDS = 500


def listing(peers: Sequence[Peer], shapes: Sequence[tuple[int, int]], results: Results) -> Iterator[str]:
    """Every contender: its format, what must be installed and whether it is, and how many products have an outcome."""
    yield f"weights: {', '.join(f'{n} x {k}' for n, k in shapes)}; rows of x: {', '.join(map(str, BATCHES))}"
    yield f"{'contender':26} {'format':15} {'dtype':9} {'needs':18} {'here':7} outcomes"
    for peer in peers:
        names = [name_of(peer, n, k, m) for n, k in shapes for m in BATCHES]
        found = f"{sum(name in results.rows for name in names)} of {len(names)}"
        here = "yes" if peer.there else "missing"
        yield f"{peer.name:26} {peer.what:15} {peer.dtype:9} {peer.needs:18} {here:7} {found}"


def said(row: Row) -> str:
    if "seconds" in row:
        return f"{row['name']:48} {1e6 * row['seconds']:>9.1f} us {8 * row['bytes'] / row['n'] / row['k']:>6.2f} bits"
    return f"{row['name']:48} {'WRONG ' + row['wrong'] if 'wrong' in row else row['reason']}"


def plot(out: Path, results: Results) -> int:
    if not results.rows:
        print("nothing is measured yet: run make gpu-peers, and put its results into benchmarks/results/")
        return 1
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    draw(figure, results)
    figure.savefig(out, dpi=150)
    return 0


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="?", default="1/1", help="PART=i/n: every n-th weight from the i-th on")
    parser.add_argument("--only", default="", metavar="WORD", help="contenders with this in their names")
    parser.add_argument("--list", action="store_true", help="who takes part, and what has an outcome; needs no GPU")
    parser.add_argument("--table", action="store_true", help="the committed results in Markdown; needs no GPU")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the committed results as an image; needs matplotlib")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"stop after so many (default {SECONDS})")
    given = parser.parse_args(args)
    until = time.monotonic() + given.seconds
    if given.table:
        print(*page(newest(NAME)), sep="\n")
        return 0
    if given.plot:
        return plot(given.plot, newest(NAME))
    shapes = part(SHAPES, given.part)
    peers = [peer for peer in everyone() if given.only.lower() in peer.name.lower()]
    if given.list:
        print(*listing(peers, shapes, newest(NAME)), sep="\n")
        return 0
    try:
        peaks(found := device())  # of no other one is anything known here
    except (OSError, subprocess.CalledProcessError, ValueError) as err:
        parser.error(f"this measures an H100 or H200: {err}. --list needs none")
    results = opened(NAME, machine(found))
    for row in race(peers, shapes, results, until):
        print(said(row), flush=True)
    left = sum(name_of(peer, n, k, m) not in results.rows for n, k in shapes for peer in peers for m in BATCHES)
    again = ", run it again" * bool(left)
    print(f"{len(results.rows)} outcomes in {results.path}; {left} of this part are left{again}")
    return any("wrong" in row and row["peer"].startswith(OURS) for row in results.rows.values())


if __name__ == "__main__":
    sys.exit(main())
