"""Serving under load: NestedFP's two precisions, each alone and chosen step by step, on the same arrivals.

    python examples/serve.py [--requests 64] [--load 0.8] [--json out.json]

A trace of requests runs through `lb.models.Batcher` on a clock that only steps move, each by the time it took. So what
is told is what this machine needs, queueing included, though nobody sleeps between arrivals. Requests arrive at `load`
times the rate at which 16 bits serve them when all are there at once, either one by one (a Poisson process) or `BURST`
together. Of each mode, over requests: TTFT, the time from arrival to first token, and TPOT, the time for each further
one (NestedFP, https://arxiv.org/abs/2506.02024, chooses 8 bits in steps with many scheduled tokens).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import lowbit as lb
from lowbit.models import Batcher, Decoder
from lowbit.models.steps import LEAST

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/tinylm/model"
PROMPT, NEW = (16, 128), (8, 48)
"""Tokens of a request, evenly distributed between these."""
BURST = 8
SLOTS = PROMPT[1] + NEW[1]
Width = Callable[[int], int]


@dataclass(frozen=True)
class Request:
    prompt: np.ndarray
    n: int


@dataclass(frozen=True)
class Result:
    """What one mode did with one trace: times in milliseconds, and the share of its steps that read 8 bits."""

    arrivals: str
    mode: str
    ttft_p50: float
    ttft_p95: float
    tpot_p50: float
    tpot_p95: float
    steps_in_8_bits: float


def requests(count: int, rng: np.random.Generator) -> list[Request]:
    """Pieces of this repository's README, as bytes."""
    text = np.frombuffer((ROOT / "README.md").read_bytes(), np.uint8)
    sizes, starts = rng.integers(PROMPT[0], PROMPT[1] + 1, count), rng.integers(0, len(text) - PROMPT[1], count)
    news = rng.integers(NEW[0], NEW[1] + 1, count)
    return [Request(text[at : at + size], int(n)) for at, size, n in zip(starts, sizes, news, strict=True)]


def poisson(count: int, gap: float, rng: np.random.Generator) -> np.ndarray:
    """Times of arrivals, `gap` apart on average."""
    return np.cumsum(rng.exponential(gap, count))


def bursts(count: int, gap: float, rng: np.random.Generator) -> np.ndarray:
    """The same rate, `BURST` requests at a time."""
    return np.repeat(poisson(-(-count // BURST), gap * BURST, rng), BURST)[:count]


def served(batcher: Batcher, trace: Sequence[Request], arrivals: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Seconds to each request's first token and for each further one, and until the last token of all."""
    now, added, first = 0.0, 0, batcher.count
    times: list[list[float]] = [[] for _ in trace]
    while added < len(trace) or batcher.busy:
        if not batcher.busy:
            now = max(now, float(arrivals[added]))
        while added < len(trace) and arrivals[added] <= now:
            batcher.add(trace[added].prompt, trace[added].n)
            added += 1
        start = time.perf_counter()
        new = batcher.step()
        now += time.perf_counter() - start
        for token in new:
            times[token.request - first].append(now)
    ttft = np.array([t[0] for t in times]) - arrivals
    return ttft, np.array([(t[-1] - t[0]) / (len(t) - 1) for t in times]), now


class Server:
    """A model whose precision a mode chooses; steps are counted by what they read."""

    def __init__(self, model: Decoder, rows: int, budget: int, width: Width) -> None:
        self.widths: list[int] = []

        def chosen(tokens: int) -> int:
            self.widths.append(width(tokens))
            return self.widths[-1]

        self.batcher = Batcher(model, rows, SLOTS, budget=budget, width=chosen)

    def warm(self, budget: int) -> None:
        """Compile all there is, before anything is timed: prompts of each bucket."""
        size = LEAST
        while size < 2 * budget:
            self.batcher.add(np.ones(min(size, budget) + 1, np.int32), 1)
            self.batcher.step()
            size *= 2
        assert not self.batcher.busy
        self.widths.clear()


def compared(
    model: Decoder, count: int, load: float, rows: int, budget: int, threshold: int, seed: int
) -> list[Result]:
    """Every mode on every kind of arrivals, the same requests at the same times."""
    modes: dict[str, Width] = {
        "fp16": lambda tokens: 16,
        "fp8": lambda tokens: 8,
        "switching": lambda tokens: 8 if tokens > threshold else 16,
    }
    rng = np.random.default_rng(seed)
    trace = requests(count, rng)
    full = {}
    for mode in ("fp16", "fp8"):
        server = Server(model, rows, budget, modes[mode])
        server.warm(budget)
        full[mode] = served(server.batcher, trace, np.zeros(count))[2]
    print(f"All {count} requests at once take {full['fp16']:.3g} s in 16 bits and {full['fp8']:.3g} s in 8.")
    if full["fp8"] >= full["fp16"]:
        print("So 8 bits are not faster on this device, and no choice among the two can gain time on it.")
    gap, out = full["fp16"] / count / load, []
    for name, arrive in {"poisson": poisson, "bursts": bursts}.items():
        arrivals = arrive(count, gap, rng)
        for mode, width in modes.items():
            server = Server(model, rows, budget, width)
            ttft, tpot, _ = served(server.batcher, trace, arrivals)
            (a, b), (c, d) = (1e3 * np.percentile(seconds, (50, 95)) for seconds in (ttft, tpot))
            share = float(np.mean(np.equal(server.widths, 8)))
            out.append(Result(name, mode, float(a), float(b), float(c), float(d), share))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--load", type=float, default=0.8, help="arrivals over what 16 bits serve, %(default)s")
    parser.add_argument("--rows", type=int, default=8, help="sequences at once, %(default)s")
    parser.add_argument("--budget", type=int, default=64, help="prompt tokens that a step reads, %(default)s")
    parser.add_argument("--threshold", type=int, default=16, help="scheduled tokens above which 8 bits are read")
    parser.add_argument("--seed", type=int, default=0, help="of requests and arrivals")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    given = parser.parse_args()
    model = lb.models.load(MODEL, {"embed": None, "**": lb.nested_fp()}, dtype="float32", progress=False)
    results = compared(model, given.requests, given.load, given.rows, given.budget, given.threshold, given.seed)
    names = "arrivals", "mode", "TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95", "steps in 8 bits"
    table = Table(*names, title="milliseconds, over requests")
    for r in results:
        times = (f"{t:.1f}" for t in (r.ttft_p50, r.ttft_p95, r.tpot_p50, r.tpot_p95))
        table.add_row(r.arrivals, r.mode, *times, f"{r.steps_in_8_bits:.0%}")
    Console(width=110).print(table)
    if given.json:
        given.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
