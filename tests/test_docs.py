"""The pages of docs/: every cell runs, every page is listed, every link between files leads somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from tools import api_pages

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}\n(?::.*\n)*(.*?)^```$", re.MULTILINE | re.DOTALL)


def cells(page: Path) -> list[str]:
    return CELL.findall(page.read_text("utf-8"))


def by_name(page: Path) -> str:
    return page.stem


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if cells(p)], ids=by_name)
def test_the_cells_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """In a process of their own, as when the page is built: formats are registered once in a process."""
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n".join(cells(page)), encoding="utf-8")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_cell_of_a_page_is_one_that_runs(page: Path) -> None:
    text = page.read_text("utf-8")
    assert len(cells(page)) == text.count("{code-cell}"), "a cell begins with ```{code-cell} and ends with ```"
    assert not cells(page) or text.startswith("---\nfile_format: mystnb\n"), "without this header no cell is run"


def test_every_page_is_listed_once() -> None:
    listed: list[str] = []
    for tree in re.findall(r"^```\{toctree\}\n(.*?)^```$", (ROOT / "docs/index.md").read_text("utf-8"), re.M | re.S):
        listed += [line for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == sorted(["api/index", *(p.stem for p in PAGES if p.stem != "index")])


@pytest.mark.parametrize("file", [*ROOT.glob("*.md"), *PAGES], ids=by_name)
def test_links_between_files_resolve(file: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"https?://", link):
            assert (file.parent / link).exists(), f"{file.name} links to {link}, which is not there"


def test_the_reference_has_every_public_name_once() -> None:
    directives = re.findall(r"^\.\. auto(?!module)\w+:: (\S+)$", "\n".join(api_pages.pages().values()), re.MULTILINE)
    assert len(set(directives)) == len(directives)
    modules = set(api_pages.modules())
    for name in lowbit.__all__:
        assert f"lowbit.{name}" in directives or f"lowbit.{name}" in modules
    assert {"lowbit.ir.evaluate", "lowbit.passes.run", "lowbit.nn.Linear", "lowbit.tune.fold"} <= set(directives)


def test_the_reference_is_written_to_a_folder_and_nothing_else_stays_there(tmp_path: Path) -> None:
    (tmp_path / "lowbit.gone.rst").write_text("a module that is gone")
    api_pages.write(tmp_path)
    assert {p.stem: p.read_text("utf-8") for p in tmp_path.iterdir()} == api_pages.pages()
