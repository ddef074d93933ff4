"""`lb.models.load`: a checkpoint's folder as a model, its layers quantized as they are read."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lowbit.io.checkpoint import Weights
from lowbit.io.error import AGAIN, CheckpointError
from lowbit.io.layout import BESIDE
from lowbit.io.shards import read_json
from lowbit.io.tensors import LINE, Array, to_jax
from lowbit.models.config import Config
from lowbit.models.decoder import Decoder
from lowbit.models.families import Family, Where, family, value
from lowbit.models.hub import local
from lowbit.models.save import abstract, is_saved, reopened
from lowbit.nn.calibrate import LayerStats
from lowbit.nn.checkpoint import some, variables
from lowbit.nn.kernel import Kernel, joined
from lowbit.nn.kinds import KINDS, layers
from lowbit.nn.progress import bar
from lowbit.nn.quantize import quantize, quantized
from lowbit.nn.rules import Rules

HEAD = "lm_head.weight"


def load(
    path: str | os.PathLike[str],
    rules: Rules | None = None,
    *,
    dtype: Any = None,
    stats: Mapping[str, LayerStats] | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    revision: str | None = None,
) -> Decoder:
    """The model in a checkpoint's folder, its layers quantized as they are read.

    The result is bit for bit `lb.quantize(load(path), rules)`, but no more than the quantized model and two dense
    layers in float32 are ever in memory: files are mapped, and each layer is quantized as soon as it is read.

    Args:
      path: a folder with config.json and safetensors files, as the library transformers writes it, as GPTQ, AWQ,
        compressed-tensors, AQLM and any-precision-llm do (see `lb.read_checkpoint`), or as `lb.models.save` does. Or,
        where there is no such folder, a name on the Hugging Face hub, "organization/model", which is downloaded.
      rules: as in `lb.quantize`, for the layers that are stored dense; None leaves them so.
      dtype: what weights are cast to, and layers compute in; that of the stored embedding if None. Norms are float32.
        Where the folder is lowbit's own, arrays are as they were saved, and it is what layers compute in.
      stats, resume: as in `lb.quantize`. With the same `resume` a run that was killed goes on where it was.
      progress: show a progress bar; by default when standard error is a terminal.
      revision: of a model of the hub: a branch, a tag or a commit.

    Raises CheckpointError for a folder without config.json or of an unknown family, for tensors that are missing, left
    over, of another shape than config.json says or of integers, for fused tensors that are quantized, and as
    `lb.read_checkpoint` does for files, before any layer is quantized; FileNotFoundError and OSError for a path that is
    no folder and cannot be downloaded; and what `lb.quantize` raises.

    >>> import lowbit as lb
    >>> model = lb.models.load("examples/tinylm/model", lb.uniform(4, group=128))
    >>> type(model.layers[0].mlp.up.kernel.array).__name__, model.config.width
    ('QuantArray', 256)
    """
    folder = local(path, revision)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{path} holds no config.json: name a checkpoint's folder, or get that file too")
    j = read_json(folder / "config.json")
    kind = family(j)
    config = _config(folder, j, kind)
    more: dict[str, Any] = {"stats": stats, "progress": progress, "resume": resume}
    if is_saved(j):
        model = reopened(folder, j, config, dtype)
        return model if rules is None else quantize(model, rules, **more)
    weights = Weights(folder)
    places = dict(kind.places(config))
    dtype = jnp.dtype(_stored_dtype(weights, places) if dtype is None else dtype)
    model = abstract(config, dtype, dtype)
    _check(folder, weights, model, places, kind.unused + ((HEAD,) if config.tied else ()))
    filling = _Filling(folder, weights, places)
    model = filling.with_quantized(model)
    filling.rest(model)
    if rules is not None:
        return quantized(model, rules, stats or {}, fill=filling, progress=progress, resume=resume)
    with bar(progress, len(found := layers(model)), "loading") as advance:
        for at, layer in found.items():
            filling(at, layer)
            advance()
    return model


def _config(folder: Path, j: Mapping[str, Any], kind: Family) -> Config:
    file = folder / "config.json"
    try:
        return kind.config(j)
    except KeyError as err:
        raise CheckpointError(f"{file} lacks {err}, which a model_type {j['model_type']!r} has: {AGAIN}") from err
    except CheckpointError:
        raise
    except (TypeError, ValueError, AttributeError) as err:  # what computing with arbitrary JSON raises
        raise CheckpointError(f"{file} describes no {j['model_type']!r} ({err}): {AGAIN}") from err


def _stored_dtype(weights: Weights, places: Mapping[str, Where]) -> Any:
    """Of the embedding; of a quantized one's head, norm or whatever else is dense."""
    order = [name for where in places.values() for name in where.tensors if name in weights.shards.file_of]
    if not order:
        return np.float32  # all are missing, which is said next
    return weights.shards.array(order[0]).dtype


def _check(
    folder: Path, weights: Weights, model: nnx.Module, places: Mapping[str, Where], unused: Collection[str]
) -> None:
    """Raises CheckpointError unless the checkpoint holds every parameter of the model and nothing else."""
    used = {name for where in places.values() for name in where.tensors}
    aside = {f"{layer}.{key}" for layer in weights.quantized.values() for key in BESIDE - {"bias"}}
    held = {*weights.dense, *weights.quantized} - aside  # scales of activations, which stay floats here
    missing, extra = used - held, {n for n in held - used if not n.endswith(tuple(unused))}
    if missing or extra:
        raise CheckpointError(
            f"{folder} does not hold the model that its config.json describes: it lacks {_count(missing)}, and the "
            f"model has no place for {_count(extra)}"
        )
    for name, shape in _shapes(model, places):
        if name in weights.quantized:
            continue
        array = weights.shards.array(name)
        where = f"{weights.shards.file_of[name]}: tensor {name!r} is {array.dtype}{list(array.shape)}"
        if array.shape != shape:
            raise CheckpointError(f"{where}, but config.json makes it {list(shape)}: get both from one checkpoint")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise CheckpointError(
                f"{where}, not floats, and config.json has no quantization_config that says what they mean: get the "
                "config.json that belongs to it, or a checkpoint in floats"
            )


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensors ({some(names)})" if names else "nothing"


def _shapes(model: nnx.Module, places: Mapping[str, Where]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of every tensor that holds parameters of the model."""
    found = variables(nnx.state(model))
    ends: dict[str, int] = {}
    for where in places.values():
        for name in where.tensors:
            ends[name] = max(ends.get(name, 0), where.rows[1] if where.rows else 0)
    for path, where in places.items():
        shape = tuple(found[path].get_value().shape)[1 if len(where.tensors) > 1 else 0 :]
        for name in where.tensors:
            whole = (*shape[:-1], ends[name] or shape[-1])
            yield name, whole[::-1] if where.transposed else whole


class _Filling:
    """Gives a model's parameters their values: `filling(path, layer)` those of one layer."""

    def __init__(self, folder: Path, weights: Weights, places: Mapping[str, Where]) -> None:
        self.folder, self.weights, self.places = folder, weights, places

    def __call__(self, path: str, layer: nnx.Module) -> None:
        for name, variable in vars(layer).items():
            if isinstance(variable, nnx.Variable) and isinstance(variable.get_value(), jax.ShapeDtypeStruct):
                self._fill(f"{path}/{name}", variable)

    def rest(self, model: nnx.Module) -> None:
        """What is in no layer that rules can name, and biases of quantized ones."""
        for path, module in nnx.iter_modules(model):
            if type(module) not in KINDS:
                self(joined(path), module)

    def _fill(self, path: str, variable: nnx.Variable[Any]) -> None:
        where, dtype = self.places[path], variable.get_value().dtype
        array = value(where, self.weights.shards.array)
        variable.set_value(_cast(f"{self.folder}: {some(where.tensors)}", array, dtype))
        self.weights.shards.forget()

    def with_quantized(self, model: Decoder) -> Decoder:
        """The model with the layers that are stored quantized."""
        stored = {path: w for path, w in self.places.items() if self.weights.quantized.keys() & set(w.tensors)}

        def replace(path: tuple[Any, ...], node: Any) -> Any:
            at = f"{joined(path)}/{KINDS[type(node)].attribute}" if type(node) in KINDS else ""
            return node if at not in stored else self._quantized(node, stored[at])

        return nnx.recursive_map(replace, model) if stored else model

    def _quantized(self, layer: Any, where: Where) -> nnx.Module:
        name = where.tensors[0]
        what = f"{self.folder}: layer {self.weights.quantized.get(name, name)!r}"
        if type(layer) is not nnx.Linear or where != Where((name,), transposed=True):
            raise CheckpointError(
                f"{what} is quantized, and it is no single linear layer of the model, but a table, or several layers "
                "as one: get the checkpoint in floats and quantize it with rules="
            )
        array = self.weights.weight(self.weights.quantized[name])
        if array.shape != (shape := layer.kernel.get_value().shape):
            raise CheckpointError(
                f"{what} is {list(array.shape)}, but config.json makes it {list(shape)}: get both anew"
            )
        self.weights.shards.forget()
        return KINDS[nnx.Linear].make(layer, Kernel(array, jnp.full(2, jnp.nan)))


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
