"""`lb.save` and `lb.load`: a model as one checked safetensors file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, TypeVar, overload

import jax
import numpy as np
from flax import nnx

from lowbit.array import QuantArray, laid_out
from lowbit.io import CheckpointError, read, write
from lowbit.nn.kernel import expect_module, joined, kernels

M = TypeVar("M", bound=nnx.Module)
NUMBERS = (bool, int, float, complex)
"""What a Variable may hold instead of an array; stored as an array without dims."""


def save(model: nnx.Module, path: str | PathLike[str]) -> None:
    """Write every Variable of a model to one safetensors file, quantized weights with the text of their decode.

    The file appears whole or not at all: it is written aside, synced and renamed. A killed save leaves the old one, and
    may leave what it had written beside it, under a hidden name that ends in `.tmp`: nothing reads that, delete it.

    Raises ValueError for a model without Variables or with abstract ones, TypeError for what is no module or for a
    Variable that holds neither arrays nor a number, OSError when the path cannot be written.

    >>> import os, tempfile
    >>> import lowbit as lb
    >>> from flax import nnx
    >>> small = lb.quantize(nnx.Linear(16, 4, rngs=nnx.Rngs(0)), lb.bcq(2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "small.safetensors")
    ...     lb.save(small, path)
    ...     again = lb.load(path, into=nnx.eval_shape(lambda: small))
    >>> bool((again.kernel.alpha[...] == small.kernel.alpha[...]).all())
    True
    """
    expect_module(model, "save")
    entries = held(model)
    if not entries:
        raise ValueError(f"{type(model).__name__} holds no Variables: there is nothing to save")
    write(path, {name: v if isinstance(v, QuantArray) else plain(name, v) for name, v in entries.items()})


def held(model: nnx.Module) -> dict[str, Any]:
    """Quantized weights, and what all other Variables hold, by name."""
    quantized = kernels(model)
    fields = {f"{name}/{field}" for name, k in quantized.items() for field in k.type.fields}
    dense = {n: v.get_value() for n, v in variables(nnx.state(model)).items() if n not in fields}
    return {name: k.array for name, k in quantized.items()} | dense


@overload
def load(path: str | PathLike[str], into: M) -> M: ...
@overload
def load(path: str | PathLike[str], into: None = None) -> dict[str, Any]: ...
def load(path: str | PathLike[str], into: nnx.Module | None = None) -> Any:
    """Read what `lb.save` wrote.

    Args:
      path: the file.
      into: a model of the same structure, usually abstract, so that nothing is allocated twice:
        `nnx.eval_shape(lambda: lb.quantize(Model(rngs=nnx.Rngs(0)), rules))`. It is left as it is.

    Returns a model like `into` with the stored arrays, or without `into` a dict from names to arrays and QuantArrays.
    The file is mapped: on a CPU the arrays are its pages and take no memory of their own. It may be replaced, by
    `lb.save` too, or deleted, but not overwritten in place while they are in use (see `lb.io.read`).

    Raises CheckpointError for a file that is damaged, of a newer version, or that does not fit `into`: the message
    names the file, the layer, and what both sides hold. TypeError when `into` is no module. See `save` for an example.
    """
    if into is not None:
        expect_module(into, "load into")
    entries = read(path)
    if into is None:
        return entries
    return fitted(path, entries, into)


def fitted(path: str | PathLike[str], entries: dict[str, Any], into: M) -> M:
    """A model like `into` with what a file holds. Raises CheckpointError unless both hold the same things."""
    graph, state = nnx.split(into)
    values = _match(path, entries, into, variables(state))
    model: M = nnx.merge(graph, restored(path, state, values))
    return model


def restored(file: str | PathLike[str], state: Any, values: Mapping[str, Any]) -> Any:
    """A state with the stored values of its Variables, by name."""
    filled = {name: _restored(f"{file}: {name!r}", v, values[name]) for name, v in variables(state).items()}
    return nnx.from_flat_state([(p, filled[joined(p)]) for p, _ in nnx.to_flat_state(state)])


def variables(state: Any) -> dict[str, Any]:
    """Variables by name. Raises ValueError for two of one name, as with nnx.Dict({"a/b": ...}) beside a.b."""
    flat = [(joined(path), v) for path, v in nnx.to_flat_state(state)]
    named = dict(flat)
    if len(named) < len(flat):
        twice = next(name for name, v in flat if named[name] is not v)
        raise ValueError(f"two Variables are named {twice!r}: rename one, so that a file can tell them apart")
    return named


def plain(name: str, value: Any) -> Any:
    """What a Variable holds as an array that a file can hold. Raises ValueError for an abstract one."""
    if isinstance(value, jax.ShapeDtypeStruct):
        shape = list(value.shape)
        raise ValueError(f"{name!r} is abstract ({value.dtype}{shape}): only a model with arrays can be saved")
    if isinstance(value, NUMBERS):
        return np.asarray(value)
    is_key = isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(value) if is_key else value


def _match(path: Any, entries: dict[str, Any], into: nnx.Module, variables: dict[str, Any]) -> dict[str, Any]:
    """Array by Variable name, after checking that file and model hold the same things."""
    values: dict[str, Any] = {}
    quantized = kernels(into)
    for name, kernel in quantized.items():
        stored = entries.get(name)
        if isinstance(stored, QuantArray):
            if stored.type != replace(kernel.type, layout="own"):
                raise CheckpointError(f"{path}: {name!r} is {stored.type}, but the model has {kernel.type}")
            like = stored if kernel.type.layout == "own" else laid_out(stored)
            values |= {f"{name}/{field}": value for field, value in like.fields.items()}
        elif stored is not None:
            raise CheckpointError(f"{path}: {name!r} is stored dense, but the model has it as {kernel.type}")
    for name, stored in entries.items():
        if isinstance(stored, QuantArray):
            if name not in quantized:
                raise CheckpointError(
                    f"{path}: {name!r} is stored as {stored.type}, but the model has no such quantized weight"
                )
        else:
            values[name] = stored
    missing, extra = variables.keys() - values.keys(), values.keys() - variables.keys()
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit {type(into).__name__}: the file lacks {some(missing)}; the model lacks {some(extra)}"
        )
    return values


def some(names: Collection[str]) -> str:
    """The first of several names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, sorted(names)[:3])) + more if names else "nothing"


def _restored(where: str, variable: Any, value: Any) -> Any:
    """The Variable with a stored value. `where` begins the message: the file and the name."""
    want = variable.get_value()
    kind = type(variable).__name__
    if isinstance(want, NUMBERS):
        if value.shape != () or type(value.item()) is not type(np.asarray(want).item()):
            raise CheckpointError(f"{where} is stored as {value.dtype}{list(value.shape)}, but the model's is {want!r}")
        return variable.replace(type(want)(value.item()))
    if jax.numpy.issubdtype(want.dtype, jax.dtypes.prng_key):
        try:
            value = jax.random.wrap_key_data(jax.numpy.asarray(value), impl=_key_impl(want))
        except TypeError as err:
            stored = f"{value.dtype}{list(value.shape)}"
            raise CheckpointError(f"{where} is stored as {stored}, which are no {want.dtype} keys ({err})") from err
    if value.shape != want.shape or value.dtype != want.dtype:
        raise CheckpointError(
            f"{where} is stored as {value.dtype}{list(value.shape)}, "
            f"but the model's {kind} is {want.dtype}{list(want.shape)}"
        )
    return variable.replace(value)  # as read: 64-bit arrays that jax would narrow stay numpy


def _key_impl(keys: Any) -> Any:
    """How random keys are made, abstract ones too: traced, they tell."""
    found: list[Any] = []
    jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), keys)
    return found[0]
