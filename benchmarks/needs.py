"""What this Python lacks to run lowbit and its GPU tests from a checkout: `python -m benchmarks.needs`.

Nothing is installed: a machine with a GPU is used as it is.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BESIDE = ("pytest", "pytest-xdist", "hypothesis")
"""What the tests need; what lowbit needs stands in pyproject.toml."""


def missing() -> list[str]:
    """Requirements without an installed package."""
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text("utf-8"))
    return [need for need in (*project["project"]["dependencies"], *BESIDE) if not _installed(need)]


def _installed(need: str) -> bool:
    try:
        version(re.split(r"[<>=! ]", need)[0])
    except PackageNotFoundError:
        return False
    return True


def main() -> int:
    lacking = missing()
    if lacking:
        print(f"{sys.executable} lacks {', '.join(lacking)}: install them, or name another Python: make gpu PYTHON=...")
    return bool(lacking)


if __name__ == "__main__":
    sys.exit(main())
