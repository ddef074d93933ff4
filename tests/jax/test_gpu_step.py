"""The benchmark of a training step, without a GPU: its list, and a run of small weights on the CPU."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from benchmarks import gpu_step
from benchmarks.gpu_results import ASSUMED, Results
from benchmarks.gpu_step import Case

MACHINE = {"device": ASSUMED, "jax": "0.11.2", "jaxlib": "0.11.2", "source": "abc", "date": "2026-01-01"}
SMALL = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "gate": (96, 64), "up": (96, 64), "down": (64, 96)}


def test_bytes_and_operations() -> None:
    lora, alpha = (Case(way, 512) for way in ("lora", "alpha"))
    weights = 4 * 218_103_808
    assert lora.weights == alpha.weights == weights
    assert lora.stored == 2 * weights + 4 * 4 * 16 * (4 * 4096 + 2 * 5120 + 3 * 18432)
    assert alpha.stored == weights * (4 + (3 * 16 + 32) / 128) / 8  # four planes, and the scales of one in float32
    assert (lora.operations, alpha.operations) == tuple(2 * times * 512 * weights for times in (2, 3))


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_step, "newest", lambda name: Results(Path(), MACHINE))
    assert gpu_step.main(["--list"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("alpha tokens=512"))
    assert line.split()[2:4] == ["504,365,056", "not"] and "2709.9" in line


@pytest.mark.slow
def test_a_run_measures_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results(tmp_path / "gpu_step.json", MACHINE)
    monkeypatch.setattr(gpu_step, "TOKENS", (8,))
    monkeypatch.setattr(gpu_step, "LAYER", SMALL)
    monkeypatch.setattr(gpu_step, "DEPTH", 2)
    monkeypatch.setattr(gpu_step, "hopper", lambda parser: jax.devices()[0])
    monkeypatch.setattr(gpu_step, "opened", lambda name, machine: results)
    monkeypatch.setattr(gpu_step, "profiled", lambda: False)
    assert gpu_step.main([]) == 0
    assert list(results.rows) == ["lora tokens=8", "alpha tokens=8", "alpha_xla tokens=8"]
    assert all(row["temporary"] > 0 and row["held"] >= row["stored"] for row in results.rows.values())
    monkeypatch.setattr(gpu_step, "measure", lambda *_: pytest.fail("it was measured before"))
    assert gpu_step.main([]) == 0
    assert "not measured" not in capsys.readouterr().out.splitlines()[-1]
