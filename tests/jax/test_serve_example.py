"""examples/serve.py: its clock, its arrivals and what it tells."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from examples import serve
from lowbit.models import Batcher, Config, Decoder, Rope


def test_the_clock_is_that_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(
        vocab=48, width=16, layers=1, heads=2, kv_heads=2, head=8, hidden=16, context=32, ropes=(Rope(10_000.0, 8),)
    )
    batcher = Batcher(Decoder(config, rngs=nnx.Rngs(0)), rows=2, slots=16)
    ticks = count(step=2.0)
    monkeypatch.setattr(serve.time, "perf_counter", lambda: next(ticks))  # so each step takes two seconds
    trace = [serve.Request(np.ones(2, np.int32), n) for n in (3, 2, 2, 2)]
    ttft, tpot, end = serve.served(batcher, trace, np.array([1.0, 1.5, 2.0, 20.0]))
    # The first runs from 1 to 7; the second, seen at 3, to 7; the third waits until then. The last finds all rows free.
    assert ttft.tolist() == [2.0, 3.5, 7.0, 2.0]
    assert tpot.tolist() == [2.0] * 4
    assert end == 24.0


def test_arrivals_have_the_rate_asked_for() -> None:
    single, together = (f(4000, 0.5, np.random.default_rng(0)) for f in (serve.poisson, serve.bursts))
    gaps = np.diff(single)
    # Five standard deviations of the mean of exponential gaps, of which bursts have an eighth.
    assert abs(gaps.mean() / 0.5 - 1) < 5 / np.sqrt(4000)
    assert abs(together[-1] / 4000 / 0.5 - 1) < 5 / np.sqrt(4000 / serve.BURST)
    assert np.all(gaps > 0) and len(np.unique(together)) == 4000 / serve.BURST


@pytest.mark.slow
def test_every_mode_is_told_on_both_kinds_of_arrivals(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.json"
    options = ["--requests", "3", "--rows", "2", "--budget", "16", "--threshold", "4", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["serve.py", *options])
    monkeypatch.setattr(serve, "NEW", (2, 4))
    serve.main()
    said, rows = capsys.readouterr().out, json.loads(target.read_text())
    assert "All 3 requests at once take " in said
    assert [(r["arrivals"], r["mode"]) for r in rows] == [
        (a, m) for a in ("poisson", "bursts") for m in ("fp16", "fp8", "switching")
    ]
    for r in rows:
        assert {"fp16": r["steps_in_8_bits"] == 0, "fp8": r["steps_in_8_bits"] == 1}.get(r["mode"], True)
        assert 0 < r["ttft_p50"] <= r["ttft_p95"] and 0 < r["tpot_p50"] <= r["tpot_p95"]
    assert all(0 < r["steps_in_8_bits"] < 1 for r in rows if r["mode"] == "switching")
