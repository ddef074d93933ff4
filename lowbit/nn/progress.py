"""The bar that a run of minutes shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


@contextmanager
def bar(progress: bool | None, total: int | None, what: str) -> Iterator[Callable[[], None]]:
    """What to call after each of `total` parts; with None for `progress` it shows when standard error is a terminal."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield lambda: None
        return
    with Progress(console=Console(stderr=True)) as shown:
        task = shown.add_task(what, total=total)
        yield lambda: shown.advance(task)
