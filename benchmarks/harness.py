"""Timing several programs side by side, and writing what came out."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

EVICT = 1 << 28
"""Bytes read between two timings: several last-level caches, so that weights come from memory as they do in a model."""


def row(name: str, value: float, unit: str, baseline: str, base: float) -> Row:
    """One figure: `ratio` is the value over that of `baseline`, measured in the same run."""
    return {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": value / base}


def fastest(name: str, seconds: Sequence[float], baseline: str, base: Sequence[float]) -> Row:
    """Least milliseconds of a call, for differences that are smaller than what others on a machine change; `thirds` are
    the least and the largest ratio that the first, the second and the last third of the rounds have by themselves."""
    parts = [slice(len(seconds) * i // 3, len(seconds) * (i + 1) // 3) for i in range(3)]
    ratios = [min(seconds[part]) / min(base[part]) for part in parts]
    told = row(name, 1e3 * min(seconds), "ms", baseline, 1e3 * min(base))
    return told | {"thirds": [min(ratios), max(ratios)]}


def interleaved(programs: Mapping[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median seconds a call of each program: see `in_turn`."""
    return {name: median(seconds) for name, seconds in in_turn(programs, rounds).items()}


def in_turn(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call: one of each program in turn, after two that do not count, caches cold."""
    cold = jnp.ones(EVICT // 4, jnp.float32)
    evict = jax.jit(jnp.sum)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for at in range(rounds + 2):
        for name, program in programs.items():
            jax.block_until_ready(evict(cold))
            start = time.perf_counter()
            jax.block_until_ready(program())
            if at >= 2:
                times[name].append(time.perf_counter() - start)
    return times


def machine() -> str:
    """The device, the cores and the versions, for the head of a table."""
    device = jax.devices()[0].device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{device} ({platform.machine()}, {cores} cores), {versions}, {datetime.date.today()}"


def main(title: str, measure: Callable[..., list[Row]], **options: Any) -> None:
    """The command line of a benchmark: measure, print, and write the rows where `--json` says.

    `options` are those that it has beside, with their defaults; `measure` is called with what is given.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=pathlib.Path, help="file to write the rows to")
    for name, default in options.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default, help="%(type)s, or %(default)s")
    given = vars(parser.parse_args())
    target = given.pop("json")
    rows = measure(**given)
    table = Table("name", "value", "unit", "baseline", "ratio", title=f"{title}\n{machine()}")
    for r in rows:
        spread = " ({:.3f} to {:.3f})".format(*r["thirds"]) if "thirds" in r else ""
        table.add_row(r["name"], f"{r['value']:.4g}", r["unit"], r["baseline"], f"{r['ratio']:.3f}{spread}")
    Console(width=110).print(table)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(rows, indent=1) + "\n")
