"""Checkpoints that the packers of AutoGPTQ and AutoAWQ make while the tests run, in shapes that no golden has."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import GOLDEN, check_read

PACKERS = Path(sys.prefix) / "packers"
HOW = f"is not in {PACKERS}, where make test-all installs it if this Python has a wheel of it: "
"""Beside the other packages, for what it requires is years old. Of AutoAWQ 0.2.7 is the last that has a wheel."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of torch, by these packages
]


@pytest.fixture
def generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of goldens by name: a module that writes into `tmp_path`, layers of 96 inputs and 64 outputs."""
    for name in ("torch", "transformers", "accelerate"):  # that the packers import
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'lowbit[live]' has it")
    monkeypatch.syspath_prepend(GOLDEN)
    monkeypatch.setattr(importlib.import_module("golden"), "HERE", tmp_path)

    def find(name: str) -> Any:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "N", 64)
        monkeypatch.setattr(module, "K", 96)
        return module

    return find


@pytest.mark.skipif(
    not (PACKERS / "auto_gptq").exists(), reason=f"auto_gptq {HOW}auto-gptq 0.7.1 has for Python 3.8 to 3.11"
)
@pytest.mark.parametrize("group", [32, 96, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path: Path, generator: Any, bits: int, group: int) -> None:
    make = generator("make_gptq")
    linear = make.auto_gptq(PACKERS)
    for order in (False, True):
        for symmetric in (False, True):
            make.first(linear, name := f"{order}_{symmetric}", bits, group, order, symmetric, "live")
            check_read(tmp_path / "gptq" / name)


@pytest.mark.skipif(not (PACKERS / "awq").exists(), reason=f"awq {HOW}autoawq 0.2.7 has for every one")
@pytest.mark.parametrize("group", [16, 32, 48, 96])
def test_awq(tmp_path: Path, generator: Any, group: int) -> None:
    make = generator("make_awq")
    make.make(*make.autoawq(PACKERS), group, "live")
    check_read(tmp_path / "awq" / f"group_{group}")
