"""Saving a `TinyLM` as safetensors (fp16, with its config) and loading it back as float32."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.tinylm.model import Config, TinyLM

__all__ = ["WEIGHTS", "load", "save"]

WEIGHTS = pathlib.Path(__file__).with_name("weights.safetensors")


def named(model: TinyLM) -> dict[str, jax.Array]:
    """The parameters by dotted path, as in ``layers.0.attn.q.kernel``."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable[...] for path, variable in flat}


def save(model: TinyLM, path: pathlib.Path = WEIGHTS) -> None:
    """Writes the parameters in fp16, and the config as metadata.

    Raises:
        ValueError: a parameter does not fit fp16's range.
    """
    arrays = {name: np.asarray(value).astype(np.float16) for name, value in named(model).items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has values beyond fp16's 65504 or not finite; the model cannot be saved in fp16")
    save_file(arrays, path, metadata={"config": json.dumps(dataclasses.asdict(model.config))})


def load(path: pathlib.Path = WEIGHTS) -> TinyLM:
    """The saved model, its parameters as float32.

    Raises:
        ValueError: the file's tensors are not those of the model that its config describes.

    Example:
        >>> load().config.width
        256
    """
    with safe_open(path, framework="numpy") as file:
        config = Config(**json.loads(file.metadata()["config"]))
        arrays = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}
    model = TinyLM(config, rngs=nnx.Rngs(0))
    wanted = {name: value.shape for name, value in named(model).items()}
    if wanted != {name: value.shape for name, value in arrays.items()}:
        odd = sorted(set(wanted.items()) ^ {(name, value.shape) for name, value in arrays.items()})
        raise ValueError(f"{path} does not fit {config}: the model or the file alone has {odd}")
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    filled = [(key, variable.replace(jnp.asarray(arrays[".".join(map(str, key))]))) for key, variable in flat]
    nnx.update(model, nnx.from_flat_state(filled))
    return model
