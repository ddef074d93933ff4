"""A layer put around another, to see what passes."""

from __future__ import annotations

from typing import Any

from flax import nnx


class Around(nnx.Module):
    """A layer that holds another one and, but for what its subclass says, behaves like it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "layer" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["layer"], name)
