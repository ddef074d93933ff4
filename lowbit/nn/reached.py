"""Which parts of a model run, in which order, and on what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from lowbit.nn.around import Around
from lowbit.nn.kernel import joined

Call = Callable[[Any, Any], Any]
_HERE = "an array"
"""Stands in `Inputs.fixed` where an array was."""


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["tree", "fixed"])
@dataclass(frozen=True)
class Inputs:
    """What a block is called with: arrays, and all else that its arguments hold, which compiled functions depend on."""

    arrays: list[Any]
    tree: Any
    fixed: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Inputs:
        leaves, tree = jax.tree.flatten((tuple(args), dict(kwargs)))
        found = [isinstance(leaf, jax.Array | np.ndarray | np.generic) for leaf in leaves]
        arrays = [leaf for leaf, is_array in zip(leaves, found, strict=True) if is_array]
        fixed = tuple((_HERE, None) if a else ("", leaf) for leaf, a in zip(leaves, found, strict=True))
        return Inputs(arrays, tree, fixed)

    def call(self, block: Any) -> Any:
        arrays = iter(self.arrays)
        args, kwargs = self.tree.unflatten([next(arrays) if at == _HERE else leaf for at, leaf in self.fixed])
        return block(*args, **kwargs)


class _Noted(Around):
    """A module that tells its path and its inputs whenever it is called."""

    def __init__(self, layer: Any, path: str, note: Callable[[str, Inputs], None]) -> None:
        super().__init__(layer)
        self.path = path
        self.note = note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note(self.path, Inputs.of(args, kwargs))
        return self.layer(*args, **kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> Any:
        self.note(self.path, Inputs.of(args, kwargs))
        return self.layer.attend(*args, **kwargs)


class _ReachedError(Exception):
    """A block was reached: what comes after it need not run."""


def in_order(model: nnx.Module, paths: Iterable[str], call: Call, batch: Any) -> dict[str, int]:
    """How often each of these modules of a model runs, in the order in which they first do; nothing is computed.

    Raises ValueError for one that never runs.
    """
    wanted, seen = set(paths), dict[str, int]()
    watched = noted(model, wanted, lambda path, _: seen.update({path: seen.get(path, 0) + 1}))
    nnx.eval_shape(call, watched, batch)
    if missing := sorted(wanted - seen.keys()):
        raise ValueError(f"{missing[0]!r} never runs on the first batch: leave it out, or give one that reaches it")
    return seen


def inputs_of(model: nnx.Module, path: str, call: Call, batch: Any) -> Inputs:
    """What a module of a model is called with on a batch. Runs uncompiled, as far as there.

    Raises ValueError for a module that is compiled or never called.
    """

    def stop(_: str, given: Inputs) -> None:
        if any(isinstance(x, jax.core.Tracer) for x in given.arrays):
            raise ValueError(f"block {path!r} runs within jax.jit, nnx.scan or the like: no values are seen there")
        reached.append(given)
        raise _ReachedError

    reached: list[Inputs] = []
    try:
        call(noted(model, {path}, stop), batch)
    except _ReachedError:
        return reached[0]
    raise ValueError(f"block {path!r} never runs on a batch that was given: leave that out")


def noted(model: nnx.Module, paths: set[str], note: Callable[[str, Inputs], None]) -> nnx.Module:
    """A copy of a model that calls `note(path, inputs)` whenever one of these modules is called."""
    made: dict[int, _Noted] = {}

    def around(path: tuple[Any, ...], node: Any) -> Any:
        if not isinstance(node, nnx.Module) or joined(path) not in paths:
            return node
        return made.setdefault(id(node), _Noted(node, joined(path), note))

    out: nnx.Module = nnx.recursive_map(around, nnx.clone(model))
    return out
