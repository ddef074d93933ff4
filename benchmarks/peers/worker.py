"""One contender with one weight, in a process of its own: `python -m benchmarks.peers.worker MODULE NAME N K M,M FILE`.

Each line of FILE is a JSON object: what became of one number of rows, that the weight is loaded, or why it is not.
After a failure the process ends, for a GPU may be of no use to it any more.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.peer import Clock, Peer, check, clock_of, expected, find
from benchmarks.peers.weights import make

TOLD = 500
"""Characters of a reason."""


def measure(peer: Peer, clock: Clock, k: int, m: int, packed: Any, rotated: Any, right: Any) -> dict[str, Any]:
    """Checked, then timed; what is wrong is not timed."""
    try:
        check(right, m, lambda x: clock.run(peer, x, packed))
    except AssertionError as err:
        return {"wrong": str(err)}
    # So small that sums stay within float16.
    x = np.random.default_rng(9).standard_normal((m, k), np.float32) / 64
    return {"bytes": clock.nbytes(packed), "versions": versions(peer, clock), **clock.timed(peer, x, rotated)}


def versions(peer: Peer, clock: Clock) -> dict[str, str]:
    """Of the framework, and of the package if it was installed as one."""
    out = clock.versions()
    for name in packages_distributions().get(peer.needs, [])[:1]:
        try:
            out[name] = version(name)
        except PackageNotFoundError:  # its metadata is gone
            continue
    return out


def work(peer: Peer, n: int, k: int, batches: list[int], file: Path) -> None:
    def say(**line: Any) -> None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    at = {}  # until the weight is there, all numbers of rows fail together
    try:
        if not peer.there:
            return say(reason=f"no module {peer.needs!r}", missing=True)
        weight, clock = make(peer.what, n, k), clock_of(peer)
        packed = peer.pack(weight)
        rotated, right = clock.rotation(packed), expected(peer, weight)
        say(loaded=True)
        for m in batches:
            at = {"m": m}
            say(**at, **measure(peer, clock, k, m, packed, rotated, right))
    except Exception as err:
        say(**at, reason=f"{type(err).__name__}: {err}"[:TOLD])


def main(args: list[str]) -> None:
    module, name, n, k, batches, file = args
    work(find(module, name), int(n), int(k), [int(m) for m in batches.split(",")], Path(file))


if __name__ == "__main__":
    main(sys.argv[1:])
