"""The tensors of a checkpoint's folder, as values of a model's parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.io.checkpoint import Weights
from lowbit.io.error import CheckpointError
from lowbit.io.layout import BESIDE
from lowbit.io.shards import read_json
from lowbit.io.tensors import LINE, Array, to_jax
from lowbit.models.config import Config
from lowbit.models.families import Family, Where, family, value
from lowbit.nn.checkpoint import some, variables
from lowbit.nn.kernel import Kernel, joined
from lowbit.nn.kinds import KINDS, layers


def described(folder: Path) -> tuple[Mapping[str, Any], Family, Config]:
    """What config.json holds, and what it means. Raises CheckpointError for what no model can be made of."""
    file = folder / "config.json"
    if not file.exists():
        raise CheckpointError(f"{folder} holds no config.json: name a checkpoint's folder, or get that file too")
    j = read_json(file)
    try:
        kind = family(j)
        return j, kind, kind.config(j)
    except CheckpointError as err:
        raise CheckpointError(f"{folder}: {err}") from err


def abstract(kind: Family, config: Config, dtype: Any, param_dtype: Any) -> Any:
    """A model without arrays."""
    return nnx.eval_shape(lambda: kind.model(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)))


class Source:
    """Gives a model's parameters their values, layer by layer.

    Names of tensors are those that the family's places use, whatever they are in the file.
    """

    def __init__(self, folder: Path, kind: Family, config: Config) -> None:
        """Raises as `lb.read_checkpoint` does."""
        self.folder, self._weights, self._unused = folder, Weights(folder), kind.unused
        self._places = dict(kind.places(config))
        self._quantized = {kind.rename(name): layer for name, layer in self._weights.quantized.items()}
        aside = {f"{layer}.{key}" for layer in self._quantized.values() for key in BESIDE - {"bias"}}
        # Scales of activations are left out: here these stay floats.
        self._dense = {kind.rename(name): name for name in self._weights.dense if name not in aside}
        if lost := {*self._weights.dense} - {*self._dense.values()} - aside:
            raise CheckpointError(f"{folder}: {some(lost)} is there under two names: leave one of them out")

    @property
    def dtype(self) -> Any:
        """That of the first parameter which is stored dense: the embedding, as a rule."""
        every = (name for where in self._places.values() for name in where.tensors)
        first = next((name for name in every if name in self._dense), None)
        return np.float32 if first is None else self._read(first).dtype

    def _read(self, name: str) -> Array:
        return self._weights.shards.array(self._dense[name])

    def check(self, model: nnx.Module) -> None:
        """Raises CheckpointError unless the checkpoint holds every parameter of the model and nothing else."""
        used, held = {n for where in self._places.values() for n in where.tensors}, {*self._dense, *self._quantized}
        missing, extra = used - held, {n for n in held - used if not n.endswith(self._unused)}
        if missing or extra:
            raise CheckpointError(
                f"{self.folder} does not hold the model that its config.json describes: it lacks {_count(missing)}, "
                f"and the model has no place for {_count(extra)}"
            )
        for name, shape in self._shapes(model):
            if name in self._dense:
                self._check_dense(name, shape)
        found = layers(model)
        for path, where in self._stored_quantized().items():
            single = where == Where(where.tensors[:1], transposed=True)
            if not single or type(found.get(path.rpartition("/")[0])) is not nnx.Linear:
                raise CheckpointError(
                    f"{self.folder}: {some(where.tensors)} is quantized, and it is no single linear layer of the "
                    "model, but a table, or several layers as one: get the checkpoint in floats, and give rules"
                )

    def _check_dense(self, name: str, shape: tuple[int, ...]) -> None:
        array, stored = self._read(name), self._dense[name]
        where = f"{self._weights.shards.file_of[stored]}: tensor {stored!r} is {array.dtype}{list(array.shape)}"
        if array.shape != shape:
            raise CheckpointError(f"{where}, but config.json makes it {list(shape)}: get both from one checkpoint")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(
                f"{where}, not floats, and config.json does not say what it means: get the one that belongs to it"
            )

    def _shapes(self, model: nnx.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of every tensor that holds parameters of the model."""
        found = variables(nnx.state(model))
        ends: dict[str, int] = {}
        for where in self._places.values():
            for name in where.tensors:
                ends[name] = max(ends.get(name, 0), where.rows[1] if where.rows else 0)
        for path, where in self._places.items():
            shape = found[path].get_value().shape[1 if len(where.tensors) > 1 else 0 :]
            for name in where.tensors:
                whole = (*shape[:-1], ends[name] or shape[-1])
                yield name, whole[::-1] if where.transposed else whole

    def fill(self, path: str, module: nnx.Module) -> None:
        """Gives what a module itself holds its values."""
        for name, variable in vars(module).items():
            if isinstance(variable, nnx.Variable) and isinstance(variable.get_value(), jax.ShapeDtypeStruct):
                where = self._places[joined(filter(None, (path, name)))]
                what = f"{self.folder}: {some(where.tensors)}"
                variable.set_value(_cast(what, value(where, self._read), variable.get_value().dtype))
        self._weights.shards.forget()

    def fill_rest(self, model: nnx.Module) -> None:
        """What is in no dense layer: norms, and biases of quantized layers."""
        for path, module in nnx.iter_modules(model):
            if type(module) not in KINDS:
                self.fill(joined(path), module)

    def _stored_quantized(self) -> dict[str, Where]:
        return {path: where for path, where in self._places.items() if self._quantized.keys() & set(where.tensors)}

    def with_quantized(self, model: Any) -> Any:
        """The model with the layers that are stored quantized. The error of their weights is not known: NaN."""
        stored = self._stored_quantized()

        def replace(path: tuple[Any, ...], node: Any) -> Any:
            if type(node) is not nnx.Linear or (at := f"{joined(path)}/kernel") not in stored:
                return node
            layer = self._quantized[stored[at].tensors[0]]
            array, shape = self._weights.weight(layer), node.kernel.get_value().shape
            if array.shape != shape:
                what = f"{self.folder}: layer {layer!r} is {list(array.shape)}"
                raise CheckpointError(f"{what}, but config.json makes it {list(shape)}: get both from one checkpoint")
            self._weights.shards.forget()
            return KINDS[nnx.Linear].make(node, Kernel(array, jnp.full(2, jnp.nan)))

        return nnx.recursive_map(replace, model) if stored else model


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensors ({some(names)})" if names else "nothing"


def _cast(name: str, array: Array, dtype: Any) -> jax.Array:
    """A copy on the device; aligned, so that jax on a CPU makes no second one."""
    memory = np.empty(array.size * dtype.itemsize + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    out = memory[start : start + array.size * dtype.itemsize].view(dtype).reshape(array.shape)
    with np.errstate(over="ignore"):
        np.copyto(out, array, casting="unsafe")
    narrower = float(jnp.finfo(dtype).max) < float(jnp.finfo(array.dtype).max)
    if narrower and np.isinf(out).any() and not np.isinf(array).any():
        raise CheckpointError(f"{name} has numbers beyond {dtype}'s {jnp.finfo(dtype).max}: load it with dtype=float32")
    made = to_jax(out)
    assert isinstance(made, jax.Array)
    return made
