"""The wheel and the sdist, as a user gets them: built, installed in a clean environment and imported from there."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IGNORED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "demo-out")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of the tree so that the tree stays as it is."""
    tree = tmp_path_factory.mktemp("tree") / "lowbit"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=IGNORED)
    # The sdist first and the wheel out of it, as `python -m build` does: a file missing from the sdist shows here.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree.parent / "dist", cwd=tree)
    return tree.parent / "dist"


def find(built: Path, pattern: str) -> Path:
    (path,) = built.glob(pattern)
    return path


def modules() -> set[str]:
    """Every module of the package, as a path in the wheel."""
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "lowbit").rglob("*.py")}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(find(built, "*.whl")) as wheel:
        names = set(wheel.namelist())
        metadata = next(wheel.read(n).decode() for n in names if n.endswith(".dist-info/METADATA"))
    assert {n for n in names if n.endswith(".py")} == modules()
    assert "lowbit/py.typed" in names
    assert {"lowbit/ir/__init__.py", "lowbit/passes/__init__.py"} <= names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"lowbit"}
    assert any(n.endswith("/LICENSE") for n in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: jax<0.13,>=0.10.2" in metadata


def test_the_sdist_holds_the_source_and_the_licence(built: Path) -> None:
    with tarfile.open(find(built, "*.tar.gz")) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    assert modules() <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "lowbit/py.typed"} <= names


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_it_installs_and_imports(built: Path, tmp_path: Path, pattern: str) -> None:
    venv.create(tmp_path / "clean", with_pip=False, symlinks=sys.platform != "win32")
    python = tmp_path / "clean" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # The dependencies are those of the environment that runs this test; its own, editable lowbit does not come along,
    # because a .pth file adds a folder without reading the .pth files in it.
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "dependencies.pth").write_text("\n".join(here) + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(*pip, "install", *options, find(built, pattern), cwd=tmp_path)
    out = run(
        python,
        "-c",
        "import sys, lowbit, lowbit.ir, lowbit.passes\n"
        "assert 'jax' not in sys.modules\n"
        "print(lowbit.__file__, lowbit.ir.__file__, lowbit.passes.__file__, sep='\\n')\n"
        "for name in lowbit.__all__: getattr(lowbit, name)",
        cwd=tmp_path,
    )
    assert all(Path(line).is_relative_to(site) for line in out.splitlines()), out
