"""A bar on standard error for what takes minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console
from rich.progress import Progress


def bar(progress: bool | None, what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
    """A context that gives what to call after each of `total` parts; without a bar unless `progress`, by default where
    standard error is a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    return _Bar(what, total) if shown else nullcontext(lambda: None)


class _Bar:
    def __init__(self, what: str, total: int) -> None:
        self.bar = Progress(console=Console(stderr=True))
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> Callable[[], None]:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
