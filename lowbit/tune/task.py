"""Many tasks, one model: what was trained for each is kept apart from what all of them share (AlphaTuning, section 1).

A task is a few numbers beside a base that is stored, and held by a device, once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from os import PathLike
from typing import Any, TypeVar

import jax
from flax import nnx

from lowbit.io import CheckpointError, read, read_header, write
from lowbit.ir.dtypes import numpy_dtype
from lowbit.nn.checkpoint import variables
from lowbit.nn.kernel import Code, Frozen, Scale, expect_arrays, expect_module, joined, kernels
from lowbit.quant_type import type_to_json
from lowbit.tune.digest import digest

M = TypeVar("M", bound=nnx.Module)
STORED = nnx.Any(nnx.Param, Code, Frozen)


@dataclass(frozen=True)
class Task:
    """What was trained of a model, apart from the rest of it.

    Attributes:
      values: the trained arrays, by the names of their Variables.
      base: a digest of all else that the model holds, which `apply` compares.
    """

    values: Mapping[str, jax.Array]
    base: str

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for value in self.values.values())

    def save(self, path: str | PathLike[str]) -> None:
        """Write the task to one checked safetensors file, whole or not at all. Raises OSError when it cannot."""
        write(path, self.values, metadata={"task of": self.base})

    @staticmethod
    def load(path: str | PathLike[str]) -> Task:
        """What `save` wrote. Raises CheckpointError for a file that is damaged or holds no task."""
        if (base := read_header(path)["metadata"].get("task of")) is None:
            raise CheckpointError(f"{path} holds no task: give a file that lb.tune.extract(...).save(path) wrote")
        return Task({name: value for name, value in read(path).items() if isinstance(value, jax.Array)}, base)


@dataclass(frozen=True)
class Storage:
    """What tasks take beside one base, and as whole models. `str()` is a table.

    Attributes:
      base: bytes that all tasks share.
      tasks: bytes of each task.
      model: bytes of the model that the base was quantized from, in its dtypes.
    """

    base: int
    tasks: Mapping[str, int]
    model: int

    @property
    def together(self) -> int:
        """Bytes of the base and all tasks."""
        return self.base + sum(self.tasks.values())

    def __str__(self) -> str:
        whole = len(self.tasks) * self.base + sum(self.tasks.values())
        rows = {"base": self.base, **{f"task {name!r}": size for name, size in self.tasks.items()}}
        rows |= {"base and tasks": self.together, "a quantized model each": whole}
        rows |= {"a model each, not quantized": len(self.tasks) * self.model}
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}} {size:>15,} bytes" for name, size in rows.items())


def extract(model: nnx.Module, wrt: Any = Scale) -> Task:
    """What was trained of a model, to be put into the same base later by `apply`.

    Args:
      model: as it was trained, such as `lb.tune.train(...).model`: before `lb.tune.fold`, which joins what trained with
        what did not.
      wrt: a filter for what trained: `lb.Scale` after AlphaTuning, `lb.Codebook`, or `nnx.LoRAParam`.

    Raises ValueError when the model has nothing of it, is abstract or was laid out by `lb.prepare`; TypeError for what
    is no module.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lowbit as lb
    >>> base = lb.tune.alpha_tuning(lb.quantize(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), lb.bcq(3))).model
    >>> tuned = nnx.clone(base)
    >>> tuned.kernel.alpha_first[...] *= 2
    >>> task = lb.tune.extract(tuned)
    >>> sorted(task.values), task.bytes
    (['kernel/alpha_first'], 32)
    >>> again = lb.tune.apply(base, task)
    >>> bool((again(jnp.ones((1, 64))) == tuned(jnp.ones((1, 64)))).all())
    True
    """
    _check(model, "take a task from")
    values = {name: v.get_value() for name, v in variables(nnx.state(model, wrt)).items()}
    if not values:
        raise ValueError(f"{type(model).__name__} has nothing of {wrt!r}: there is no task in it")
    return Task(values, _base(model, values))


def apply(model: M, task: Task) -> M:
    """A copy of a model with a task in it; all other arrays are shared with `model`.

    Nothing but the arrays of the task differs between the models of several tasks, so a function that was compiled for
    one runs for all. The digest of the base is computed once in a process.

    Args:
      model: the base, prepared as it was for training: `lb.tune.alpha_tuning(small).model`, or `lb.nn.lora(small, ...)`
        of the same rank; what it has in the place of the task's arrays does not matter.
      task: of `extract` or `Task.load`.

    Raises ValueError for a model that has no place for the task, and for one whose codes, or anything else that is not
    of the task, differ from those that it was trained with; as `extract` otherwise.
    """
    _check(model, "put a task into")
    graph, state = nnx.split(model)
    held = variables(state)
    for name, value in task.values.items():
        if name not in held:
            raise ValueError(
                f"the task has {name!r} and the model has not: prepare it as it was for training, with "
                "lb.tune.alpha_tuning or lb.nn.lora"
            )
        if (place := held[name].get_value()).shape != value.shape or place.dtype != value.dtype:
            raise ValueError(
                f"{name!r} is {value.dtype}{list(value.shape)} in the task and {place.dtype}{list(place.shape)} in the "
                "model: prepare it as it was for training"
            )
    if (found := _base(model, task.values)) != task.base:
        raise ValueError(
            f"the task was trained on the base {task.base}, and this model is {found}: codes, or other arrays that are "
            "not of the task, differ; give the model that it was trained on"
        )
    filled = [(path, _filled(v, task.values.get(joined(path)))) for path, v in nnx.to_flat_state(state)]
    out: M = nnx.merge(graph, nnx.from_flat_state(filled), copy=True)
    return out


def storage(model: nnx.Module, tasks: Mapping[str, Task]) -> Storage:
    """What these tasks of a model take beside the base that they share, and what they would take as whole models."""
    _check(model, "measure")
    trained = {name for task in tasks.values() for name in task.values}
    held = {name: v.get_value() for name, v in variables(nnx.state(model, STORED)).items()}
    of_kernels = {f"{path}/{field}" for path, kernel in kernels(model).items() for field in kernel.type.fields}
    dense = sum(prod(k.shape) * numpy_dtype(k.type.dtype).itemsize for k in kernels(model).values())
    return Storage(
        sum(a.nbytes for name, a in held.items() if name not in trained),
        {name: task.bytes for name, task in tasks.items()},
        dense + sum(a.nbytes for name, a in held.items() if name not in of_kernels),
    )


def _filled(variable: Any, value: jax.Array | None) -> Any:
    return variable if value is None else variable.replace(value)


def _check(model: nnx.Module, what: str) -> None:
    expect_module(model, what)
    expect_arrays(model, what)
    for path, kernel in kernels(model).items():
        if kernel.type.layout != "own":
            raise ValueError(f"{path!r} is laid out for a device: {what} the model before lb.prepare")


def _base(model: nnx.Module, values: Mapping[str, Any]) -> str:
    types = {path: type_to_json(kernel.type) for path, kernel in kernels(model).items()}
    held = variables(nnx.state(model, STORED))
    return digest(
        {name: v.get_value() for name, v in held.items() if name not in values}, json.dumps(types, sort_keys=True)
    )
