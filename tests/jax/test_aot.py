"""`python -m tools.aot` with a compiler that needs no wheels: it leaves machine code that is known."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import machine_code
from tests.machine_code import SASS, Listed
from tools.aot import __main__ as command
from tools.aot import compiling
from tools.aot.report import BEGIN, END
from tools.aot.target import cuda_root


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels, `small` and `large`; the second is twice the first and stands in another file of the dump."""
    kernels = [Listed(avals=(1,)), Listed("large", avals=(2,), weights=16, wgmmas=4)]
    monkeypatch.setattr(command, "resolve_name", lambda name: lambda: kernels)
    monkeypatch.setattr(command, "assembler", lambda: "1.2")

    def compile_for(chip: str, function: object, times: int, dump: Path) -> None:
        middle = re.search(r"(?s)   -:-:2:Y:01.*gsb0\n", SASS)
        assert middle
        machine_code.write(dump, sass=SASS.replace(middle[0], middle[0] * times))

    monkeypatch.setattr(compiling, "compile_for", compile_for)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    return command.main()


def test_the_page_is_written_and_then_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    assert run(monkeypatch, "--check", str(page)) == 1
    assert f"{page} has another table than this one: run make aot and commit the page" in capsys.readouterr().err
    assert run(monkeypatch, "--write", str(page)) == 0
    assert re.search(r"\| `small` \| 4 \| 168 \| 2 \|.*\n\| `large` \| 4 \| 168 \| 4 \|", page.read_text())
    assert re.search(r"^Compiled by jax \d+\.\d+.* and ptxas 1\.2\.$", page.read_text(), re.MULTILINE)
    assert run(monkeypatch, "--check", str(page)) == 0
    assert capsys.readouterr().err == ""


def test_one_kernel_is_kept_to_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--only", "large", "--dump", str(tmp_path)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["large"]
    assert "`small`" not in capsys.readouterr().out


def test_a_kernel_that_is_refused_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "resolve_name", lambda name: lambda: [Listed(avals=(1,), wgmmas=7)])
    assert run(monkeypatch) == 1
    assert capsys.readouterr().err == "small has 2 WGMMAs in its loop where the catalog says 7\n"


def test_an_error_names_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, dump: Path) -> None:
        raise NotImplementedError("no such layout")

    monkeypatch.setattr(compiling, "compile_for", broken)
    with pytest.raises(NotImplementedError, match="no such layout") as raised:
        run(monkeypatch)
    assert raised.value.__notes__ == ["while compiling the kernel small for an H100"]


def test_a_kernel_that_is_not_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^no kernel huge in the catalog, which has small, large$"):
        run(monkeypatch, "--only", "huge", "--only", "small")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--only", "small", "--check", "docs/kernels.md")
    assert "--only gives a part of the table, and a page has all of it" in capsys.readouterr().err


def test_wheels_that_are_missing_are_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").touch()
    with pytest.raises(FileNotFoundError, match=f"no nvdisasm in {re.escape(str(tmp_path / 'bin'))}: run `make aot`"):
        cuda_root(tmp_path)
    (tmp_path / "bin" / "nvdisasm").touch()
    assert cuda_root(tmp_path) == tmp_path
