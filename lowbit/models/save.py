"""`lb.models.save`: a model in a folder of lowbit's own, which `lb.models.load` opens."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lowbit.array import QuantArray
from lowbit.io import CheckpointError, read
from lowbit.io.atomic import replacing, replacing_folder
from lowbit.io.error import AGAIN
from lowbit.io.shards import SINGLE, read_json
from lowbit.models.config import Config
from lowbit.models.decoder import Decoder
from lowbit.models.encoder import Encoder
from lowbit.models.families import Family
from lowbit.models.hub import local
from lowbit.models.source import abstract, described
from lowbit.models.switches import Settings, abstract_switches, settings
from lowbit.nn.checkpoint import fitted, held, some
from lowbit.nn.checkpoint import save as save_model
from lowbit.nn.kernel import Kernel, joined
from lowbit.nn.kinds import KINDS

Model = Decoder | Encoder
METHOD, VERSION, SWITCHED = "lowbit", 1, 2
"""In `quantization_config` of config.json. Models whose layers choose their widths have a version of their own, so that
a library that does not know of them says so; others are as before."""
BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
"""Files that a model needs to read and write text."""


def save(
    model: Model, folder: str | os.PathLike[str], source: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a model, quantized or not, to a folder that `lb.models.load` opens.

    In it are model.safetensors, as `lb.save` writes it; the config.json of `source`, which now says that lowbit wrote
    the weights, and how layers choose their widths where they do (`lb.tune.switched`); and the files of its tokenizer.
    The folder appears whole or not at all: a save that fails or is killed leaves the old one.

    Args:
      model: what `lb.models.load` gave, or `lb.quantize`, fine-tuning and so on made of it.
      folder: a new one.
      source: the folder, or name on the hub, that the model was loaded from.
      overwrite: replace a folder that lowbit saved and to which nobody added.

    Raises FileExistsError for a folder that exists or, with `overwrite`, holds what a save does not write, ValueError
    for a model that the config.json of `source` does not describe or that has other Variables than a loaded one,
    OSError when the folder cannot be written, TypeError for what is no model of `lb.models`.

    >>> import os, tempfile
    >>> import lowbit as lb
    >>> small = lb.models.load("examples/tinylm/model", lb.uniform(4, group=128))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lb.models.save(small, os.path.join(folder, "small"), "examples/tinylm/model")
    ...     again = lb.models.load(os.path.join(folder, "small"))
    >>> bool((again.layers[0].mlp.up.kernel.planes[...] == small.layers[0].mlp.up.kernel.planes[...]).all())
    True
    """
    if not isinstance(model, Model):
        raise TypeError(f"cannot save a {type(model).__name__} as a folder: give a model of lb.models, or use lb.save")
    origin = local(source)
    j, kind, config = described(origin)
    if config != model.config or type(model) is not kind.model:
        raise ValueError(f"{origin / 'config.json'} describes another model: name the folder that this one came from")
    dtype = model.layers[0].attn.q.dtype
    chosen = settings(model)
    _check(model, kind, dtype, chosen)
    expect_replaceable(folder, overwrite)
    stated = {"quant_method": METHOD, "version": SWITCHED if chosen else VERSION}
    stated |= {"dtype": None if dtype is None else jnp.dtype(dtype).name} | ({"switches": chosen} if chosen else {})
    with replacing_folder(folder) as new:
        for name in BESIDE:
            if (origin / name).exists():
                with replacing(new / name) as file, open(origin / name, "rb") as old:
                    shutil.copyfileobj(old, file)
        save_model(model, new / SINGLE)
        with replacing(new / "config.json") as file:
            file.write(json.dumps({**j, "quantization_config": stated}, indent=2).encode() + b"\n")


def _check(model: Model, kind: Family, dtype: Any, chosen: Settings) -> None:
    """Raises ValueError unless `reopened` would make a model of the same Variables."""
    has = held(model)
    made = held(_like(kind, model.config, has, chosen, dtype, jnp.float32))
    if has.keys() != made.keys():
        odd = some(has.keys() ^ made.keys())
        raise ValueError(f"the model is not as one that is loaded, in {odd}: write it with lb.save")


def expect_replaceable(folder: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises FileExistsError for a folder that `save` would not write."""
    folder = Path(folder)
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{str(folder)!r} exists: choose another name, or say overwrite=True")
    if not (folder / "config.json").exists() or not is_saved(read_json(folder / "config.json")):
        raise FileExistsError(
            f"{str(folder)!r} is no folder that lowbit saved: choose another name, or delete it yourself"
        )
    if added := {entry.name for entry in folder.iterdir()} - {*BESIDE, SINGLE, "config.json"}:
        raise FileExistsError(
            f"{str(folder)!r} holds {some(added)}, which lowbit did not save: choose another name, or move it elsewhere"
        )


def is_saved(j: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of ours."""
    stated = j.get("quantization_config")
    return isinstance(stated, Mapping) and stated.get("quant_method") == METHOD


def reopened(folder: Path, j: Mapping[str, Any], kind: Family, config: Config, dtype: Any) -> Any:
    """What `save` wrote, bit for bit; layers compute in `dtype`, or what they did if None."""
    stated, file = j["quantization_config"], folder / SINGLE
    if stated.get("version") not in (VERSION, SWITCHED):
        raise CheckpointError(
            f"{folder / 'config.json'} states version {stated.get('version')!r} of lowbit's folders, and this library "
            f"reads {VERSION} and {SWITCHED}: upgrade lowbit"
        )
    if not file.exists():
        raise CheckpointError(f"{folder} holds no {SINGLE}: {AGAIN}")
    entries = read(file)
    table = entries.get("embed/embedding")
    dtype = jax.dtypes.canonicalize_dtype(dtype) if dtype is not None else _dtype(folder, stated.get("dtype"))
    try:
        chosen = stated.get("switches", {})
        model = _like(kind, config, entries, chosen, dtype, jnp.float32 if table is None else table.dtype)
    except ValueError as err:
        raise CheckpointError(f"{folder / 'config.json'} {err}: {AGAIN}") from err
    for path, module in nnx.iter_modules(model):
        for name, variable in vars(module).items():
            stored = entries.get(f"{joined(path)}/{name}")
            if isinstance(variable, nnx.Variable) and stored is not None:
                variable.set_value(jax.ShapeDtypeStruct(variable.get_value().shape, stored.dtype))
    return fitted(file, entries, model)


def _dtype(folder: Path, stated: Any) -> Any:
    try:
        if stated is None or jnp.issubdtype(dtype := jnp.dtype(stated), jnp.floating):
            return stated and dtype
    except TypeError:
        pass
    raise CheckpointError(f"{folder / 'config.json'} states dtype = {stated!r}, which is no type of floats: {AGAIN}")


def _like(kind: Family, config: Config, entries: Mapping[str, Any], chosen: Any, dtype: Any, param_dtype: Any) -> Any:
    """A model without arrays, with the quantized weights among these entries, and switches of these settings."""
    readers = abstract_switches(entries, chosen)

    def replace(path: tuple[Any, ...], node: Any) -> Any:
        array = entries.get(f"{joined(path)}/{KINDS[type(node)].attribute}") if type(node) in KINDS else None
        if not isinstance(array, QuantArray):
            return node
        kernel = Kernel(array, jax.ShapeDtypeStruct((*array.stack, 2), jnp.float32))  # type: ignore[arg-type]
        if joined(path) in readers:
            kernel.reader = readers[joined(path)]
        return KINDS[type(node)].make(node, kernel)

    return nnx.recursive_map(replace, abstract(kind, config, dtype, param_dtype))
