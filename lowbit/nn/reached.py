"""Which parts of a model run, in which order, and on what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import nnx

from lowbit.nn.around import Around
from lowbit.nn.kernel import joined

Call = Callable[[Any, Any], Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Noted(Around):
    """A module that tells its path and its arguments whenever it is called."""

    def __init__(self, layer: Any, path: str, note: Callable[[str, Arguments], None]) -> None:
        super().__init__(layer)
        self.path = path
        self.note = note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note(self.path, (args, kwargs))
        return self.layer(*args, **kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        self.note(self.path, (args, kwargs))
        return self.layer.attend(*args, **kwargs)


class _ReachedError(Exception):
    """A block was reached: what comes after it need not run."""


def in_order(model: nnx.Module, paths: Iterable[str], call: Call, batch: Any) -> dict[str, int]:
    """How often each of these modules of a model runs, in the order in which they first do; nothing is computed.

    Raises ValueError for one that never runs.
    """
    wanted, seen = set(paths), dict[str, int]()
    noted = _noted(model, wanted, lambda path, _: seen.update({path: seen.get(path, 0) + 1}))
    nnx.eval_shape(call, noted, batch)
    if missing := sorted(wanted - seen.keys()):
        raise ValueError(f"{missing[0]!r} never runs on the first batch: leave it out, or give one that reaches it")
    return seen


def arguments(model: nnx.Module, path: str, call: Call, batch: Any) -> Arguments:
    """What a module of a model is called with on a batch. Runs uncompiled, as far as there.

    Raises ValueError for a module that is compiled or never called.
    """

    def stop(_: str, given: Arguments) -> None:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(given)):
            raise ValueError(f"block {path!r} runs within jax.jit, nnx.scan or the like: no values are seen there")
        reached.append(given)
        raise _ReachedError

    reached: list[Arguments] = []
    try:
        call(_noted(model, {path}, stop), batch)
    except _ReachedError:
        return reached[0]
    raise ValueError(f"block {path!r} never runs on a batch that was given: leave that out")


def _noted(model: nnx.Module, paths: set[str], note: Callable[[str, Arguments], None]) -> nnx.Module:
    made: dict[int, _Noted] = {}

    def around(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, nnx.Module) or joined(path) not in paths:
            return node
        return made.setdefault(id(node), _Noted(node, joined(path), note))

    out: nnx.Module = nnx.recursive_map(around, nnx.clone(model))
    return out
