"""What every test shares: the number of random examples, and golden texts.

Must not import jax: tests/null runs without it.
"""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# XLA has as many threads as cores, and each thread of a kernel that the interpreter lets wait for a barrier holds one:
# on two cores the thread that they wait for would never run. Here, for what helpers beside tests/jax compute when they
# are collected starts XLA before tests/jax/conftest.py is read.
os.environ.setdefault("NPROC", "8")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", type=int, default=60, help="random examples for each property (default 60)")
    parser.addoption("--update-golden", action="store_true", help="write the golden texts instead of comparing")


def pytest_configure(config: pytest.Config) -> None:
    # Derandomized: the same examples on every machine, so a red build is red for everyone. A property whose number of
    # examples is a promise states it with @settings(max_examples=...) and inherits the rest from this profile.
    settings.register_profile(
        "ci",
        derandomize=True,
        deadline=None,
        max_examples=config.getoption("--examples"),
        suppress_health_check=[HealthCheck.too_slow],  # the first example of a jax test pays for its compilation
        print_blob=True,
    )
    settings.load_profile("ci")


def golden_path(root: Path, file: str, test: str, part: str = "") -> Path:
    """Where a test's golden text lies: <root>/<test file>/<test name>[-part].txt, in letters that every disk takes."""
    words = [re.sub(r"[^\w.+-]+", "-", word).strip("-") for word in (test, part) if word]
    return root / Path(file).stem / ("-".join(words) + ".txt")


def compare_golden(path: Path, text: str, update: bool) -> None:
    """Fails with a diff when `text` is not what the file at `path` holds; writes it there instead when `update`."""
    if not text.endswith("\n"):
        text += "\n"
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    hint = "if the new text is right, run the test again with --update-golden and commit the file"
    if not path.exists():
        pytest.fail(f"no golden text {path}; {hint}\n\n{text}", pytrace=False)
    want = path.read_text(encoding="utf-8")
    if text != want:
        diff = difflib.unified_diff(
            want.splitlines(), text.splitlines(), fromfile=str(path), tofile="this run", lineterm="", n=100
        )
        pytest.fail("\n".join([f"the golden text differs; {hint}", *diff]), pytrace=False)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[..., None]:
    """golden(text, part="") compares `text` with tests/golden/<test file>/<test name>[-part].txt.

    A test with more than one text gives each a `part`; the same place twice in one test is an error, because the
    second text would overwrite the first.
    """
    seen: set[Path] = set()

    def check(text: str, part: str = "") -> None:
        path = golden_path(GOLDEN, str(request.path), request.node.name, part)
        assert path not in seen, f"{request.node.name} has two golden texts at {path}: give each its own part="
        seen.add(path)
        compare_golden(path, text, request.config.getoption("--update-golden"))

    return check
