"""The run: every contender with every weight in a process of its own, each outcome a row of the results."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_results
from benchmarks.gpu_results import Results, Row
from benchmarks.peers.peer import Peer
from benchmarks.peers.worker import TOLD

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((28672, 8192), (8192, 28672), (14336, 4096), (4096, 14336), (49152, 12288), (28672, 7168))
"""Outputs by inputs: feed-forward layers of Llama-3 70B and 8B, then those that papers report."""
BATCHES = (1, 2, 4, 8, 16, 64, 512)
DIED = "the process ended"
SILENCE = 150.0
"""Seconds without a result after which a process is taken to hang: compilers and autotuners take their time."""


def name_of(peer: Peer, n: int, k: int, m: int) -> str:
    return f"{peer.name} {n}x{k} m={m}"


def machine(device: str) -> dict[str, str]:
    """What figures depend on; the code is that of lowbit's products and of the race."""
    own = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    here = gpu_results.here(device)
    return here | {"source": hashlib.sha256(here["source"].encode() + own).hexdigest()[:12]}


def device() -> str:
    """The GPU's name by its driver. Raises OSError or CalledProcessError where there is none."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def done(results: Results, name: str) -> bool:
    """Whether there is an outcome of this code that another run would not change: not wrong, not missing."""
    return results.done(name) and not results.rows[name].get("missing")


def race(
    peers: Sequence[Peer], shapes: Sequence[tuple[int, int]], results: Results, until: float, silence: float = SILENCE
) -> Iterator[Row]:
    """Adds what is not there yet to the results, until a time of `time.monotonic`, and yields it."""
    for n, k in shapes:
        for peer in peers:
            todo = [m for m in BATCHES if not done(results, name_of(peer, n, k, m))]
            for m, outcome in outcomes(peer, n, k, todo, until, silence):
                row = {"peer": peer.name, "what": peer.what, "dtype": peer.dtype, "rival": peer.rival}
                results.add({"name": name_of(peer, n, k, m), **row, "n": n, "k": k, "m": m, **outcome})
                yield results.rows[name_of(peer, n, k, m)]


def outcomes(
    peer: Peer, n: int, k: int, batches: Sequence[int], until: float, silence: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What became of each number of rows: after a failure a new process goes on with the next. None once time is up."""
    todo = list(batches)
    while todo and time.monotonic() < until:
        lines, reason = spawn(peer, n, k, todo, until, silence)
        loaded = {"loaded": True} in lines
        for line in lines:
            if m := line.pop("m", None):
                todo.remove(m)
                yield m, line
                reason = None if "reason" in line else reason  # that is why it ended, however it did
            elif not loaded:
                reason = line
        if not lines and time.monotonic() < until:
            reason = reason or {"reason": "the process ended without a word"}
        if reason is not None:
            for m in todo[: 1 if loaded else None]:
                todo.remove(m)
                yield m, reason


def spawn(
    peer: Peer, n: int, k: int, batches: Sequence[int], until: float, silence: float
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The lines that a process wrote, and the reason why it ended early: None if it did not, or if time was up."""
    with tempfile.TemporaryDirectory() as folder:
        file, said = Path(folder, "lines"), Path(folder, "said")
        file.touch()
        what = [peer.module, peer.name, str(n), str(k), ",".join(map(str, batches)), str(file)]
        with said.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.worker", *what],
                cwd=ROOT,
                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
                stdout=out,
                stderr=out,
                start_new_session=True,  # so that compilers it started end with it
            )
        try:
            reason = watched(process, file, until, silence)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if reason == DIED:
            reason = f"{DIED} with {process.returncode}: {said.read_text('utf-8', 'replace').strip()[-TOLD:]}"
        lines = [json.loads(line) for line in file.read_text("utf-8").split("\n")[:-1]]  # a killed one may be cut
        return lines, {"reason": reason} if reason else None


def watched(process: subprocess.Popen[bytes], file: Path, until: float, silence: float) -> str | None:
    """Why a process failed, as soon as it has or is silent for too long; None when it is done or time is up."""
    size, since = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.05)
        now = time.monotonic()
        if (grown := file.stat().st_size) > size:
            size, since = grown, now
        if now > until:
            return None
        if now - since > silence:
            return f"no result within {silence:g} s"
    return DIED if process.returncode else None
