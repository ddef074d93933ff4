"""examples/explain.py: what it shows of a format."""

from __future__ import annotations

import sys

import pytest

from examples import explain


@pytest.mark.parametrize("name", explain.FORMATS)
def test_from_a_term_to_its_plans(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["explain.py", "--format", name, "--size", "512"])
    explain.main()
    said = capsys.readouterr().out
    assert f"A weight's code has {name[-1]} bits" in said
    decoder = {"uniform4": "ScaledIntegers", "bcq2": "TwoBits", "bcq3": "Eights", "bcq4": "SignedTable"}[name]
    assert f"{decoder}: " in said and "words  u32[t=8 s=2 " in said
    for batch in explain.BATCHES:
        on_gpu, on_cpu = (said.split(f"x[{batch}, k] @ ")[i] for i in (1, 2))
        assert on_gpu.splitlines()[2].startswith("mma ") and "mma      refused: it is for GPUs" in on_cpu
